"""Training BLeNet: the network, its state, one step, evaluation, an epoch, a run. `torch_bn/training.py` is its twin.

The data stay on the devices as uint8 (`device_data.py`); a step is one jitted function whose state is donated. On
several devices it is the same function of each one's share (`mesh.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from bn_common.checkpoints import Fetched, Place
from bn_common.config import NUM_CLASS, Config
from bn_common.run_folder import RunFolder, Totals
from image_data import ImageDataset, padded_batches
from jax_bn.blenet import BLeNet
from jax_bn.checkpoint import Checkpoints
from jax_bn.device_data import Batch, Batches, DeviceData, to_device
from jax_bn.mesh import SAME, SHARE, add_up, axis_of, make_mesh, mean_over_devices, of_first, on_mesh, spread
from jax_bn.profiling import Profile
from jax_bn.settings import compiler_options

EVAL_BATCH_SIZE = 1000
# Where a step fetches its images from all over the data set. Elsewhere that is put in order once an epoch, and a step
# has a slice: a TPU would pull all of it into its fast memory for each batch. On a CPU the copy would be read and
# written whole, 94 MB an epoch, to spare what it does anyway: fetch every image once.
GATHERING = frozenset({"cpu"})
# JAX only: steps that may be under way at once: the device always has the next one, and the progress bar stays honest.
STEPS_IN_FLIGHT = 4

Collection = Mapping[str, Mapping[str, Array]]
"""Layer -> name -> array: {"Conv_0": {"kernel": ..., "bias": ...}, ...}. JAX only, as `Variables` are."""

Variables = Mapping[str, Collection]
"""{"params": ..., "batch_stats": ...}. JAX only: a module of PyTorch's holds its own."""


class TrainState(NamedTuple):
    """All that a step changes. Its parts are JAX only: PyTorch's module and optimiser hold theirs.

    Attributes:
      params: BLeNet's parameters.
      batch_stats: its moving statistics.
      opt_state: the optimiser's state, which counts the steps for the schedule.
    """

    params: Collection
    batch_stats: Collection
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


TrainBatch = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
"""A step on a batch of `Batches`."""

EvalBatch = Callable[[Variables, DeviceData, NDArray[np.int32], NDArray[np.float32]], Metrics]
"""`eval_step` of the images at these indices [B], with weights [B]. JAX only: see `jit_eval_step`."""


def make_model(config: Config, fig_size: int, mesh: Mesh) -> BLeNet:
    """The network that the config describes, for images of that size, on these devices."""
    return BLeNet(
        fig_size=fig_size,
        num_class=NUM_CLASS,
        momentum=config.bn_momentum,
        epsilon=config.bn_eps,
        axis_name=axis_of(mesh) if config.sync_bn == "global" else None,
        dtype=None if config.precision == "float32" else jnp.dtype(config.precision),
        platform=mesh.devices[0].platform,
    )


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
    """Fresh weights from the seed, and the optimiser's state for them."""
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
    logits = cast(Array, model.apply(variables, x, train=False))
    return _metrics(logits, labels, weights, axis_name)


def _metrics(logits: Array, labels: Array, weights: Array, axis_name: str | None) -> Metrics:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    correct = (logits.argmax(-1).astype(labels.dtype) == labels).astype(weights.dtype)
    return add_up(Metrics((losses * weights).sum(), (correct * weights).sum(), weights.sum()), axis_name)


def jit_eval_step(model: BLeNet, mesh: Mesh) -> EvalBatch:
    """`eval_step` for all devices, of a batch of a data set: (variables, data, indices, weights) -> metrics.

    JAX only, as `EvalBatch` and `compile_step` are: PyTorch compiles nothing.
    """

    def eval_batch(variables: Variables, data: DeviceData, indices: Array, weights: Array) -> Metrics:
        return eval_step(model, variables, *data.batch(indices), weights, axis_name=axis_of(mesh))

    jitted = on_mesh(eval_batch, mesh, (SAME, SAME, SHARE, SHARE), compiler_options=compiler_options())
    return lambda variables, data, *batch: jitted(variables, data, *spread(batch, mesh))


def evaluate(eval_batch: EvalBatch, variables: Variables, data: DeviceData, *, num_devices: int = 1) -> Totals:
    """Metrics over a whole data set, in batches of one size, which the devices can share; the last one is padded."""
    batches = padded_batches(len(data.labels), EVAL_BATCH_SIZE, multiple=num_devices)
    return totals(fetch([eval_batch(variables, data, *batch) for batch in batches]))


def fetch(found: list[Metrics]) -> Fetched:
    """All batches' metrics, fetched from the device in one go."""
    return tuple((float(loss), float(correct), float(examples)) for loss, correct, examples in jax.device_get(found))


def totals(found: Fetched) -> Totals:
    """The sum of all batches' metrics."""
    return Totals(*np.asarray(found, np.float64).sum(0).tolist())


