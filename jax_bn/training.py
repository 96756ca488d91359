"""Training BLeNet: the state, one step, evaluation, the loop. `torch_bn/training.py` is the same in PyTorch.

The data stay on the device as uint8; a step is given the indices of its batch, and is one jitted function whose
state is donated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax import Array
from numpy.typing import NDArray

from bn_common.checkpoints import Fetched, Place
from bn_common.config import NUM_CLASS, Config
from bn_common.run_folder import RunFolder, Totals
from image_data import ImageDataset, epoch_batches, padded_batches, pixel_mean_and_std, steps_per_epoch
from jax_bn.blenet import BLeNet
from jax_bn.checkpoint import Checkpoints
from jax_bn.device_data import DeviceData, to_device
from jax_bn.mesh import (
    SAME,
    SHARE,
    add_up,
    axis_of,
    in_turn,
    make_mesh,
    mean_over_devices,
    of_first,
    on_mesh,
    shares,
    spread,
)
from jax_bn.profiling import Profile
from jax_bn.settings import compiler_options

EVAL_BATCH_SIZE = 1000
# Where a step fetches its images from all over the data set. Elsewhere that is put in order once an epoch, and a step
# has a slice: a TPU would pull all of it into its fast memory for each batch. On a CPU the copy would be read and
# written whole, 94 MB an epoch, to spare what it does anyway: fetch every image once.
GATHERING = frozenset({"cpu"})
# JAX only: steps that may be under way at once: the device always has the next one, and the progress bar stays honest.
STEPS_IN_FLIGHT = 4

Variables = dict[str, Any]
"""{"params": ..., "batch_stats": ...}. JAX only: a module of PyTorch's holds its own."""


class TrainState(NamedTuple):
    """All that a step changes. JAX only: PyTorch's module and optimiser are changed in place.

    Attributes:
      params: BLeNet's parameters.
      batch_stats: its moving statistics.
      opt_state: the optimiser's state, which counts the steps for the schedule.
    """

    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> Variables:
        """What `BLeNet.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Metrics(NamedTuple):
    """Sums over examples: `loss` of the cross-entropy, `correct` of the right predictions, `examples` their number."""

    loss: Array
    correct: Array
    examples: Array


def learning_rate_schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate at step t (from 0), with W steps of warm-up and T steps in all.

    lr * t / W in the warm-up; then lr (constant) or lr * (1 + cos(pi * (t - W) / (T - W))) / 2 (cosine).
    """
    lr, warmup, total = config.lr, round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch
    assert lr is not None, "Config.resolved() gives it"
    after = optax.constant_schedule(lr)
    if config.schedule == "cosine" and warmup < total:
        after = optax.cosine_decay_schedule(lr, total - warmup)
    if warmup:
        after = optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), after], [warmup])
    # From an int32 step optax makes a float32 rate, from a float as wide as JAX has them one just as wide.
    return lambda step: after(jnp.asarray(step, float))


def make_optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    """The optimiser that the config names; weight decay is decoupled in adamw and added to the gradient elsewhere."""
    schedule, decay = learning_rate_schedule(config, steps_per_epoch), config.weight_decay
    assert decay is not None, "Config.resolved() gives it"
    if config.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=decay)
    plain = {
        "sgd": lambda: optax.sgd(schedule),
        "momentum": lambda: optax.sgd(schedule, momentum=0.9, nesterov=True),
        "adam": lambda: optax.adam(schedule),
    }[config.optimizer]()
    return optax.chain(optax.add_decayed_weights(decay), plain) if decay else plain


def init_state(model: BLeNet, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Fresh weights from the seed, and the optimiser's state for them. JAX only: see `TrainState`."""
    x = jnp.zeros((1, *model.image_shape), model.param_dtype)

    @jax.jit  # op by op it compiles for longer
    def init(key: Array) -> TrainState:
        variables = model.init(key, x, train=False)
        return TrainState(variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))

    return init(jax.random.key(seed))


