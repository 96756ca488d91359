"""Runs a PyTorch module and records every layer. Never imports jax."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from parity.records import trees
from parity.records.constructors import given_to
from parity.records.inputs import Inputs
from parity.records.kinds import FROZEN, IN_OUT, PRODUCTS, class_names, kind_of
from parity.records.recording import Call, Failure, GlueCall, Layer, Recording
from parity.sides.torch.module import (
    COUNTER,
    SetsRequiresGrad,
    as_numpy,
    dropout_rates,
    is_tensor,
    lifted,
    loss_of,
    not_compiled,
    numbers,
    numpy,
    parametrised,
    raised_in,
    without_dropout,
)
from parity.sides.torch.precision import Rounds, default_dtype

LOG = logging.getLogger(__name__)
CONFIG = ("stride", "padding", "dilation", "groups", "output_padding", "padding_mode", "eps", "momentum", "num_groups")


def own_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's parameters, by the first; the default one where it has none."""
    floating = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(floating, torch.get_default_dtype())


def layers_of(module: nn.Module) -> dict[str, Layer]:
    """The modules with tensors of their own. Attention counts as one layer, its projections with it."""
    layers: dict[str, Layer] = {}
    inside: list[str] = []
    for path, child in module.named_modules():
        if any(path.startswith(prefix) for prefix in inside):
            continue
        own, made_of = _tensors(child, recurse=False), parametrised(child)
        if made_of:
            own |= {name: _tensors(child, recurse=True)[local] for name, local in made_of.items()}
            inside.append(f"{path}.parametrizations." if path else "parametrizations.")
        names = class_names(type(child))
        statistics = frozenset(name for name in own if not isinstance(own[name], nn.Parameter))
        kind = kind_of(names, {name: tuple(v.shape) for name, v in own.items()}, statistics)
        if kind == "attention":
            own = _tensors(child, recurse=True)
            inside.append(f"{path}." if path else "")
        if not own:
            continue
        children = [
            grandchild for name, grandchild in child.named_children() if not (made_of and name == "parametrizations")
        ]
        below = any(_tensors(grandchild, recurse=True) for grandchild in children) and kind != "attention"
        config = {name: getattr(child, name, None) for name in CONFIG}
        config = {name: value for name, value in config.items() if isinstance(value, int | float | str | tuple)}
        config |= given_to(child, torch=nn)
        if kind == "linear" and type(child).forward is not nn.Linear.forward and _is_in_out(child, own):
            config[IN_OUT] = True
        if frozen := tuple(name for name, v in own.items() if isinstance(v, nn.Parameter) and not v.requires_grad):
            config[FROZEN] = frozen
        layers[path] = Layer(
            path,
            kind,
            type(child).__name__,
            {name: f"{path}.{made_of.get(name, name)}" if path else made_of.get(name, name) for name in own},
            statistics,
            config,
            is_called=not below,
        )
        layers[path].is_called &= not layers[path].is_constant
    return layers


def _is_in_out(module: nn.Module, own: dict[str, Tensor]) -> bool:
    """Whether a hand-written linear layer keeps its matrix as [in, out], by what it makes of random numbers."""
    matrices = [name for name, v in own.items() if v.ndim == 2]
    if len(matrices) != 1:
        return False
    random = torch.Generator().manual_seed(0)
    try:
        module = copy.deepcopy(module).cpu().double().eval()
        with torch.no_grad(), default_dtype(torch.float64):
            tensors = {
                name: v.copy_(torch.randn(v.shape, generator=random))
                for name, v in _tensors(module, recurse=False).items()
            }
            matrix, shift = tensors.pop(matrices[0]), sum(tensors.values())
            x = torch.randn(3, len(matrix), generator=random)
            _, y = trees.first(module(x), is_tensor) or ((), torch.zeros(()))
            return torch.allclose(y, x @ matrix + shift, rtol=1e-9, atol=1e-9)
    except Exception as error:  # whatever a stranger's module raises: then it is no such layer
        LOG.info("%s takes no [3, %d]: %s", type(module).__name__, len(own[matrices[0]]), error)
        return False


