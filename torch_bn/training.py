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
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from bn_common.checkpoints import Fetched, Place
from bn_common.config import NUM_CLASS, Config
from bn_common.run_folder import RunFolder, Totals
from image_data import ImageDataset, epoch_batches, steps_per_epoch
from torch_bn.blenet import BLeNet
from torch_bn.checkpoint import Checkpoints
from torch_bn.device_data import DeviceData, to_device
from torch_bn.layers import synchronize
from torch_bn.profiling import Profile

EVAL_BATCH_SIZE = 1000
# Where a step fetches its images from all over the data set. Elsewhere that is put in order once an epoch, and a step
# has a slice: nothing is sent to the device but once an epoch. On a CPU the copy would be read and written whole, to
# spare what it does anyway: fetch every image once.
GATHERING = frozenset({"cpu"})


class Metrics(NamedTuple):
    """Sums over examples: `loss` of the cross-entropy, `correct` of the right predictions, `examples` their number."""

    loss: Tensor
    correct: Tensor
    examples: Tensor


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


def evaluate(model: nn.Module, data: DeviceData) -> Totals:
    """Metrics over a whole data set, of which each process takes its share."""
    indices = torch.arange(len(data.labels), device=data.labels.device)
    if dist.is_initialized():
        for buffer in model.buffers():  # which differ only where each process has statistics of its own
            dist.broadcast(buffer, 0)
        indices = indices.tensor_split(dist.get_world_size())[dist.get_rank()]
    batches = indices.split(EVAL_BATCH_SIZE)
    return totals([eval_step(model, *data.batch(indices)) for indices in batches])


def totals(found: list[Metrics], before: Fetched = ()) -> Totals:
    """The sum of all batches' metrics, of all processes, and of those fetched before."""
    columns = list(zip(*before + fetch(found), strict=True))
    return Totals(*torch.tensor(columns, dtype=torch.float64).sum(1).tolist())


def fetch(found: list[Metrics]) -> Fetched:
    """All batches' metrics, of all processes, fetched from the device in one go."""
    columns = torch.tensor([torch.stack(column).tolist() for column in zip(*found, strict=True)], dtype=torch.float64)
    if dist.is_initialized() and found:
        columns = columns.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(columns)
    return tuple((loss, correct, examples) for loss, correct, examples in columns.T.tolist())