def compile_step(
    config: Config, model: BLeNet, optimizer: optax.GradientTransformation, batches: Batches, mesh: Mesh
) -> tuple[Callable[[], TrainState], TrainBatch]:
    """(`init_state`, `train_step` of a batch) for all devices.

    Before the clock starts, so that the first epoch's images/s mean the same as the others'. JAX only.
    """

    def train_batch(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        x, labels = batches.read(batch)
        smoothing, axis_name = config.label_smoothing, axis_of(mesh)
        return train_step(
            model, optimizer, state, x, labels, label_smoothing=smoothing, mask=batch.mask, axis_name=axis_name
        )

    init = on_mesh(partial(init_state, model, optimizer, config.seed), mesh, ()).trace()
    specs, options = (SAME, batches.specs), compiler_options(train=True)
    step = on_mesh(train_batch, mesh, specs, donate_argnums=0, compiler_options=options)
    lowered = step.lower(init.out_info, next(batches.epoch(0)))
    # Beside the initial weights, a program that takes nearly as long to compile.
    with ThreadPoolExecutor(1) as beside:
        compiling = beside.submit(lowered.compile)
        return init.lower().compile(), compiling.result()


def train_epoch(
    step: TrainBatch,
    state: TrainState,
    place: Place,
    batches: Batches,
    run: RunFolder,
    profile: Profile,
    save: Callable[[TrainState, Place], None],
) -> tuple[TrainState, Place]:
    """What is left of an epoch: the state after it, and the place, which holds what all of its steps have found.

    Args:
      step: of a batch.
      state: at `place`.
      place: in the epoch.
      batches: of every epoch.
      run: is shown how far the epoch is, and says where a checkpoint is due.
      profile: of some of the steps.
      save: writes a checkpoint.
    """
    first, found = len(place.found), list[Metrics]()
    start_time, started = place.start_time or time.time(), time.perf_counter() - place.seconds

    def here() -> Place:
        return Place(place.epoch, place.found + fetch(found), start_time, time.perf_counter() - started)

    with run.progress(place.epoch + 1, batches.steps, first) as advance:
        for number, batch in enumerate(batches.epoch(place.epoch, first), first + 1):
            with profile.step() as wanted:
                state, metrics = step(state, batch)
                wanted.append(metrics)
            found.append(metrics)
            if len(found) > STEPS_IN_FLIGHT:
                jax.block_until_ready(found[-STEPS_IN_FLIGHT - 1])
            advance()
            if number < batches.steps and run.save_is_due(place.epoch * batches.steps + number):
                save(state, here())
        return state, here()


def replay(step: TrainBatch, state: TrainState, place: Place, batches: Batches, epoch: int, number: int) -> TrainState:
    """The state before that step of that epoch, both from 0, as the steps from an earlier place on make it again."""
    for again in range(place.epoch, epoch + 1):
        first, last = len(place.found) if again == place.epoch else 0, number if again == epoch else batches.steps
        for batch in islice(batches.epoch(again, first), last - first):
            state, _ = step(state, batch)
    return state


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


def train(config: Config, dataset: ImageDataset, run: RunFolder) -> TrainState:
    """Train BLeNet as the config says, from the beginning or where the run folder's newest checkpoint stands.

    Metrics, weights and a checkpoint go to the run folder after every epoch, curves at the end.

    Raises:
      FloatingPointError: a loss or a weight is no longer finite; the run folder holds the epochs before.
      OSError: the run folder can't be written; its last checkpoint is whole.
      Stopped: a signal has ended the run, which is saved.
    """
    mesh = make_mesh(config)
    device, framework = mesh.devices[0], f"jax {jax.__version__}"
    train_data, test_data = to_device(dataset, mesh)
    batches = Batches(train_data, config, mesh, gathers=device.platform in GATHERING)
    model = make_model(config, dataset.train_images.shape[1], mesh)
    optimizer, schedule = make_optimizer(config, batches.steps), learning_rate_schedule(config, batches.steps)
    run.say_what_runs_where(device.device_kind, mesh.size, processes=jax.process_count(), framework=framework)
    with run.waiting("compiling"):
        init, step = compile_step(config, model, optimizer, batches, mesh)
    eval_batch = jit_eval_step(model, mesh)
    checkpoints = Checkpoints(run)

    def first_broken(epoch: int, number: int) -> str:
        """The first layer that is not finite in that step; all from the last checkpoint on is done again for it."""
        state = replay(step, *checkpoints.restore(init(), again=True), batches, epoch, number)
        return first_not_finite(
            model, jax.tree.map(np.asarray, state.variables), batches.images(dataset, epoch, number)
        )

    def check_finite(state: TrainState, place: Place) -> None:
        done, weights = place.steps_done(batches.steps), named_weights(state.variables)
        run.check_finite(epoch=place.epoch, step=done, found=place.found, weights=weights, first_broken=first_broken)

    def save(state: TrainState, place: Place) -> None:
        check_finite(state, place)
        checkpoints.save(place.steps_done(batches.steps), state, place)
        run.stop_if_told(place.steps_done(batches.steps), checkpoints.wait)

    state, place = checkpoints.restore(init())
    steps_left = config.epochs * batches.steps - place.steps_done(batches.steps)
    profile = Profile(run.path if config.profile and run.writes else None, steps_left)
    while place.epoch < config.epochs and not run.reached(place.epoch):
        state, place = train_epoch(step, state, place, batches, run, profile, save)
        assert place.start_time is not None, "it has begun"
        check_finite(state, place)
        done = place.steps_done(batches.steps)
        run.end_epoch(
            epoch=place.epoch,
            step=done,
            train=totals(place.found),
            test=evaluate(eval_batch, state.variables, test_data, num_devices=mesh.size),
            start_time=place.start_time,
            seconds=place.seconds,
            learning_rate=float(schedule(done - 1)),
            weights=named_weights(state.variables),
        )
        place = Place(place.epoch + 1)
        save(state, place)
    profile.stop()
    checkpoints.wait()
    run.finish()
    return state


def named_weights(variables: Variables) -> dict[str, NDArray]:
    """The variables by name, as weights.safetensors holds them: "params/Conv_0/kernel" and so on."""
    return {name: np.asarray(value) for name, value in flatten_dict(variables, sep="/").items()}