def _tensors(module: nn.Module, *, recurse: bool) -> dict[str, Tensor]:
    """Floating parameters and buffers by name; counters and index tables are neither."""
    # A tensor that two layers share has two names.
    named = [
        *module.named_parameters(recurse=recurse, remove_duplicate=False),
        *module.named_buffers(recurse=recurse, remove_duplicate=False),
    ]
    return {name: v for name, v in named if v.is_floating_point() and name.rpartition(".")[2] != COUNTER}


def record(module: nn.Module, inputs: Inputs | Sequence[Any], **options: Any) -> Recording:
    """Run a copy of the module forward and backward, and record every layer: see `_record`."""
    found = _record(module, inputs, **options)
    if found.failure is not None and SetsRequiresGrad.REFUSED in found.failure.error:
        return _record(module, inputs, sets_requires_grad=True, **options)
    return found


def _record(
    module: nn.Module,
    inputs: Inputs | Sequence[Any],
    *,
    train: bool,
    float64: bool = True,
    loss: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    nudge: float = 0.0,
    sets_requires_grad: bool = False,
) -> Recording:
    """Run a copy of the module forward and backward, and record every layer.

    Args:
      module: any module; it stays as it is.
      inputs: in PyTorch's layout; floating ones in float64 if that is asked for, else in the module's own dtype.
      train: train or eval mode. In training, dropout is switched off.
      float64: lift the module and its inputs.
      loss: of the output; None: the default one.
      seed: of the random numbers in the run (an active dropout).
      nudge: every parameter is changed by this much of its size, up or down.
      sets_requires_grad: see `SetsRequiresGrad`.

    Returns:
      The recording; without gradients where the output has none. As far as it went, where the module raises.
    """
    module = lifted(module, float64=float64).train(train)
    layers = layers_of(module)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
            if nudge:
                signs = torch.arange(parameter.numel()).reshape(parameter.shape) % 2 * 2 - 1
                # In the parameter's dtype: a float times integers is float32, whose rounding would be measured then.
                parameter.data *= 1 + nudge * signs.to(parameter)
    device = next((v.device for v in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    called = Inputs.of(inputs)
    given = [torch.tensor(a, device=device) for a in called.arrays()]
    own = torch.float64 if float64 else own_dtype(module)
    # A module refuses what is of another dtype than its parameters.
    given = [v.to(own) if v.is_floating_point() else v for v in given]
    given = [v.requires_grad_(v.is_floating_point()) for v in given]
    called = called.filled(given)
    recording = Recording("torch", layers, inputs=[numpy(v) for v in given])
    recording.tensors = _named(module, recording.layers)
    rates = dropout_rates(module)
    recording.dropout_off = train and bool(rates)
    watch = _Watch(module, recording)
    dropouts: list[tuple[float, int]] = []
    with (
        torch.random.fork_rng(devices=[]),
        default_dtype(own),
        without_dropout(module, train=train, told=lambda rate: dropouts.append((rate, len(recording.calls)))),
        not_compiled(module),
        SetsRequiresGrad() if sets_requires_grad else contextlib.nullcontext(),
        watch,
    ):
        torch.manual_seed(seed)
        try:
            output = module(*called.args, **called.keywords)
        except Exception as error:  # whatever a stranger's module raises
            recording.failure = Failure.of(error, watch.active[-1] if watch.active else raised_in(module, error))
            return recording
        recording.dropout_off = recording.dropout_off or (train and bool(dropouts))
        recording.dropout_rates = frozenset(rates | {rate for rate, _ in dropouts}) if train else None
        recording.dropouts = [] if train else [*dropouts]  # a checkpoint's second call of a layer tells it again
        # Copies: of an output that another output is made of, only the loss's own gradient counts.
        output = trees.mapped(lambda _, v: v.clone() if isinstance(v, Tensor) else v, output)
        named = numbers(output)
        leaves = [v for _, v in named]
        recording.outputs, recording.output_names = [numpy(v) for v in leaves], [name for name, _ in named]
        for leaf in leaves:
            if leaf.requires_grad:
                leaf.retain_grad()
        with Rounds() as rounds:
            total = loss_of(output, loss)
        recording.rounds_outputs = float64 and any(v.is_floating_point() and v.dtype != torch.float64 for v in leaves)
        recording.rounds_loss = rounds.seen and float64
        recording.loss = total.item() if isinstance(total, Tensor) else float(total)
        watch.is_over = True
        if isinstance(total, Tensor) and total.requires_grad:
            try:
                total.backward()
            except Exception as error:  # as above
                recording.failure = Failure.of(error, phase="backward")
                for call in recording.calls:
                    call.input_gradients = [None] * len(call.inputs)
    if recording.failure is None:
        recording.output_gradients = [_grad(v) if v.is_floating_point() else None for v in leaves]
        recording.input_gradients = [_grad(v) if v.is_floating_point() else None for v in given]
        watch.gradients()
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for layer in recording.layers.values():
            for local, full in layer.tensors.items():
                if local not in layer.statistics:
                    recording.gradients[full] = _grad(parameters[full])
    after = _tensors(module, recurse=True)
    recording.new_statistics = {
        layer.tensors[name]: numpy(after[layer.tensors[name]])
        for layer in recording.layers.values()
        for name in layer.statistics
    }
    return recording


def products(module: nn.Module, own: Recording, *, train: bool) -> tuple[dict[tuple[str, int], NDArray], list[str]]:
    """The outputs of the layers that multiply, in float64, on the inputs that they had in a run of another dtype.

    Returns:
      (layer, call) -> output; and a note of each layer that could not be run so.
    """
    found: dict[tuple[str, int], NDArray] = {}
    notes: list[str] = []
    for call in own.calls:
        if own.layers[call.path].kind in (*PRODUCTS, "other"):
            # One by one: all of a large network, once more and in float64, may be more than there is.
            exact = lifted(module.get_submodule(call.path), float64=True).train(train)
            with torch.no_grad(), default_dtype(torch.float64), without_dropout(exact, train=train):
                given = [torch.tensor(a).double() if a.dtype.kind == "f" else torch.tensor(a) for a in call.inputs]
                try:
                    y = exact(*given)
                except Exception as error:  # whatever a stranger's module raises
                    notes.append(f"the precision of {call.path} was not looked at: {Failure.of(error).error}")
                    continue
            if (found_y := trees.first(y, is_tensor)) is not None:
                found[call.key] = numpy(found_y[1])
    return found, notes


def _grad(tensor: Tensor) -> NDArray:
    return np.zeros(tuple(tensor.shape)) if tensor.grad is None else as_numpy(tensor.grad)


def _named(module: nn.Module, layers: dict[str, Layer]) -> dict[str, NDArray]:
    """Of a module of this run's own; a forward writes into buffers, not into parameters."""
    tensors = _tensors(module, recurse=True)

    def array(tensor: Tensor) -> NDArray:
        return as_numpy(tensor) if isinstance(tensor, nn.Parameter) else numpy(tensor)

    return {
        full: array(tensors[full]) for layer in layers.values() for full in layer.tensors.values() if full in tensors
    }


class _Watch(contextlib.ExitStack):
    """While it is entered, every call goes into the recording.

    `torch.utils.checkpoint` calls its layers once more in the backward pass. That is no call of the network's, but
    where it is reentrant, the first call had no gradients, and those of the second are the call's.

    Attributes:
      is_over: the forward pass is done.
      active: the layers whose calls are not done.
    """

    is_over = False

    def __init__(self, module: nn.Module, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self.kept: list[tuple[Call, list[Tensor], Tensor]] = []
        self.pending: list[list[Tensor]] = []
        self.counts: dict[str, int] = {}
        self.active: list[str] = []
        called = {path for path, layer in recording.layers.items() if layer.is_called}
        for path, child in module.named_modules():
            if path in called:
                self._add(child.register_forward_pre_hook(self._before(path), with_kwargs=True))
                self._add(child.register_forward_hook(self._after(path), with_kwargs=True))
            elif not list(child.children()) and not isinstance(child, nn.Identity):
                attention = any(path.startswith(f"{p}.") for p in called)
                if not attention:
                    self._add(child.register_forward_hook(self._glue(path), with_kwargs=True))

    def _add(self, handle: Any) -> None:
        self.callback(handle.remove)

    def _is_repeated(self, path: str) -> bool:
        """Whether a call of this layer has had no gradients."""
        return any(call.path == path and not y.requires_grad for call, _, y in self.kept)

    def _repeats(self, path: str, inputs: Sequence[NDArray]) -> int:
        """Which of these calls it was, by what came in: the last part of a network is called again first."""
        calls = [(i, call) for i, (call, _, y) in enumerate(self.kept) if call.path == path and not y.requires_grad]
        same = (i for i, call in calls if all(np.array_equal(a, b) for a, b in zip(call.inputs, inputs, strict=False)))
        return next(same, calls[0][0])

    def _before(self, path: str) -> Callable:
        """Gives the layer copies of its own, so that their gradients are those through this layer only."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if self.is_over and not self._is_repeated(path):
                return None
            self.active.append(path)
            mine: list[Tensor] = []
            known: dict[int, Tensor] = {}  # one tensor given several times (attention) is one input

            def own(v: Any) -> Any:
                if not isinstance(v, Tensor) or v.dtype == torch.bool:
                    return v
                if id(v) in known:
                    return known[id(v)]
                if not v.is_floating_point():
                    mine.append(v)
                    return v
                given = v
                v = v.clone() if v.requires_grad else v.detach().clone().requires_grad_(torch.is_grad_enabled())
                if v.requires_grad:
                    v.retain_grad()
                mine.append(v)
                known[id(given)] = v
                return v

            args, kwargs = tuple(own(v) for v in args), {name: own(v) for name, v in kwargs.items()}
            self.pending.append([v.detach().clone() for v in mine])
            self.pending.append(mine)
            return args, kwargs

        return hook

    def _after(self, path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if self.is_over and not self._is_repeated(path):
                return output
            self.active.pop()
            mine, values = self.pending.pop(), self.pending.pop()
            inputs = [numpy(v) for v in values]
            path_in, y = trees.first(output, is_tensor) or ((), None)
            index = self.counts.get(path, 0)
            if not self.is_over:
                self.counts[path] = index + 1
            if not isinstance(y, Tensor):
                return output
            if y.requires_grad:
                y.retain_grad()
            if self.is_over:
                i = self._repeats(path, inputs)
                self.kept[i] = self.kept[i][0], mine, y
            else:
                call = Call(path, index, inputs, numpy(y), arrived=inputs)
                self.recording.calls.append(call)
                self.kept.append((call, mine, y))
            # A copy goes on: an activation in place must not reach back into y.
            return trees.replaced(output, path_in, y.clone())

        return hook

    def _glue(self, path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if self.is_over:
                return
            names = tuple(c.__name__ for c in type(module).__mro__)
            self.recording.glue.append(GlueCall(path, names, len(self.recording.calls)))

        return hook

    def gradients(self) -> None:
        """Fills in the gradients, once the backward pass has been."""
        for call, inputs, y in self.kept:
            call.input_gradients = [_grad(v) if v.is_floating_point() else None for v in inputs]
            call.output_gradient = _grad(y)
