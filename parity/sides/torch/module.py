"""A PyTorch module as the bridge runs it: a copy, lifted, without dropout; its loss and weights."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity.records import trees
from parity.records.kinds import MADE_OF, path_rate
from parity.records.side import LARGE, check_loss, loss_weights
from parity.sides.exchange import exchanged

COUNTER = "num_batches_tracked"


def lifted(module: nn.Module, *, float64: bool) -> nn.Module:
    """A copy of the module, in float64 on the CPU if that is asked for. The module itself stays as it is."""
    module = copied(module)
    return module.cpu().double() if float64 else module


def copied(module: nn.Module) -> nn.Module:
    """A copy; of what a run has left in it, as `torch.nn.utils.weight_norm` leaves its weight, the numbers alone."""
    left = [v for child in module.modules() for v in vars(child).values() if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(module, {id(v): v.detach().clone() for v in left})


def parametrised(module: nn.Module) -> dict[str, str]:
    """The tensors that a module makes its own of, as `torch.nn.utils.parametrize` has it: local name -> name within it.

    Those of a weight norm are weight_g and weight_v, as in the older `torch.nn.utils.weight_norm`; of all others the
    names begin with `kinds.MADE_OF`, as only the module knows what it makes of them.
    """
    if not nn.utils.parametrize.is_parametrized(module):
        return {}
    every: Any = module.parametrizations
    found = {f"{name}.{n}": f"parametrizations.{name}.{n}" for name, steps in every.items() for n in _floating(steps)}
    normed = [n for n, steps in every.items() if len(steps) == 1 and type(steps[0]).__name__ == "_WeightNorm"]
    letters = {f"{name}.original{i}": f"{name}_{letter}" for name in normed for i, letter in enumerate("gv")}
    return {letters.get(name, f"{MADE_OF}{name}"): full for name, full in found.items()}


def _floating(module: nn.Module) -> list[str]:
    return [n for n, v in (*module.named_parameters(), *module.named_buffers()) if v.is_floating_point()]


def frozen_tables(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that are not trained and may be a table, which the other side has in its code: they stay as they are.

    Those of embeddings and of modules that are not PyTorch's own.
    """
    return {
        f"{path}.{local}" if path else local: p
        for path, child in module.named_modules()
        if isinstance(child, nn.Embedding) or not type(child).__module__.startswith("torch.nn")
        for local, p in child.named_parameters(recurse=False, remove_duplicate=False)
        if not p.requires_grad
    }


def changed(module: nn.Module, change: Callable[[NDArray, int, float], NDArray]) -> nn.Module:
    """A copy of the module whose floating parameters are change(parameter, its number, its dtype's eps)."""
    module = copied(module)
    with torch.no_grad():
        tables = frozen_tables(module)
        for i, (name, p) in enumerate(module.named_parameters()):
            if p.is_floating_point() and name not in tables:
                p.copy_(torch.from_numpy(change(numpy(p), i, torch.finfo(p.dtype).eps)))
    return module


def randomised(module: nn.Module) -> nn.Module:
    """A copy of the module in float64 with other weights, such as no symmetry leaves alike; the same each time."""
    module, random = lifted(module, float64=True), torch.Generator().manual_seed(20150211)
    with torch.no_grad():
        tables = frozen_tables(module)
        for name, p in module.named_parameters():
            if p.is_floating_point() and name not in tables:
                noise = torch.randn(p.shape, generator=random, dtype=p.dtype)
                p.copy_(noise / (p.numel() / len(p)) ** 0.5 if p.ndim > 1 else p + 0.3 * noise)
        for name, v in module.named_buffers():
            if name.rpartition(".")[2] == "running_mean":
                v.add_(0.3 * torch.randn(v.shape, generator=random, dtype=v.dtype))
            elif name.rpartition(".")[2] == "running_var":
                v.mul_(0.5 + torch.rand(v.shape, generator=random, dtype=v.dtype))
    return module


def numbers(output: Any) -> list[tuple[str, Tensor]]:
    """The tensors and numbers of an output with the names that they stand under, see `records.trees`."""
    found = [(trees.name_of(path), v) for path, v in trees.leaves(output)]
    return [(n, torch.as_tensor(v)) for n, v in found if is_tensor(v) or isinstance(v, bool | int | float | complex)]


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor."""
    return isinstance(value, Tensor)


def loss_of(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    """The user's loss, or the default one."""
    total = default_loss(output) if loss is None else loss(output)
    check_loss(total, "PyTorch")
    return total


def default_loss(output: Any) -> Tensor:
    """See `records.side.loss_weights`."""
    total: Tensor = torch.zeros(())
    for _, y in numbers(output):
        y = torch.view_as_real(y.resolve_conj()) if y.is_complex() else y
        if not y.numel() or not y.is_floating_point():
            continue
        y = torch.where(y.isfinite(), y, 0)  # a mask's infinity
        rows = (y / (y.detach().abs().max() / LARGE).clamp(min=1)).reshape(len(y) if y.ndim else 1, -1)
        total = total + (torch.from_numpy(loss_weights(len(rows))).to(y) * (rows + 1).sin().sum(1)).sum()
    return total


