"""50 training steps in lockstep: same weights, same batches of real images, same optimiser in both wings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import image_data
import jax_bn
import jax_bn.training
import torch_bn
import torch_bn.training
from bn_common.config import Config
from parity import weights
from parity.comparison import bounds
from parity.wings.blenet import BLENET_GAUGES
from parity_tests.wings import promoting

STEPS, BATCH_SIZE, SEED = 50, 64, 3


def batches(dtype):
    """STEPS batches of standardised images [B, 1, H, W] and labels, of the first epoch's order."""
    sample = image_data.load_sample()
    mean, std = image_data.pixel_mean_and_std(sample.train_images)
    order = image_data.epoch_batches(len(sample.train_labels), BATCH_SIZE, seed=SEED, epoch=0)
    for indices in list(order)[:STEPS]:
        x = (sample.train_images[indices] - mean) / std
        yield x[:, None].astype(dtype), sample.train_labels[indices].astype(np.int32)


def initial_model():
    torch.manual_seed(SEED)
    return torch_bn.BLeNet(channels=1, fig_size=28, num_class=10)


def run_torch(config, dtype):
    """(losses, state_dict, logits of the last batch in prediction)."""
    model = initial_model().to(getattr(torch, dtype))
    optimizer, scheduler = torch_bn.training.make_optimizer(config, STEPS, model)
    losses = []
    for x, labels in batches(dtype):
        x, labels = torch.tensor(x), torch.tensor(labels.astype(np.int64))
        metrics = torch_bn.training.train_step(model, optimizer, x, labels, label_smoothing=config.label_smoothing)
        losses.append(metrics.loss.item() / BATCH_SIZE)
        scheduler.step()
    with torch.no_grad():
        return np.array(losses), model.state_dict(), model.eval()(x).numpy()


def run_jax(config, dtype):
    """The same from the JAX wing, the weights by PyTorch's names."""
    model, source = jax_bn.BLeNet(), initial_model().to(getattr(torch, dtype))
    optimizer = promoting(jax_bn.training.make_optimizer(config, STEPS))
    variables = weights.to_flax(source, model)
    state = jax_bn.training.TrainState(
        variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    )
    step = jax.jit(partial(jax_bn.training.train_step, model, optimizer, label_smoothing=config.label_smoothing))
    losses = []
    for x, labels in batches(dtype):
        x = jnp.asarray(np.moveaxis(x, 1, -1))
        state, metrics = step(state, x, jnp.asarray(labels))
        losses.append(float(metrics.loss) / BATCH_SIZE)
    logits = jax.jit(partial(model.apply, train=False))(state.variables, x)
    return np.array(losses), weights.to_torch(state.variables, source), np.asarray(logits)


def distances(a, b):
    """Largest differences: of the parameters, of the moving statistics, of the logits in prediction.

    A gauge bias is no parameter here: its difference from the moving mean is a statistic of the layer without bias.
    """
    parameters, statistics = {}, {}
    first, second = ({name: v.numpy().astype(np.float64) for name, v in run[1].items()} for run in (a, b))
    for bias, mean in BLENET_GAUGES.items():
        for state in (first, second):
            state[mean] = state[mean] - state.pop(bias)
    for name in first:
        (statistics if "moving" in name else parameters)[name] = np.abs(first[name] - second[name]).max()
    logits = np.abs(a[2].astype(np.float64) - b[2]).max()
    return max(parameters.values()), max(statistics.values()), logits


def config(optimizer, lr, schedule="constant", weight_decay=0.0):
    """Constant: the plain recipe, whose bounds DESIGN.md has. Cosine: with warm-up and label smoothing too."""
    extras = (
        {"warmup_epochs": 0.2, "label_smoothing": 0.1}
        if schedule == "cosine"
        else {"warmup_epochs": 0, "label_smoothing": 0}
    )
    return Config(epochs=1, optimizer=optimizer, lr=lr, schedule=schedule, weight_decay=weight_decay, **extras)


@pytest.mark.parametrize(
    "config",
    [
        config("sgd", 0.1),
        pytest.param(config("momentum", 0.1, "cosine", 1e-3), marks=pytest.mark.thorough),
        pytest.param(config("adam", 1e-3), marks=pytest.mark.thorough),
        pytest.param(config("adam", 1e-3, "cosine", 1e-2), marks=pytest.mark.thorough),
        config("adamw", 1e-3, "cosine", 0.1),
    ],
    ids=lambda c: f"{c.optimizer}-{c.schedule}-{c.weight_decay}",
)
def test_float64(config, x64, quickly_compiled):
    """Losses of every step and weights after the last; all optimisers, schedules and kinds of weight decay."""
    a, b = run_torch(config, "float64"), run_jax(config, "float64")
    np.testing.assert_allclose(a[0], b[0], rtol=bounds.FLOAT64_LOSSES_200_STEPS)
    parameters, statistics, logits = distances(a, b)
    assert max(parameters, statistics) <= bounds.FLOAT64_PARAMETERS_200_STEPS
    assert logits <= bounds.FLOAT64_LOGITS_200_STEPS


def test_float32(x64):
    """SGD in float32, the wings against each other and both against float64 in PyTorch."""
    a, b = run_torch(config("sgd", 0.1), "float32"), run_jax(config("sgd", 0.1), "float32")
    referee = run_torch(config("sgd", 0.1), "float64")
    parameters, statistics, logits = distances(a, b)
    assert parameters <= bounds.FLOAT32_PARAMETERS_200_SGD_STEPS
    # A moving statistic is one of a layer's output, like the logits, and sums as many products.
    assert max(statistics, logits) <= bounds.FLOAT32_LOGITS_200_SGD_STEPS
    assert (a[2].argmax(1) == b[2].argmax(1)).all()
    first, second = distances(a, referee), distances(b, referee)
    for mine, other in ((first[0], second[0]), (max(first[1:]), max(second[1:]))):
        assert max(mine, other) <= bounds.FARTHEST_FROM_REFEREE * min(mine, other)