def train(config: Config, dataset: ImageDataset, run: RunFolder) -> BLeNet:
    """Train BLeNet as the config says, from the beginning or where the run folder's newest checkpoint stands.

    Metrics, weights and a checkpoint go to the run folder after every epoch, curves at the end.

    Raises:
      FloatingPointError: a loss or a weight is no longer finite; the run folder holds the epochs before.
      OSError: the run folder can't be written; its last checkpoint is whole.
      Stopped: a signal has ended the run, which is saved.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_data, test_data = to_device(dataset, device)
    num_train, steps = len(dataset.train_labels), steps_per_epoch(len(dataset.train_labels), config.batch_size)
    processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)

    def make_state() -> tuple[BLeNet, nn.Module, torch.optim.Optimizer, LambdaLR]:
        """As it is at the beginning: the model, what a step is given of it, its optimiser and schedule."""
        torch.manual_seed(config.seed)
        model = BLeNet(
            channels=1,
            fig_size=dataset.train_images.shape[1],
            num_class=NUM_CLASS,
            momentum=config.bn_momentum,
            eps=config.bn_eps,
            dtype=None if config.precision == "float32" else getattr(torch, config.precision),
        ).to(device)
        trained: nn.Module = model
        if processes > 1:
            if config.sync_bn == "global":
                synchronize(model)
            # With local, each process has statistics of its own; the first's are for all.
            trained = DistributedDataParallel(model)
        return model, trained, *make_optimizer(config, steps, model)

    model, trained, optimizer, scheduler = make_state()
    kind = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    run.say_what_runs_where(kind, processes, framework=f"torch {torch.__version__}")

    size = len(np.array_split(np.arange(config.batch_size), processes)[rank])
    share = size * processes / config.batch_size

    def feed(epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch's batches, from that step on."""
        batches = epoch_batches(num_train, config.batch_size, seed=config.seed, epoch=epoch)
        order = [np.array_split(batch, processes)[rank] for batch in batches]
        if device.type in GATHERING:
            return (train_data.batch(torch.from_numpy(indices)) for indices in order[first_step:])
        in_order = train_data.permuted(torch.from_numpy(np.concatenate(order)).to(device))
        return (in_order.slice(step, size) for step in range(first_step, steps))

    def first_broken(epoch: int, step: int) -> str:
        """The first layer that is not finite in that step; all from the last checkpoint on is done again for it."""
        model, trained, optimizer, scheduler = make_state()
        place = checkpoints.restore(model, optimizer, scheduler, again=True)
        for epoch_again in range(place.epoch, epoch + 1):
            done = len(place.found) if epoch_again == place.epoch else 0
            for number, (x, labels) in enumerate(feed(epoch_again, done), done):
                if (epoch_again, number) == (epoch, step):
                    break
                train_step(trained, optimizer, x, labels, label_smoothing=config.label_smoothing, share=share)
                scheduler.step()
        return first_not_finite(model, x)

    def check_finite(epoch: int, step: int, found: Fetched) -> None:
        weights = named_weights(model)
        run.check_finite(epoch=epoch, step=step, found=found, weights=weights, first_broken=first_broken)

    checkpoints = Checkpoints(run)
    place = checkpoints.restore(model, optimizer, scheduler)
    profile = Profile(
        run.path if config.profile and run.writes else None, (config.epochs - place.epoch) * steps - len(place.found)
    )
    for epoch in range(place.epoch, config.epochs):
        if run.reached(epoch):
            break
        step, found = epoch * steps + len(place.found), []
        start_time, started = place.start_time or time.time(), time.perf_counter() - place.seconds
        with run.progress(epoch + 1, steps, len(place.found)) as advance:
            for x, labels in feed(epoch, len(place.found)):
                learning_rate = optimizer.param_groups[0]["lr"]
                with profile.step():
                    smoothing = config.label_smoothing
                    found.append(train_step(trained, optimizer, x, labels, label_smoothing=smoothing, share=share))
                scheduler.step()
                advance()
                step += 1
                if step < (epoch + 1) * steps and run.save_is_due(step):
                    so_far, seconds = place.found + fetch(found), time.perf_counter() - started
                    check_finite(epoch, step, so_far)
                    checkpoints.save(step, model, optimizer, scheduler, Place(epoch, so_far, start_time, seconds))
                    run.stop_if_told(step, checkpoints.wait)
            train_totals = totals(found, place.found)
        seconds = time.perf_counter() - started
        check_finite(epoch, step, place.found + fetch(found))
        run.end_epoch(
            epoch=epoch,
            step=step,
            train=train_totals,
            test=evaluate(model, test_data),
            start_time=start_time,
            seconds=seconds,
            learning_rate=learning_rate,
            weights=named_weights(model),
        )
        place = Place(epoch + 1)
        checkpoints.save(step, model, optimizer, scheduler, place)
        run.stop_if_told(step, checkpoints.wait)
    profile.stop()
    checkpoints.wait()
    run.finish()
    return model


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

    def load(config: Config) -> Program:
        """The other processes, and what there is to train with."""
        from torch_bn.predict import of_run
        from torch_bn.processes import join, leave

        require(config.export is None, "--export", config.export, "of train_jax.py only")
        if config.deterministic:
            be_deterministic()
        process, watch = join(config, "python -m torch_bn.training")
        return Program(train, process, watch, leave, predicting=of_run)

    main(load, framework="torch", prog="python -m torch_bn.training", description=__doc__ or "")