def numpy(tensor: Tensor) -> NDArray:
    """A copy as numpy has it; half types as float32, which holds them exactly."""
    return np.array(as_numpy(tensor))


def as_numpy(tensor: Tensor) -> NDArray:
    """The same without a copy where it can be: for what nobody else will write into."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


@contextlib.contextmanager
def without_dropout(
    module: nn.Module, *, train: bool, told: Callable[[float], object] = lambda _: None
) -> Iterator[None]:
    """Dropout is the identity, wherever it is active: as a module, as a function and inside of attention.

    The module is changed: give a copy.

    Args:
      module: it and what it calls.
      train: in prediction a module's dropout is active only where it says so.
      told: is told the rate of every dropout that is switched off.
    """
    if train:
        for child in module.modules():
            if isinstance(child, nn.modules.dropout._DropoutNd):
                child.p = 0.0
            if isinstance(child, nn.MultiheadAttention):
                child.dropout = 0.0
            if path_rate(child) is not None:
                child.forward = _as_it_is

    def without(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def same(*args: Any, **kwargs: Any) -> Tensor:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            if given.arguments["training"] and given.arguments["p"]:
                told(given.arguments["p"])
            x: Tensor = given.arguments["input"]
            return x

        return same

    def without_attention(function: Callable) -> Callable:
        @functools.wraps(function)
        def attention(query, key, value, attn_mask=None, dropout_p=0.0, *args, **kwargs):
            if dropout_p:
                told(dropout_p)
            return function(query, key, value, attn_mask, 0.0, *args, **kwargs)

        return attention

    names = [name for name in dir(nn.functional) if name.endswith("dropout") or name.startswith("dropout")]
    functions = {getattr(nn.functional, name): without for name in names}
    with exchanged({**functions, nn.functional.scaled_dot_product_attention: without_attention}):
        yield


def not_compiled(module: nn.Module) -> contextlib.AbstractContextManager:
    """Where a part of it went through `torch.compile`, that is run as it is: hooks would see nothing of it."""
    is_compiled = any(hasattr(child, "_orig_mod") for child in module.modules())
    # Only then: it imports the compiler, for a second.
    return torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()


class SetsRequiresGrad(TorchFunctionMode):
    """While it is entered, a module may say that what it is given needs a gradient.

    PyTorch allows that of leaves alone, as the inputs of training are; here these need a gradient already, and what is
    made of them is no leaf.
    """

    REFUSED = "you can only change requires_grad flags of leaf variables"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function as it is, but for that."""
        is_set = func == Tensor.requires_grad.__set__  # type: ignore[attr-defined]
        if is_set and args[0].requires_grad and not args[0].is_leaf and args[1]:
            return None
        return func(*args, **(kwargs or {}))


def to_dtype(module: nn.Module, dtype: str) -> None:
    """Convert floating parameters and buffers to "float32" or "float64", in place.

    `module.to` would make real numbers of complex ones.
    """
    {"float32": module.float, "float64": module.double}[dtype]()


def _as_it_is(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def dropout_rates(module: nn.Module) -> set[float]:
    """The rates above 0 of the dropouts that are modules in it, of its attention and of its dropped paths."""
    found = {m.p for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)}
    found |= {rate for m in module.modules() if (rate := path_rate(m)) is not None}
    return (found | {m.dropout for m in module.modules() if isinstance(m, nn.MultiheadAttention)}) - {0.0}


def load_state(module: nn.Module, arrays: Mapping[str, NDArray], name: str) -> None:
    """Load a state_dict, strictly.

    Raises:
      ValueError: names or shapes that are not the module's.
    """
    state = module.state_dict()
    missing = [n for n in state if n not in arrays and n.rpartition(".")[2] != COUNTER]
    unknown = [n for n in arrays if n not in state]
    wrong = [n for n, a in arrays.items() if n in state and tuple(a.shape) != tuple(state[n].shape)]
    if missing or unknown or wrong:
        problems = [
            *(f"lacks {n}" for n in missing),
            *(f"has {n}, too" for n in unknown),
            *(f"has {n} of another shape" for n in wrong),
        ]
        raise ValueError(f"--weights {name} {', '.join(problems)}; allowed: those of this module")
    given = {n: a.astype("float32") if a.dtype.name == "bfloat16" else a for n, a in arrays.items()}  # exactly
    module.load_state_dict({n: torch.as_tensor(a).to(state[n].dtype) for n, a in given.items()}, strict=False)


def put(module: nn.Module, arrays: Mapping[str, NDArray]) -> None:
    """Write these tensors into the module, where they fit."""
    with torch.no_grad():
        state = module.state_dict()
        for name, value in arrays.items():
            if tuple(value.shape) == tuple(state[name].shape):
                state[name].copy_(torch.from_numpy(value))


def raised_in(module: nn.Module, error: BaseException) -> str:
    """The innermost module in whose call it was raised, by the frames that it came through; "" is the root."""
    paths = {id(child): path for path, child in module.named_modules()}
    found = [paths.get(id(frame.f_locals.get("self"))) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((path for path in reversed(found) if path is not None), "")


def versions() -> dict[str, str]:
    """Of the framework."""
    return {"torch": torch.__version__}
