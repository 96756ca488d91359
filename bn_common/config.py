"""The training configuration: one frozen dataclass, the same for `train_jax.py` and `python -m torch_bn.training`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import tyro

from bn_common.checks import check_epsilon, check_int, check_momentum, check_real, require

# Of Fashion-MNIST, MNIST and KMNIST alike.
NUM_CLASS = 10

# What a run may be continued with otherwise: no number of it changes, with the number of devices the last digits. (What
# the data are, their digest tells, and so what their pixels' mean is.)
MAY_CHANGE = frozenset({"config", "out", "resume", "checkpoint_every", "keep_checkpoints", "until_accuracy", "profile"})
MAY_CHANGE |= {"tensorboard", "data", "data_dir", "devices", "coordinator", "num_processes", "process_id"}
MAY_CHANGE |= {"pixel_mean", "pixel_std"}
# What is done with a run that is finished: no part of what it is, so neither its record nor a file of options has it.
AFTERWARDS = frozenset({"export", "predict", "resize", "invert"})

# Learning rate and weight decay of each optimiser. Those of adamw and momentum were found at batch size 64 on 10,000
# held-out training images, as was the label smoothing.
DEFAULTS = {"sgd": (0.5, 1e-4), "momentum": (0.5, 1e-4), "adam": (0.01, 0.0), "adamw": (0.03, 0.01)}


# Optimisers count steps in int32.
MOST_STEPS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Model:
    """The network, and what it is computed in."""

    bn_momentum: float = 0.9
    """Batch norm: weight of the OLD value in the moving statistics, 0 to 1."""
    bn_eps: float = 1e-5
    """Added to batch norm's variance, > 0."""
    sync_bn: Literal["global", "local"] = "global"
    """Whose statistics batch norm takes: the whole batch's, or each device its share's."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of layers; all else stays float32."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learnt from, and in what portions."""

    data: Literal["fashion-mnist", "sample"] = "fashion-mnist"
    """fashion-mnist: downloaded, if it is not here. sample: 6,000 + 1,000 images of it."""
    data_dir: Path | None = None
    """Instead of --data: a folder with four IDX files, named as MNIST's."""
    batch_size: int = 64
    """Images in a step, 2 to all there are."""
    seed: int = 0
    """Of weights and batches, 0 to 2^32 - 1."""


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """How it is learnt, and for how long."""

    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = "adamw"
    """momentum is Nesterov's, 0.9."""
    epochs: int = 10
    """Passes over the training set, >= 1."""
    lr: float | None = None
    """Highest learning rate, > 0. None: 0.5 for sgd and momentum, 0.01 adam, 0.03 adamw."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or falling to 0 along half a cosine."""
    warmup_epochs: float = 1.0
    """Epochs of rising from 0, 0 to --epochs."""
    weight_decay: float | None = None
    """Weight decay, >= 0; adamw: decoupled. None: 1e-4 for sgd, momentum; 0 adam; 0.01 adamw."""
    label_smoothing: float = 0.05
    """Share of the label that is spread over all classes, >= 0 and < 1."""
    until_accuracy: float | None = None
    """Stop at this test accuracy, > 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """What it is computed on."""

    devices: int | None = None
    """How many share each batch, >= 1. None: all there are; of PyTorch, torchrun's processes."""
    coordinator: str | None = None
    """With other processes: HOST:PORT of the first, or auto (SLURM, TPU, Kubernetes)."""
    num_processes: int | None = None
    """How many there are, >= 2."""
    process_id: int | None = None
    """Which one this is, from 0 on."""
    deterministic: bool = False
    """Same bytes each time on GPUs too."""


@dataclasses.dataclass(frozen=True)
class Output:
    """What is left of it, and where."""

    out: Path | None = None
    """Run folder; the same run in it is continued. None: a new one in runs/."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints within an epoch, >= 1. None: after every epoch only."""
    keep_checkpoints: int = 3
    """Last ones kept beside the best, >= 1."""
    profile: bool = False
    """Trace some steps, into RUN/profile."""
    tensorboard: bool = False
    """Scalars, into RUN/tensorboard."""
    export: Path | None = None
    """New file for the trained network."""
    predict: tuple[Path, ...] = ()
    """After training, or at once if --out holds all of it: classes of PNG or JPEG files."""
    resize: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Bring these to the network's size."""
    invert: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """These are dark on white."""


