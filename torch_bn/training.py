"""Training BLeNet in PyTorch. `jax_bn/training.py` is the same in JAX.

    python -m torch_bn.training                       10 epochs on Fashion-MNIST
    python -m torch_bn.training --data sample --epochs 2 --out runs/sample
    torchrun --nproc-per-node 4 -m torch_bn.training --batch-size 256

Same options, same order of the data, same run folder as train_jax.py.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from bn_common.checkpoints import Fetched, Place
from bn_common.config import NUM_CLASS, Config
from bn_common.run_folder import RunFolder, Totals
from image_data import ImageDataset
from torch_bn.blenet import BLeNet
from torch_bn.checkpoint import Checkpoints
from torch_bn.device_data import Batches, DeviceData, to_device
from torch_bn.layers import synchronize
from torch_bn.profiling import Profile

EVAL_BATCH_SIZE = 1000
# Where a step fetches its images from all over the data set. Elsewhere that is put in order once an epoch, and a step
# has a slice: nothing is sent to the device but once an epoch. On a CPU the copy would be read and written whole, to
# spare what it does anyway: fetch every image once.
GATHERING = frozenset({"cpu"})


class TrainState(NamedTuple):
    """All that a step changes, in place. Its parts are PyTorch only: in JAX a step is a function of arrays.

    Attributes:
      model: BLeNet.
      parallel: what a step calls: the model, or `DistributedDataParallel` around it.
      optimizer: as from `make_optimizer`.
      scheduler: of the learning rate; counts the steps.
    """

    model: BLeNet
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR


class Metrics(NamedTuple):
    """Sums over examples: `loss` of the cross-entropy, `correct` of the right predictions, `examples` their number."""

    loss: Tensor
    correct: Tensor
    examples: Tensor


TrainBatch = Callable[[TrainState, Tensor, Tensor], Metrics]
"""A step on images and labels."""


def make_model(config: Config, fig_size: int) -> BLeNet:
    """The network that the config describes, for images of that size."""
    return BLeNet(
        channels=1,
        fig_size=fig_size,
        num_class=NUM_CLASS,
        momentum=config.bn_momentum,
        eps=config.bn_eps,
        dtype=None if config.precision == "float32" else getattr(torch, config.precision),
    )


def learning_rate_schedule(config: Config, steps_per_epoch: int) -> Callable[[int], float]:
    """Learning rate at step t (from 0) relative to the config's, with W steps of warm-up and T steps in all.

    t / W in the warm-up; then 1 (constant) or (1 + cos(pi * (t - W) / (T - W))) / 2 (cosine).
    """
    warmup, total = round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if config.schedule == "constant" or warmup == total:
            return 1.0
        return (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup)))) / 2

    return factor


def make_optimizer(config: Config, steps_per_epoch: int, model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimiser that the config names, and its schedule; weight decay as `torch.optim` has it."""
    lr, decay = config.lr, config.weight_decay
    assert lr is not None, "Config.resolved() gives it"
    assert decay is not None, "Config.resolved() gives it"
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr, weight_decay=decay),
        "momentum": lambda p: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=decay),
        "adam": lambda p: torch.optim.Adam(p, lr, weight_decay=decay),
        "adamw": lambda p: torch.optim.AdamW(p, lr, weight_decay=decay),
    }[config.optimizer](model.parameters())
    return optimizer, LambdaLR(optimizer, learning_rate_schedule(config, steps_per_epoch))


def init_state(config: Config, fig_size: int, steps_per_epoch: int, device: torch.device) -> TrainState:
    """Fresh weights from the seed, and the optimiser's state for them."""
    torch.manual_seed(config.seed)
    model = make_model(config, fig_size).to(device)
    parallel: nn.Module = model
    if dist.is_initialized():
        if config.sync_bn == "global":
            synchronize(model)
        # With local, each process has statistics of its own; the first's are for all.
        parallel = DistributedDataParallel(model)
    return TrainState(model, parallel, *make_optimizer(config, steps_per_epoch, model))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    share: float = 1.0,
) -> Metrics:
    """One step on the mean cross-entropy of a batch.

    Args:
      model: the network; the step changes it.
      optimizer: as from `make_optimizer`.
      x: images [B, C, H, W].
      labels: int64 [B].
      label_smoothing: a; the target is (1 - a) * one_hot(labels) + a / num_class.
      share: of several processes under `DistributedDataParallel`, which averages their gradients: this one's examples
        by an average process's.

    Returns:
      The metrics before the step; their loss is against the labels as they are.
    """
    model.train()
    optimizer.zero_grad()
    logits = model(x)
    loss = nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    (loss if share == 1 else loss * share).backward()
    optimizer.step()
    return _metrics(logits.detach(), labels)


