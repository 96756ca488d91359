"""Products as PyTorch and as JAX compute them, with a kernel that may be another than the one held; for the tests."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from parity.diagnosis.product.fits import ProductSide

LETTERS = ("", "W", "HW", "DHW")
WINGS = ("torch", "flax")


def _to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def _to_numpy(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def torch_side(kind, x, kernel, bias, applied=None, *, dtype=np.float64, hints=True, **options):
    """What PyTorch does; `applied` is used in place of the kernel, `add_bias=False` leaves the bias out."""
    rank, applied = x.ndim - 2, np.array(kernel if applied is None else applied, dtype)
    add_bias = options.pop("add_bias", True)
    mode = options.pop("padding_mode", "zeros")
    values = x.astype(dtype)
    added = torch.from_numpy(bias.astype(dtype)) if bias is not None and add_bias else None
    if kind == "linear":
        weight = torch.from_numpy(applied).requires_grad_()
        inputs = torch.from_numpy(values).requires_grad_()
        y = torch.nn.functional.linear(inputs, weight.T, added)
        dy = torch.from_numpy(np.random.default_rng(7).normal(size=y.shape).astype(dtype))
        dx, dkernel = torch.autograd.grad(y, (inputs, weight), dy)
        arrays = [a.detach().numpy() for a in (y, dy, dx, dkernel)]
    else:
        used = applied
        order = (rank + 1, rank, *range(rank)) if kind == "conv" else (rank, rank + 1, *range(rank))
        if kind == "conv_transpose":  # Flax's convention: correlated with the kernel, which is PyTorch's flipped
            used = np.flip(applied, tuple(range(rank)))
        weight = torch.from_numpy(used.transpose(order).copy()).requires_grad_()
        inputs = _to_torch(values).requires_grad_()
        padded, call = inputs, dict(options)
        if mode != "zeros":
            p = call.pop("padding")
            padded = torch.nn.functional.pad(inputs, (p, p) * rank, mode=mode)
        name = f"conv{'_transpose' if kind == 'conv_transpose' else ''}{rank}d"
        y = getattr(torch.nn.functional, name)(padded, weight, added, **call)
        dy = torch.from_numpy(np.random.default_rng(7).normal(size=y.shape).astype(dtype))
        dx, of_weight = torch.autograd.grad(y, (inputs, weight), dy)
        of_kernel = of_weight.numpy().transpose(np.argsort(order))
        if kind == "conv_transpose":
            of_kernel = np.flip(of_kernel, tuple(range(rank)))
        arrays = [_to_numpy(y), _to_numpy(dy), _to_numpy(dx), of_kernel]
    config = {**options, "padding_mode": mode} if hints else {}
    return _side(x, kernel, bias, arrays, applied, config)


def flax_side(kind, x, kernel, bias, applied=None, *, dtype=np.float64, hints=True, **options):
    """What Flax does, with `stride`, `padding` (as JAX takes it), `dilation`, `groups`."""
    applied = np.array(kernel if applied is None else applied, dtype)
    add_bias = options.pop("add_bias", True)

    added = bias if add_bias else None
    same = {name: options[name] for name in ("stride", "padding", "dilation", "groups") if name in options}
    same = {name: tuple(map(tuple, v)) if isinstance(v, list) else v for name, v in same.items()}
    product = partial(_product, kind, tuple(same.items()))
    given = jnp.asarray(x, dtype), jnp.asarray(applied), None if added is None else jnp.asarray(added, dtype)
    shape = jax.eval_shape(product, *given).shape
    dy = np.random.default_rng(7).normal(size=shape).astype(dtype)
    y, dx, dkernel = _product_and_gradients(kind, tuple(same.items()), *given, jnp.asarray(dy))
    arrays = [np.asarray(a) for a in (y, dy, dx, dkernel)]
    return _side(x, kernel, bias, arrays, applied, options if hints else {})


def _product(kind, options, values, weights, bias):
    rank, options = values.ndim - 2, dict(options)
    if kind == "linear":
        y = values @ weights
    else:
        strides = _per_axis(options.get("stride", 1), rank)
        dilation = _per_axis(options.get("dilation", 1), rank)
        padding = options.get("padding", 0)
        padding = [(padding, padding)] * rank if isinstance(padding, int) else padding
        letters = LETTERS[rank]
        numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
        if kind == "conv":
            y = lax.conv_general_dilated(
                values,
                weights,
                strides,
                padding,
                rhs_dilation=dilation,
                dimension_numbers=numbers,
                feature_group_count=options.get("groups", 1),
            )
        else:
            y = lax.conv_transpose(values, weights, strides, padding, rhs_dilation=dilation, dimension_numbers=numbers)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


@partial(jax.jit, static_argnums=(0, 1))
def _product_and_gradients(kind, options, values, weights, bias, dy):
    """One program for the three, and for all arrays of these shapes."""
    y, pull = jax.vjp(lambda x, w: _product(kind, options, x, w, bias), values, weights)
    return y, *pull(dy)


def _side(x, kernel, bias, arrays, applied, config):
    y, dy, dx, dkernel = arrays
    # With another kernel than the one held, its gradient belongs to another array: it is left out.
    held = dkernel if np.array_equal(applied, kernel.astype(applied.dtype)) else None
    return ProductSide(x, y, kernel, bias, dy, dx, held, config)


def _per_axis(value, rank):
    return (value,) * rank if isinstance(value, int) else tuple(value)