@dataclasses.dataclass(frozen=True)
class General:
    """Where options come from that the command line leaves out."""

    config: Path | None = None
    """TOML file with options by name, as in lr = 0.1. The command line wins."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in --out, with its own options; those given again must be the same."""


GROUPS = (General, Model, Data, Optimiser, Devices, Output)
"""The groups of --help."""


@dataclasses.dataclass(frozen=True)
class Config(Output, Devices, Optimiser, Data, Model, General):  # reversed: the last one's fields come first
    """How to train BLeNet. Every field is a command-line option of the same name."""

    def __post_init__(self) -> None:
        check_int("--epochs", self.epochs, 1)
        require(self.epochs <= MOST_STEPS, "--epochs", self.epochs, "1 to 2^31 - 1, to which steps are counted")
        check_int("--batch-size", self.batch_size, 2)
        # tyro checks these too, but a Config is also made in code.
        for name, kind in get_type_hints(Config).items():
            if get_origin(kind) is Literal:
                value, allowed = getattr(self, name), get_args(kind)
                require(value in allowed, f"--{name.replace('_', '-')}", value, ", ".join(allowed))
        if self.lr is not None:
            check_real("--lr", self.lr, math.nextafter(0, 1), 1e6, "a number > 0, at most 1e6")
        if self.weight_decay is not None:
            check_real("--weight-decay", self.weight_decay, 0, 1e6, "a number >= 0, at most 1e6")
        check_real("--label-smoothing", self.label_smoothing, 0, math.nextafter(1, 0), "a number >= 0 and < 1")
        check_real("--warmup-epochs", self.warmup_epochs, 0, self.epochs, f"0 to --epochs, {self.epochs}")
        if self.until_accuracy is not None:
            check_real("--until-accuracy", self.until_accuracy, math.nextafter(0, 1), 1, "a number > 0, at most 1")
        if self.checkpoint_every is not None:
            check_int("--checkpoint-every", self.checkpoint_every, 1)
        check_int("--keep-checkpoints", self.keep_checkpoints, 1)
        if self.devices is not None:
            check_int("--devices", self.devices, 1)
        self._check_processes()
        check_int("--seed", self.seed, 0)
        require(self.seed < 2**32, "--seed", self.seed, "at most 2^32 - 1")
        check_momentum(self.bn_momentum, "--bn-momentum")
        check_epsilon("--bn-eps", self.bn_eps, "float32")
        for name in ("resize", "invert"):
            require(bool(self.predict) or not getattr(self, name), f"--{name}", True, "with --predict")
        both = self.data == "sample" and self.data_dir is not None
        require(not both, "--data-dir", f"{self.data_dir} with --data sample", "one of the two")

    def _check_processes(self) -> None:
        both = {"--num-processes": self.num_processes, "--process-id": self.process_id}
        if self.coordinator in (None, "auto"):
            for name, value in both.items():
                require(value is None, name, value, "with --coordinator HOST:PORT only")
            return
        host, _, port = self.coordinator.rpartition(":")
        good = bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16
        require(good, "--coordinator", self.coordinator, "HOST:PORT, with a port from 1 to 65535, or auto")
        for name, value in both.items():
            require(value is not None, name, None, "an integer, with --coordinator HOST:PORT")
        check_int("--num-processes", self.num_processes, 2)
        check_int("--process-id", self.process_id, 0)
        assert self.num_processes is not None, "see above"
        assert self.process_id is not None, "see above"
        allowed = f"0 to {self.num_processes - 1}, below --num-processes"
        require(self.process_id < self.num_processes, "--process-id", self.process_id, allowed)

    def check_shares(self, num_devices: int) -> None:
        """Raise ValueError where a device that normalises with its own share's statistics would have one image."""
        least = 2 * num_devices if self.sync_bn == "local" else 2
        allowed = f"{least} or more with --sync-bn local on {num_devices} devices, 2 images for each"
        require(self.batch_size >= least, "--batch-size", self.batch_size, allowed)

    def resolved(self) -> Config:
        """The same with the optimiser's defaults in place of None, and with ~ in paths expanded."""
        lr, weight_decay = DEFAULTS[self.optimizer]
        return dataclasses.replace(
            self,
            lr=lr if self.lr is None else self.lr,
            weight_decay=weight_decay if self.weight_decay is None else self.weight_decay,
            data_dir=None if self.data_dir is None else self.data_dir.expanduser(),
            out=None if self.out is None else self.out.expanduser(),
            export=None if self.export is None else self.export.expanduser(),
            predict=tuple(path.expanduser() for path in self.predict),
        )