@torch.no_grad()
def eval_step(model: nn.Module, x: Tensor, labels: Tensor) -> Metrics:
    """Metrics of a batch in prediction."""
    model.eval()
    logits = model(x)
    return _metrics(logits, labels)


def _metrics(logits: Tensor, labels: Tensor) -> Metrics:
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(-1) == labels).sum()
    return Metrics(loss, correct, torch.full_like(correct, len(labels)))


def evaluate(model: nn.Module, data: DeviceData) -> Totals:
    """Metrics over a whole data set, of which each process takes its share."""
    indices = torch.arange(len(data.labels), device=data.labels.device)
    if dist.is_initialized():
        for buffer in model.buffers():  # which differ only where each process has statistics of its own
            dist.broadcast(buffer, 0)
        indices = indices.tensor_split(dist.get_world_size())[dist.get_rank()]
    batches = indices.split(EVAL_BATCH_SIZE)
    return totals(fetch([eval_step(model, *data.batch(indices)) for indices in batches]))


def fetch(found: list[Metrics]) -> Fetched:
    """All batches' metrics, of all processes, fetched from the device in one go."""
    columns = torch.tensor([torch.stack(column).tolist() for column in zip(*found, strict=True)], dtype=torch.float64)
    if dist.is_initialized() and found:
        columns = columns.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(columns)
    return tuple((loss, correct, examples) for loss, correct, examples in columns.T.tolist())


def totals(found: Fetched) -> Totals:
    """The sum of all batches' metrics."""
    return Totals(*torch.tensor(found, dtype=torch.float64).sum(0).tolist())


