"""One run of training, in either wing, made of the wings' own steps: what was reached after each epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from bn_common.config import NUM_CLASS, Config
from image_data import ImageDataset, epoch_batches, steps_per_epoch

PRECISE_BATCHES, PRECISE_SIZE = 20, 500
"""Batches of training images that precise statistics are taken over, 10,000 images in all."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What to train.

    Attributes:
      wing: jax or torch.
      batch_norm: BLeNet, or the same network without its batch norms.
      optimizer, schedule, batch_size: as `Config` has them; weight decay and label smoothing are its defaults.
      lr: the highest learning rate.
      epochs: passes over the training images.
      seed: of weights and batches.
      held_out: so many of the training images are left out, and tested on in place of the test images.
    """

    wing: Literal["jax", "torch"]
    batch_norm: bool
    optimizer: Literal["sgd", "momentum", "adam", "adamw"]
    lr: float
    epochs: int
    seed: int
    held_out: int = 0
    schedule: Literal["constant", "cosine"] = "cosine"
    batch_size: int = 64

    @property
    def config(self) -> Config:
        """For the training programs' own functions."""
        names = ("optimizer", "lr", "epochs", "seed", "schedule", "batch_size")
        warmup = 0.0 if self.schedule == "constant" else 1.0
        return Config(warmup_epochs=warmup, **{name: getattr(self, name) for name in names}).resolved()

    def part(self, dataset: ImageDataset) -> ImageDataset:
        """What is trained and tested on."""
        if not self.held_out:
            return dataset
        images, labels = dataset.train_images, dataset.train_labels
        return dataset._replace(
            train_images=images[: -self.held_out],
            train_labels=labels[: -self.held_out],
            test_images=images[-self.held_out :],
            test_labels=labels[-self.held_out :],
        )


def train(run: Run, dataset: ImageDataset) -> dict[str, list[float]]:
    """Test accuracy after each epoch: with "moving" and, behind batch norm, with "precise" statistics.

    A run that is no longer finite goes on, and has the accuracy of its first answer.
    """
    begin, part = begin_jax if run.wing == "jax" else begin_torch, run.part(dataset)
    learner, found = begin(run, part), dict[str, list[float]](moving=[], precise=[])
    steps = steps_per_epoch(len(part.train_labels), run.batch_size)
    for number, indices in enumerate(index_batches(run, len(part.train_labels)), 1):
        learner.step(indices)
        if number % steps == 0:
            found["moving"].append(learner.accuracy(False))
            if run.batch_norm:
                found["precise"].append(learner.accuracy(True))
    return found if run.batch_norm else {"moving": found["moving"]}


def index_batches(run: Run, num_train: int) -> Iterator[np.ndarray]:
    """The indices of all the run's batches."""
    for epoch in range(run.epochs):
        yield from epoch_batches(num_train, run.batch_size, seed=run.seed, epoch=epoch)


def precise_batches(run: Run, num_train: int) -> Iterator[np.ndarray]:
    """The indices of the batches that precise statistics are taken over: the same at each epoch's end."""
    size = min(PRECISE_SIZE, num_train)
    batches = epoch_batches(num_train, size, seed=run.seed + 1, epoch=0)
    return (indices for indices, _ in zip(batches, range(PRECISE_BATCHES), strict=False))


class Learner(NamedTuple):
    """A network that learns.

    Attributes:
      step: does a step on the training images at these indices.
      accuracy: on the test images, with precise statistics or without.
      intermediates: layer -> its output in training mode on the test images at these indices (JAX only).
    """

    step: Callable[[np.ndarray], None]
    accuracy: Callable[[bool], float]
    intermediates: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None


def begin_jax(run: Run, dataset: ImageDataset) -> Learner:
    """A fresh network in JAX."""
    import jax

    from benchmarks.learning.networks import LeNet
    from jax_bn import BLeNet, precise_statistics
    from jax_bn import training as wing
    from jax_bn.settings import compiler_options

    config, platform = run.config, jax.default_backend()
    train_data, test_data = wing.to_device(dataset)
    model = BLeNet(num_class=NUM_CLASS, platform=platform) if run.batch_norm else LeNet(num_class=NUM_CLASS)
    optimizer = wing.make_optimizer(config, steps_per_epoch(len(dataset.train_labels), config.batch_size))
    state = wing.init_state(model, optimizer, run.seed)

    @partial(jax.jit, donate_argnums=0, compiler_options=compiler_options(train=True))
    def train_step(state: Any, data: Any, indices: Any) -> Any:
        x, labels = data.batch(indices)
        return wing.train_step(model, optimizer, state, x, labels, label_smoothing=config.label_smoothing)[0]

    @jax.jit
    def eval_step(variables: Any, data: Any, indices: Any, weights: Any) -> Any:
        x, labels = data.batch(indices)
        return wing.eval_step(model, variables, x, labels, weights)

    batch = jax.jit(lambda data, indices: data.batch(indices)[0])

    def step(indices: np.ndarray) -> None:
        nonlocal state
        state = train_step(state, train_data, indices)

    def accuracy(precise: bool) -> float:
        variables = state.variables
        if precise:
            images = (batch(train_data, indices) for indices in precise_batches(run, len(dataset.train_labels)))
            apply = partial(BLeNet.apply, model, train=True, mutable=["batch_stats"])
            variables = precise_statistics(apply, variables, images)
        found = wing.evaluate(eval_step, variables, test_data)
        return found.correct / found.examples

    def intermediates(indices: np.ndarray) -> dict[str, np.ndarray]:
        x = batch(test_data, indices)
        options: dict[str, Any] = {"mutable": True, "capture_intermediates": True}
        _, found = model.apply(state.variables, x, True, method="layers", **options)
        found = found["intermediates"]
        return {name: np.asarray(found[name]["__call__"][0]) for name in found if name != "layers"}

    return Learner(step, accuracy, intermediates)


def begin_torch(run: Run, dataset: ImageDataset) -> Learner:
    """A fresh network in PyTorch."""
    import copy

    import torch

    from benchmarks.learning.networks import torch_lenet
    from torch_bn import BLeNet, precise_statistics
    from torch_bn import training as wing

    config, device = run.config, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_data, test_data = wing.to_device(dataset, device)
    torch.manual_seed(run.seed)
    model = (BLeNet(num_class=NUM_CLASS) if run.batch_norm else torch_lenet()).to(device)
    steps = steps_per_epoch(len(dataset.train_labels), config.batch_size)
    optimizer, scheduler = wing.make_optimizer(config, steps, model)

    def step(indices: np.ndarray) -> None:
        images, labels = train_data.batch(torch.from_numpy(indices).to(device))
        wing.train_step(model, optimizer, images, labels, label_smoothing=config.label_smoothing)
        scheduler.step()

    def accuracy(precise: bool) -> float:
        tested = model
        if precise:
            tested = copy.deepcopy(model)
            batches = precise_batches(run, len(dataset.train_labels))
            precise_statistics(tested, (train_data.batch(torch.from_numpy(indices))[0] for indices in batches))
        found = wing.evaluate(tested, test_data)
        return found.correct / found.examples

    return Learner(step, accuracy)
