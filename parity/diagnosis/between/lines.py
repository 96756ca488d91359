"""Code for what was fitted between two layers: an activation, a pool, each in both frameworks."""

from __future__ import annotations

import re

from parity.diagnosis.between.pools import Axis, Pool
from parity.diagnosis.fixes import Fix

_ACTIVATIONS = (
    ("identity", "x", "x"),
    ("ReLU", "F.relu(x)", "jax.nn.relu(x)"),
    ("exact GELU", "F.gelu(x)", "jax.nn.gelu(x, approximate=False)"),
    ("tanh approximation of GELU", 'F.gelu(x, approximate="tanh")', "jax.nn.gelu(x, approximate=True)"),
    ("SiLU", "F.silu(x)", "jax.nn.silu(x)"),
    ("sigmoid", "torch.sigmoid(x)", "jax.nn.sigmoid(x)"),
    ("tanh", "torch.tanh(x)", "jnp.tanh(x)"),
    ("leaky ReLU with slope {}", "F.leaky_relu(x, {})", "jax.nn.leaky_relu(x, {})"),
    ("ReLU6", "F.relu6(x)", "jax.nn.relu6(x)"),
    ("ELU", "F.elu(x)", "jax.nn.elu(x)"),
    ("ELU with alpha {}", "F.elu(x, {})", "jax.nn.elu(x, {})"),
    ("CELU with alpha {}", "F.celu(x, {})", "jax.nn.celu(x, {})"),
    ("SELU", "F.selu(x)", "jax.nn.selu(x)"),
    ("softplus", "F.softplus(x)", "jax.nn.softplus(x)"),
    ("softplus with beta {}", "F.softplus(x, {})", "jax.nn.softplus({0} * x) / {0}"),
    ("hard swish", "F.hardswish(x)", "jax.nn.hard_swish(x)"),
    ("hard sigmoid", "F.hardsigmoid(x)", "jax.nn.hard_sigmoid(x)"),
    ("hard tanh", "F.hardtanh(x)", "jax.nn.hard_tanh(x)"),
    ("mish", "F.mish(x)", "jax.nn.mish(x)"),
    ("quick GELU x*sigmoid(1.702 x)", "x * torch.sigmoid(1.702 * x)", "x * jax.nn.sigmoid(1.702 * x)"),
    ("SiLU x*sigmoid({} x)", "x * torch.sigmoid({} * x)", "x * jax.nn.sigmoid({} * x)"),
    ("log-sigmoid", "F.logsigmoid(x)", "jax.nn.log_sigmoid(x)"),
    ("softsign", "F.softsign(x)", "jax.nn.soft_sign(x)"),
    ("squared ReLU", "F.relu(x) ** 2", "jax.nn.relu(x) ** 2"),
    ("square", "x**2", "x**2"),
    ("absolute value", "x.abs()", "jnp.abs(x)"),
    ("sine", "torch.sin(x)", "jnp.sin(x)"),
)
"""As `activations.FUNCTIONS` and its families are called, in PyTorch, in JAX; what is not here has no line."""


def activation_fix(torch: str, flax: str) -> Fix | None:
    """The lines of two activations, by their names."""
    return _crossed(_activation(torch), _activation(flax))


def _activation(name: str) -> tuple[str, str] | None:
    for pattern, *lines in _ACTIVATIONS:
        if found := re.fullmatch(re.escape(pattern).replace(r"\{\}", r"([-+\d.e]+)"), name):
            torch, flax = (line.format(*found.groups()) for line in lines)
            return torch, flax
    return None


def pool_fix(torch: Pool, flax: Pool) -> Fix | None:
    """The lines of two pools."""
    return _crossed(_pool(torch), _pool(flax))


def _pool(pool: Pool) -> tuple[str, str] | None:
    """One pool in both; None where either has no arguments for it."""
    rank = len(pool.axes)
    if pool.kind not in ("max", "average") or any(axis.adaptive for axis in pool.axes) or rank > 3:
        return None
    ends = [(low, high) for low, high in pool.padding]
    if pool.window == pool.sizes and not any(map(any, ends)):
        axes = {"max": ("amax", "max"), "average": ("mean", "mean")}[pool.kind]
        first, last = tuple(range(2, 2 + rank)), tuple(range(1, 1 + rank))
        return f"x.{axes[0]}({first})", f"x.{axes[1]}({last})"
    if pool.counted == "explicit" or (pool.kind == "max" and pool.counted == "yes"):
        return None
    # PyTorch pads both ends alike, by half a window at most; what its windows do not touch behind is no difference.
    ends = [_alike(axis, size, *pair) for axis, size, pair in zip(pool.axes, pool.sizes, ends, strict=True)]
    name, padded = {"max": "max", "average": "avg"}[pool.kind], any(map(any, ends))
    in_front = any(low != high or 2 * low > n for (low, high), n in zip(ends, pool.window, strict=True))
    x, torch = "x", [str(_short(pool.window)), f"stride={_short(pool.stride)}"]
    if in_front:
        if pool.kind == "average" and pool.counted == "no":
            return None
        value = ", value=-torch.inf" if pool.kind == "max" else ""
        x = f"F.pad(x, {tuple(n for pair in reversed(ends) for n in pair)}{value})"
    elif padded:
        torch.append(f"padding={_short(tuple(low for low, _ in ends))}")
    flax = [str(pool.window), f"strides={pool.stride}", *([f"padding={tuple(ends)}"] if padded else [])]
    counted = [f"count_include_pad={pool.counted == 'yes'}"] if pool.kind == "average" and padded else []
    return (
        f"F.{name}_pool{rank}d({', '.join([x, *torch, *([] if in_front else counted)])})",
        f"nnx.{name}_pool(x, {', '.join(flax + counted)})",
    )


def _alike(axis: Axis, size: int, low: int, high: int) -> tuple[int, int]:
    """The padding with as much behind as before, if that leads to as many outputs."""
    outputs = (size + 2 * low - axis.window) // axis.stride + 1
    return (low, low) if high <= low and outputs == axis.outputs else (low, high)


def _short(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _crossed(torch: tuple[str, str] | None, flax: tuple[str, str] | None) -> Fix | None:
    """Of each framework the line as it is, and that of what the other does."""
    if torch is None or flax is None or torch == flax:
        return None
    return Fix((torch[0], flax[0]), (flax[1], torch[1]))