def train_epoch(
    step: TrainBatch,
    state: TrainState,
    place: Place,
    batches: Batches,
    run: RunFolder,
    profile: Profile,
    save: Callable[[Place], None],
) -> Place:
    """What is left of an epoch: the place after it, which holds what all of its steps have found.

    Args:
      step: of a batch.
      state: at `place`; the steps change it.
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
        for number, (x, labels) in enumerate(batches.epoch(place.epoch, first), first + 1):
            with profile.step():
                found.append(step(state, x, labels))
            advance()
            if number < batches.steps and run.save_is_due(place.epoch * batches.steps + number):
                save(here())
        return here()


def replay(step: TrainBatch, state: TrainState, place: Place, batches: Batches, epoch: int, number: int) -> None:
    """The state before that step of that epoch, both from 0, as the steps from an earlier place on make it again."""
    for again in range(place.epoch, epoch + 1):
        first, last = len(place.found) if again == place.epoch else 0, number if again == epoch else batches.steps
        for x, labels in islice(batches.epoch(again, first), last - first):
            step(state, x, labels)


@torch.no_grad()
def first_not_finite(model: nn.Module, x: Tensor) -> str:
    """The first layer whose parameters, statistics or output in training are not finite; "the loss" if all are."""
    found: list[str] = []

    def look(name: str, layer: nn.Module, output: Tensor) -> None:
        if not all(bool(v.isfinite().all()) for v in (*layer.state_dict().values(), output)):
            found.append(name)

    layers = [(name, layer) for name, layer in model.named_modules() if not list(layer.children())]
    handles = [layer.register_forward_hook(lambda one, _, y, name=name: look(name, one, y)) for name, layer in layers]
    model.train()
    model(x)
    for handle in handles:
        handle.remove()
    return found[0] if found else "the loss"


def train(config: Config, dataset: ImageDataset, run: RunFolder) -> BLeNet:
    """Train BLeNet as the config says, from the beginning or where the run folder's newest checkpoint stands.

    Metrics, weights and a checkpoint go to the run folder after every epoch, curves at the end.

    Raises:
      FloatingPointError: a loss or a weight is no longer finite; the run folder holds the epochs before.
      OSError: the run folder can't be written; its last checkpoint is whole.
      Stopped: a signal has ended the run, which is saved.
    """
    device, framework = torch.device("cuda" if torch.cuda.is_available() else "cpu"), f"torch {torch.__version__}"
    train_data, test_data = to_device(dataset, device)
    batches = Batches(train_data, config, gathers=device.type in GATHERING)
    schedule, lr = learning_rate_schedule(config, batches.steps), config.lr
    assert lr is not None, "Config.resolved() gives it"
    kind = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    run.say_what_runs_where(kind, batches.processes, framework=framework)
    checkpoints = Checkpoints(run)

    def init() -> TrainState:
        return init_state(config, dataset.train_images.shape[1], batches.steps, device)

    def step(state: TrainState, x: Tensor, labels: Tensor) -> Metrics:
        smoothing, share = config.label_smoothing, batches.share
        metrics = train_step(state.parallel, state.optimizer, x, labels, label_smoothing=smoothing, share=share)
        state.scheduler.step()
        return metrics

    def restore(state: TrainState, *, again: bool = False) -> Place:
        return checkpoints.restore(state.model, state.optimizer, state.scheduler, again=again)

    def first_broken(epoch: int, number: int) -> str:
        """The first layer that is not finite in that step; all from the last checkpoint on is done again for it."""
        state = init()
        replay(step, state, restore(state, again=True), batches, epoch, number)
        x, _ = next(batches.epoch(epoch, number))
        return first_not_finite(state.model, x)

    def check_finite(place: Place) -> None:
        done, weights = place.steps_done(batches.steps), named_weights(state.model)
        run.check_finite(epoch=place.epoch, step=done, found=place.found, weights=weights, first_broken=first_broken)

    def save(place: Place) -> None:
        check_finite(place)
        checkpoints.save(place.steps_done(batches.steps), state.model, state.optimizer, state.scheduler, place)
        run.stop_if_told(place.steps_done(batches.steps), checkpoints.wait)

    state = init()
    place = restore(state)
    steps_left = config.epochs * batches.steps - place.steps_done(batches.steps)
    profile = Profile(run.path if config.profile and run.writes else None, steps_left)
    while place.epoch < config.epochs and not run.reached(place.epoch):
        place = train_epoch(step, state, place, batches, run, profile, save)
        assert place.start_time is not None, "it has begun"
        check_finite(place)
        done = place.steps_done(batches.steps)
        run.end_epoch(
            epoch=place.epoch,
            step=done,
            train=totals(place.found),
            test=evaluate(state.model, test_data),
            start_time=place.start_time,
            seconds=place.seconds,
            learning_rate=lr * schedule(done - 1),
            weights=named_weights(state.model),
        )
        place = Place(place.epoch + 1)
        save(place)
    profile.stop()
    checkpoints.wait()
    run.finish()
    return state.model


def named_weights(model: nn.Module) -> dict[str, NDArray]:
    """The parameters and statistics by name, as weights.safetensors holds them: "conv.0.weight" and so on."""
    return {name: v.cpu().numpy() for name, v in model.state_dict().items()}


def be_deterministic() -> None:
    """Have PyTorch choose kernels that add in a fixed order. PyTorch only: in JAX it is one of `settings.py`."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


if __name__ == "__main__":
    from bn_common.checks import require
    from bn_common.command_line import Program, main

    prog = "python -m torch_bn.training"

    def load(config: Config) -> Program:
        """The other processes, and what there is to train with."""
        from bn_common.memory import keep_memory
        from torch_bn.predict import of_run
        from torch_bn.processes import again, join, leave

        require(config.export is None, "--export", config.export, "of train_jax.py only")
        if config.deterministic:
            be_deterministic()
        keep_memory()
        process, watch = join(config, prog)
        return Program(train, process, watch, leave, predicting=of_run, again=again(prog))

    main(load, framework="torch", prog=prog, description=__doc__ or "")
