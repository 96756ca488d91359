"""The programs: BLeNet's steps as `train_jax.py` compiles them, and ResNet-50's, with either batch norm."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

import jax_bn
from bn_common.config import NUM_CLASS, Config
from jax_bn import training
from jax_bn.mesh import AXIS, SAME, SHARE, axis_of, on_mesh

PLATFORMS = {"v5e": "tpu", "H100": "cuda"}
H100 = Path(__file__).with_name("h100.txtpb")
BLENET_IMAGES, RESNET_IMAGES = 64, 32
"""Images in a step on each device."""

Norm = Callable[..., nn.Module]


class Program(NamedTuple):
    """What is compiled.

    Attributes:
      network: BLeNet or ResNet-50.
      step: train or eval.
      dtype: float32 or bfloat16, to compute in; parameters and statistics are float32.
      card: v5e or H100.
      devices: 1 or 4, with global statistics.
      norm: jax_bn or flax.
    """

    network: str
    step: str
    dtype: str
    card: str
    devices: int
    norm: str


def devices(card: str, count: int) -> Mesh:
    """A mesh of devices that are not here. The plugin that compiles for them must be installed."""
    if card == "v5e":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    else:
        target = H100.read_text()
        topology = topologies.get_topology_desc("h100", "cuda", target_config=target, topology=f"1x1x{count}")
    return Mesh(np.asarray(topology.devices[:count]), (AXIS,), axis_types=(AxisType.Auto,))


def lowered(program: Program) -> Any:
    """The program, ready to be compiled."""
    mesh = devices(program.card, program.devices)
    make = _blenet if program.network == "BLeNet" else _resnet
    norm = partial(jax_bn.BatchNorm if program.norm == "jax_bn" else nn.BatchNorm, momentum=0.9, epsilon=1e-5)
    step, arguments, specs, donated = make(program, norm, mesh)
    placed = tuple(
        jax.tree.map(
            lambda v, spec=spec: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, spec)), tree
        )
        for tree, spec in zip(arguments, specs, strict=True)
    )
    return (
        on_mesh(step, mesh, specs, donate_argnums=donated)
        .trace(*placed)
        .lower(lowering_platforms=(PLATFORMS[program.card],))
    )


Made = tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...], tuple[int, ...]]


def _blenet(program: Program, norm: Norm, mesh: Mesh) -> Made:
    """(the step, its arguments' shapes, where they are, those that are given up)."""
    size, axis = BLENET_IMAGES * mesh.size, axis_of(mesh)
    config = Config(batch_size=size).resolved()
    model = jax_bn.BLeNet(
        num_class=NUM_CLASS, axis_name=axis, dtype=_dtype(program.dtype), platform=PLATFORMS[program.card]
    )
    optimizer = training.make_optimizer(config, 60_000 // size)

    def other_norm(*, initial_moving_var: float, platform: str | None, **options: Any) -> nn.Module:
        return nn.BatchNorm(**options)

    # All else as BLeNet has it.
    blenet = importlib.import_module("jax_bn.blenet")
    swapped = patch.object(blenet, "BatchNorm", jax_bn.BatchNorm if program.norm == "jax_bn" else other_norm)

    def train_batch(state: Any, x: Any, labels: Any) -> Any:
        with swapped:
            smoothing = config.label_smoothing
            return training.train_step(model, optimizer, state, x, labels, label_smoothing=smoothing, axis_name=axis)

    def eval_batch(variables: Any, x: Any, labels: Any) -> Any:
        with swapped:
            return training.eval_step(model, variables, x, labels, jnp.ones(len(labels)), axis_name=axis)

    with swapped:
        alone = model.clone(axis_name=None)
        state = jax.eval_shape(partial(training.init_state, alone, optimizer, 0))
    x, labels = _images(size, 28, 1, "float32"), jax.ShapeDtypeStruct((size,), jnp.int32)
    if program.step == "train":
        return train_batch, (state, x, labels), (SAME, SHARE, SHARE), (0,)
    return eval_batch, (state.variables, x, labels), (SAME, SHARE, SHARE), ()


def _resnet(program: Program, norm: Norm, mesh: Mesh) -> Made:
    """The same of ResNet-50, with SGD."""
    size, axis = RESNET_IMAGES * mesh.size, axis_of(mesh)
    dtype = _dtype(program.dtype) or jnp.float32
    model = ResNet50(partial(norm, dtype=dtype, axis_name=axis), dtype)
    optimizer = optax.sgd(0.1, momentum=0.9, nesterov=True)

    def train_batch(state: Any, x: Any, labels: Any) -> Any:
        params, batch_stats, opt_state = state

        def loss_of(params: Any) -> Any:
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = model.apply(variables, x, True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss if axis is None else lax.pmean(loss, axis), updated["batch_stats"]

        (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

    def eval_batch(variables: Any, x: Any, labels: Any) -> Any:
        logits: Any = model.apply(variables, x, False)
        correct = (logits.argmax(-1) == labels).sum()
        return correct if axis is None else lax.psum(correct, axis)

    def init(key: Any) -> Any:
        alone = ResNet50(partial(norm, dtype=dtype), dtype)
        variables = alone.init(key, jnp.zeros((2, 224, 224, 3), dtype), True)
        return variables["params"], variables["batch_stats"], optimizer.init(variables["params"])

    state = jax.eval_shape(init, jax.random.key(0))
    x, labels = _images(size, 224, 3, program.dtype), jax.ShapeDtypeStruct((size,), jnp.int32)
    if program.step == "train":
        return train_batch, (state, x, labels), (SAME, SHARE, SHARE), (0,)
    return eval_batch, ({"params": state[0], "batch_stats": state[1]}, x, labels), (SAME, SHARE, SHARE), ()


def _dtype(name: str) -> Any:
    return None if name == "float32" else jnp.dtype(name)


def _images(count: int, side: int, channels: int, dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, side, side, channels), jnp.dtype(dtype))


class Block(nn.Module):
    """ResNet's bottleneck (He et al. 2015, section 4.1), the stride in the 3x3 convolution."""

    norm: Norm
    dtype: Any
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """[N, H, W, C] -> [N, H / stride, W / stride, 4 features]."""
        norm = partial(self.norm, use_running_average=not train)
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), self.stride)(y)))
        y = norm(scale_init=nn.initializers.zeros_init())(conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.features, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50 (He et al. 2015): the network that batch norm's price is usually told of."""

    norm: Norm
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Logits [N, 1000] of images [N, H, W, 3]."""
        x = nn.Conv(64, (7, 7), 2, use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(self.norm(use_running_average=not train)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                x = Block(self.norm, self.dtype, 64 * 2**stage, 2 if stage and not block else 1)(x, train)
        return nn.Dense(1000, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)