def train_step(
    model: BLeNet,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    x: Array,
    labels: Array,
    *,
    label_smoothing: float = 0.0,
    mask: Array | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One step on the mean cross-entropy of a batch. Pure.

    Args:
      model: the network.
      optimizer: as in `init_state`.
      state: before the step.
      x: images [B, H, W, C].
      labels: int32 [B].
      label_smoothing: a; the target is (1 - a) * one_hot(labels) + a / num_class.
      mask: bool [B], which images count (None: all); see `BLeNet`.
      axis_name: a mapped axis over whose devices the batch is spread: x, labels and mask are this device's share.
        The gradients and metrics are those of the whole batch. So are the statistics, if `model.axis_name` is the same;
        if it is None, each device normalises with its own, and those of the first one move batch_stats.

    Returns:
      (the new state, the metrics before the step; their loss is against the labels as they are).
    """

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
        return mean_over_devices(losses, mask, axis_name), (updated["batch_stats"], logits)

    gradients, (batch_stats, logits) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if axis_name is not None and model.axis_name is None:
        batch_stats = of_first(batch_stats, axis_name)
    weights = jnp.ones(len(labels), logits.dtype) if mask is None else mask.astype(logits.dtype)
    return TrainState(params, batch_stats, opt_state), _metrics(logits, labels, weights, axis_name)


def eval_step(
    model: BLeNet, variables: Variables, x: Array, labels: Array, weights: Array, *, axis_name: str | None = None
) -> Metrics:
    """Metrics of a batch in prediction; weights float [B] are 1 for an example that counts and 0 for padding.

    axis_name: as in `train_step`.
    """
    logits: Any = model.apply(variables, x, train=False)
    return _metrics(logits, labels, weights, axis_name)


def _metrics(logits: Array, labels: Array, weights: Array, axis_name: str | None) -> Metrics:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (logits.argmax(-1).astype(labels.dtype) == labels).astype(weights.dtype)
    return add_up(Metrics((losses * weights).sum(), (correct * weights).sum(), weights.sum()), axis_name)


def first_not_finite(model: BLeNet, variables: Variables, x: NDArray[np.float32]) -> str:
    """The first layer whose parameters, statistics or output in training are not finite; "the loss" if all are."""
    model = model.clone(axis_name=None)  # here, whatever the devices do
    _, found = model.apply(variables, x, True, method="layers", mutable=True, capture_intermediates=True)
    for name, layer in found["intermediates"].items():
        if name != "layers":  # the network's own output
            of_layer = [variables[kind].get(name, {}) for kind in ("params", "batch_stats")]
            if not all(np.isfinite(v).all() for v in jax.tree.leaves([of_layer, layer])):
                return name
    return "the loss"


def evaluate(
    eval_batch: Callable[..., Metrics], variables: Variables, data: DeviceData, *, num_devices: int = 1
) -> Totals:
    """Metrics over a whole data set, in batches of one size, which the devices can share; the last one is padded."""
    batches = padded_batches(len(data.labels), EVAL_BATCH_SIZE, multiple=num_devices)
    return totals([eval_batch(variables, data, *batch) for batch in batches])


def totals(found: list[Metrics], before: Fetched = ()) -> Totals:
    """The sum of all batches' metrics, fetched from the device in one go, and of those fetched before."""
    return Totals(*np.asarray(before + fetch(found), np.float64).sum(0).tolist())


def fetch(found: list[Metrics]) -> Fetched:
    """All batches' metrics, fetched from the device in one go."""
    return tuple((float(loss), float(correct), float(examples)) for loss, correct, examples in jax.device_get(found))


def train(config: Config, dataset: ImageDataset, run: RunFolder) -> TrainState:
    """Train BLeNet as the config says, from the beginning or where the run folder's newest checkpoint stands.

    Metrics, weights and a checkpoint go to the run folder after every epoch, curves at the end.

    Raises:
      FloatingPointError: a loss or a weight is no longer finite; the run folder holds the epochs before.
      OSError: the run folder can't be written; its last checkpoint is whole.
      Stopped: a signal has ended the run, which is saved.
    """
    mesh = make_mesh(config)
    axis_name = axis_of(mesh)
    train_data, test_data = to_device(dataset, mesh)
    num_train, steps = len(dataset.train_labels), steps_per_epoch(len(dataset.train_labels), config.batch_size)
    model = BLeNet(
        fig_size=dataset.train_images.shape[1],
        num_class=NUM_CLASS,
        momentum=config.bn_momentum,
        epsilon=config.bn_eps,
        axis_name=axis_name if config.sync_bn == "global" else None,
        dtype=None if config.precision == "float32" else jnp.dtype(config.precision),
        platform=mesh.devices[0].platform,
    )
    optimizer, schedule = make_optimizer(config, steps), learning_rate_schedule(config, steps)
    initial_state = on_mesh(partial(init_state, model, optimizer, config.seed), mesh, ()).trace()
    run.say_what_runs_where(
        mesh.devices[0].device_kind, mesh.size, processes=jax.process_count(), framework=f"jax {jax.__version__}"
    )

    def train_batch(
        state: TrainState, data: DeviceData, where: Array, mask: Array | None = None
    ) -> tuple[TrainState, Metrics]:
        x, labels = data.batch(where) if gathers else data.slice(where, share)
        smoothing = config.label_smoothing
        return train_step(model, optimizer, state, x, labels, label_smoothing=smoothing, mask=mask, axis_name=axis_name)

    def eval_batch(variables: Variables, data: DeviceData, indices: Array, weights: Array) -> Metrics:
        return eval_step(model, variables, *data.batch(indices), weights, axis_name=axis_name)

    def feed(epoch: int, first_step: int = 0) -> tuple[DeviceData, Iterable[NDArray]]:
        """An epoch's data, and where in them each batch is: its indices, or which slice it is."""
        batches = list(epoch_batches(num_train, config.batch_size, seed=config.seed, epoch=epoch))
        if gathers:
            return train_data, (spread(shares(indices, mesh)[0], mesh) for indices in batches[first_step:])
        return permuted(train_data, spread(in_turn(np.stack(batches), mesh), mesh)), np.arange(
            first_step, steps, dtype=np.int32
        )

    gathers = mesh.devices[0].platform in GATHERING
    first, mask = shares(np.arange(config.batch_size, dtype=np.int32), mesh)
    share, masks = len(first) // mesh.size, () if mask is None else (spread(mask, mesh),)
    in_order: Any = (SHARE, SHARE, SAME, SAME)
    in_order = DeviceData(*in_order)
    permuted = on_mesh(DeviceData.permuted, mesh, (SAME, SHARE), in_order)
    # Compiled before the clock starts, so that the first epoch's images/s mean the same as the others'.
    arguments = (SAME, *((SAME, SHARE) if gathers else (in_order, SAME)), *(SHARE for _ in masks))
    jitted_step = on_mesh(train_batch, mesh, arguments, donate_argnums=0, compiler_options=compiler_options(train=True))
    epoch_data, batches = feed(0)
    lowered_step = jitted_step.lower(initial_state.out_info, epoch_data, next(iter(batches)), *masks)
    # Beside the initial weights, a program that takes nearly as long to compile.
    with run.waiting("compiling"), ThreadPoolExecutor(1) as beside:
        compiling = beside.submit(lowered_step.compile)
        make_state = initial_state.lower().compile()
        state = make_state()
        compiled_step = compiling.result()
    jitted_eval = on_mesh(eval_batch, mesh, (SAME, SAME, SHARE, SHARE), compiler_options=compiler_options())

    def eval_shared(variables: Variables, data: DeviceData, *batch: NDArray) -> Metrics:
        return jitted_eval(variables, data, *spread(batch, mesh))

    def first_broken(epoch: int, step: int) -> str:
        """The first layer that is not finite in that step; all from the last checkpoint on is done again for it."""
        state, place = checkpoints.restore(make_state(), again=True)
        for epoch_again in range(place.epoch, epoch + 1):
            done = len(place.found) if epoch_again == place.epoch else 0
            epoch_data, batches = feed(epoch_again, done)
            for number, where in enumerate(batches, done):
                if (epoch_again, number) == (epoch, step):
                    break
                state, _ = compiled_step(state, epoch_data, where, *masks)
        indices = list(epoch_batches(num_train, config.batch_size, seed=config.seed, epoch=epoch))[step]
        mean, std = map(np.float32, pixel_mean_and_std(dataset.train_images))
        x = (dataset.train_images[indices].astype(np.float32) - mean) / std
        return first_not_finite(model, jax.tree.map(np.asarray, state.variables), x[..., None])

    def check_finite(epoch: int, step: int, found: Fetched) -> None:
        weights = named_weights(state.variables)
        run.check_finite(epoch=epoch, step=step, found=found, weights=weights, first_broken=first_broken)

    checkpoints = Checkpoints(run)
    state, place = checkpoints.restore(state)
    profile = Profile(
        run.path if config.profile and run.writes else None, (config.epochs - place.epoch) * steps - len(place.found)
    )
    for epoch in range(place.epoch, config.epochs):
        if run.reached(epoch):
            break
        step, found = epoch * steps + len(place.found), []
        start_time, started = place.start_time or time.time(), time.perf_counter() - place.seconds
        epoch_data, batches = feed(epoch, len(place.found))
        with run.progress(epoch + 1, steps, len(place.found)) as advance:
            for where in batches:
                with profile.step() as wanted:
                    state, metrics = compiled_step(state, epoch_data, where, *masks)
                    wanted.append(metrics)
                found.append(metrics)
                if len(found) > STEPS_IN_FLIGHT:
                    jax.block_until_ready(found[-STEPS_IN_FLIGHT - 1])
                advance()
                step += 1
                if step < (epoch + 1) * steps and run.save_is_due(step):
                    so_far, seconds = place.found + fetch(found), time.perf_counter() - started
                    check_finite(epoch, step, so_far)
                    checkpoints.save(step, state, Place(epoch, so_far, start_time, seconds))
                    run.stop_if_told(step, checkpoints.wait)
            train_totals = totals(found, place.found)
        seconds = time.perf_counter() - started
        check_finite(epoch, step, place.found + fetch(found))
        run.end_epoch(
            epoch=epoch,
            step=step,
            train=train_totals,
            test=evaluate(eval_shared, state.variables, test_data, num_devices=mesh.size),
            start_time=start_time,
            seconds=seconds,
            learning_rate=float(schedule(step - 1)),
            weights=named_weights(state.variables),
        )
        place = Place(epoch + 1)
        checkpoints.save(step, state, place)
        run.stop_if_told(step, checkpoints.wait)
    profile.stop()
    checkpoints.wait()
    run.finish()
    return state


def named_weights(variables: Variables) -> dict[str, NDArray]:
    """The variables by name, as weights.safetensors holds them: "params/Conv_0/kernel" and so on."""
    return {name: np.asarray(value) for name, value in flatten_dict(variables, sep="/").items()}
