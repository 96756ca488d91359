"""BLeNet trained on one device and on several: how far apart the two runs end. A program too, for more devices.

python -m parity_tests.jax_bn.over_devices 8 float64 cpu:133:50 layers:11:50
"""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

import image_data
from bn_common.config import Config
from jax_bn import BLeNet, mesh
from jax_bn.training import TrainState, init_state, train_step

STEPS, FIG_SIZE = 50, 12
FORMS = {"layers": "gpu", "cpu": "cpu"}
# The bias before each batch norm, which only this norm's mean can see: see `parity.wings.blenet`.
GAUGES = {f"params/{layer}/bias": f"batch_stats/BatchNorm_{i}/mean" for i, layer in
          enumerate(("Conv_0", "Conv_1", "Dense_0", "Dense_1"))}  # fmt: skip


def sgd_and_gradients(lr):
    """SGD whose state is the last gradients."""
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda g, state, params=None: (jax.tree.map(lambda v: -lr * v, g), g))


def batches(batch_size, dtype, steps=STEPS):
    """Standardised images [B, 12, 12, 1] and labels, in the sample's seeded order; each step has its own."""
    sample = image_data.load_sample()
    mean, std = image_data.pixel_mean_and_std(sample.train_images)
    cut = (sample.train_images[:, 8:20, 8:20].astype(np.float64) - mean) / std
    epochs = -(-steps * batch_size // len(cut))
    order = [b for e in range(epochs) for b in image_data.epoch_batches(len(cut), batch_size, seed=1, epoch=e)]
    return cut.astype(dtype)[..., None], sample.train_labels.astype(np.int32), order[:steps]


def program(num_devices, form, dtype, batch_size, sync_bn="global", variables=None):
    """(the mesh, the model, the jitted step, the state that it begins with)."""
    devices = mesh.make_mesh(Config(devices=num_devices, batch_size=batch_size, sync_bn=sync_bn))
    axis_name = mesh.axis_of(devices)
    model = BLeNet(
        fig_size=FIG_SIZE,
        param_dtype=jnp.dtype(dtype),
        platform=FORMS[form],
        axis_name=axis_name if sync_bn == "global" else None,
    )
    optimizer = sgd_and_gradients(0.1)

    def step(state, x, labels, *mask):
        options = {"label_smoothing": 0.05, "axis_name": axis_name, "mask": mask[0] if mask else None}
        return train_step(model, optimizer, state, x, labels, **options)

    shared = (mesh.SHARE,) * (2 if batch_size % devices.size == 0 else 3)
    state = init_state(model, optimizer, 0)
    if variables is not None:
        state = TrainState(variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))
    return devices, model, mesh.on_mesh(step, devices, (mesh.SAME, *shared)), state


def trained(num_devices, form, dtype, batch_size, steps=STEPS, **options):
    """Losses; gradients of the first step; the last state, in which a gauge is in its mean; logits in prediction."""
    devices, model, step, state = program(num_devices, form, dtype, batch_size, **options)
    x, labels, order = batches(batch_size, dtype, steps)
    losses, gradients = [], None
    for batch in order:
        indices, mask = mesh.shares(batch, devices)
        state, metrics = step(state, x[indices], labels[indices], *(() if mask is None else (mask,)))
        assert metrics.examples == batch_size
        losses.append(float(metrics.loss) / batch_size)
        if gradients is None:
            gradients = jax.device_get(state.opt_state)
    state = TrainState(*jax.device_get(state))
    logits = jax.jit(partial(model.clone(axis_name=None).apply, train=False))(state.variables, x[:100])
    return as_run(np.array(losses), gradients, state.variables, logits)


def as_run(losses, gradients, variables, logits):
    """What `trained` gives, all in float64."""
    found = {name: np.asarray(v, np.float64) for name, v in flatten_dict(dict(variables), sep="/").items()}
    for bias, mean in GAUGES.items():
        found[mean] = found[mean] - found.pop(bias)
    gradients = {name: np.asarray(v, np.float64) for name, v in flatten_dict(gradients, sep="/").items()}
    # A gauge's gradient is 0, or rounding noise.
    gradients = {name: v for name, v in gradients.items() if f"params/{name}" not in GAUGES}
    return losses, gradients, found, np.asarray(logits, np.float64)


def distances(first, second):
    """Largest differences; of the gradients, as one vector, relative to its length."""
    apart = {name: np.abs(first[2][name] - second[2][name]).max() for name in first[2]}
    both = [np.concatenate([run[1][name].ravel() for name in sorted(run[1])]) for run in (first, second)]
    return {
        "losses": np.abs(first[0] - second[0]).max(),
        "gradients": np.linalg.norm(both[0] - both[1]) / np.linalg.norm(both[0]),
        "parameters": max(v for name, v in apart.items() if name.startswith("params")),
        "statistics": max(v for name, v in apart.items() if name.startswith("batch_stats")),
        "logits": np.abs(first[3] - second[3]).max(),
    }


def main():
    num_devices, dtype, *cases = sys.argv[1:]
    jax.config.update("jax_enable_x64", dtype == "float64")
    for form, batch_size, steps in (case.split(":") for case in cases):
        runs = [trained(count, form, dtype, int(batch_size), int(steps)) for count in (1, int(num_devices))]
        print(json.dumps({name: float(v) for name, v in distances(*runs).items()}))


if __name__ == "__main__":
    main()
