"""The layers of a PyTorch module or state_dict, in order, and what stands behind a flatten. Never imports jax."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bn_common.conventions import PYTORCH, complement
from parity.records import kinds, trees
from parity.records.kinds import Shape
from parity.records.marks import channel_counts, code, read_code
from parity.records.recording import Failure, Layer
from parity.records.structure import Flattened, Guess, Structure
from parity.sides.torch.module import COUNTER, copied, is_tensor
from parity.sides.torch.precision import default_dtype
from parity.sides.torch.record import layers_of

LOG = logging.getLogger(__name__)


def unwrapped(module: nn.Module) -> tuple[nn.Module, str]:
    """The module within `torch.compile` and `DistributedDataParallel`, and the prefix that they give its names."""
    prefix = ""
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module, prefix = inner, f"{prefix}_orig_mod."
        elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module, prefix = module.module, f"{prefix}module."
        else:
            return module, prefix


def of_module(module: nn.Module) -> Structure:
    """The layers in the order of definition. Buffers outside of layers are constants, and left out.

    Raises:
      ValueError: a lazy module that has never been called.
    """
    check_lazy(module)
    state = {name: v for name, v in module.state_dict().items() if isinstance(v, Tensor)}
    layers = []
    for layer in layers_of(module).values():
        layer.tensors = {local: full for local, full in layer.tensors.items() if full in state}
        if layer.tensors:
            layers.append(layer)
    shapes = {full: tuple(state[full].shape) for layer in layers for full in layer.tensors.values()}
    return Structure(layers, shapes, _counters(state))


def check_lazy(module: nn.Module) -> None:
    """ValueError for a lazy module that has no shapes yet."""
    lazy = [n for n, v in module.state_dict().items() if nn.parameter.is_lazy(v)]
    if lazy:
        raise ValueError(f"{lazy[0]} is uninitialised; allowed: a lazy module that has been called once")


def clean_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A state_dict without the prefixes of `torch.compile` and `DistributedDataParallel`, and the prefix of all."""
    names = {name: name.replace("_orig_mod.", "") for name in state}
    prefix = ""
    while names and all(name.startswith("module.") for name in names.values()):
        names = {name: clean.removeprefix("module.") for name, clean in names.items()}
        prefix += "module."
    return {clean: state[name] for name, clean in names.items()}, prefix


def of_state(shapes: Mapping[str, Shape]) -> Structure:
    """The layers that the names of a state_dict tell of, in its order; kinds only where the tensors say them."""
    own: dict[str, dict[str, str]] = {}
    attentions = {
        name.rpartition(".")[0] for name in shapes if re.search(r"(^|\.)(in_proj_weight|q_proj_weight)$", name)
    }
    for full, shape in shapes.items():
        path, _, local = full.rpartition(".")
        if kinds.is_counter(local, shape):
            continue
        if match := re.fullmatch(r"(?:(.*)\.)?parametrizations\.(\w+)\.original([01])", full):
            path, local = match[1] or "", f"{match[2]}_{'gv'[int(match[3])]}"
        elif match := re.fullmatch(rf"(?:(.*)\.)?({re.escape(kinds.MADE_OF)}.*)", full):
            path, local = match[1] or "", match[2]
        parent, _, last = path.rpartition(".")
        if last == "out_proj" and parent in attentions:
            path, local = parent, f"out_proj.{local}"
        own.setdefault(path, {})[local] = full
    layers = []
    for path, tensors in own.items():
        statistics = frozenset(n for n in tensors if kinds.MEAN.fullmatch(n) or kinds.VAR.fullmatch(n))
        kind = _kind_of_state(path, {local: shapes[full] for local, full in tensors.items()}, statistics)
        below = kind != "attention" and any(p != path and (p.startswith(f"{path}.") or path == "") for p in own)
        layers.append(Layer(path, kind, "", tensors, statistics, is_called=not below))
    carried = {full: shapes[full] for layer in layers for full in layer.tensors.values()}
    return Structure(layers, carried, _counters(shapes))


def _kind_of_state(path: str, shapes: Mapping[str, Shape], statistics: frozenset[str]) -> str:
    if any(name.endswith("_proj_weight") for name in shapes):
        return "attention"
    if statistics:
        return kinds.kind_of([], shapes, statistics)
    weight = shapes.get("weight", ())
    if len(weight) == 2:
        # A matrix alone is a table of an embedding, or a linear layer without bias.
        is_table = "bias" not in shapes and re.search(r"emb|wte|wpe", path, re.IGNORECASE)
        return "embedding" if is_table else "linear" if "bias" in shapes else "other"
    return "other"


def _counters(names: Mapping[str, Any]) -> dict[str, str]:
    found = [name for name in names if name.rpartition(".")[2] == COUNTER]
    return {name.rpartition(".")[0]: name for name in found}


class Run(NamedTuple):
    """One run.

    Attributes:
      order: the layers' paths, in the order of their first call.
      calls: (path, input's shape, output's shape) of every call.
      inputs: path -> the first row of a flat input whose channels are marked.
      feeders: path -> of the layer whose output is the input.
    """

    order: list[str]
    calls: list[tuple[str, Shape, Shape]]
    inputs: dict[str, NDArray]
    feeders: dict[str, str]


def _tell_refused(guess: Guess, error: Exception) -> None:
    shapes = ", ".join(str(a.shape) for a in guess.torch.arrays())
    LOG.info("PyTorch's module does not take %s: %s: %s", shapes, type(error).__name__, error)


class Runner:
    """Runs copies of a module: on the meta device, which only knows shapes, or where that fails on the CPU."""

    def __init__(self, module: nn.Module, structure: Structure) -> None:
        self.structure = structure
        self.real = copied(module).cpu().float().eval()
        self.meta: nn.Module | None = copy.deepcopy(self.real).to("meta")

    def run(self, guess: Guess) -> Run | None:
        """What a run on these inputs shows; None if the module refuses them."""
        if self.meta is not None:
            try:
                return self._run(self.meta, guess, "meta")
            except NotImplementedError:
                self.meta = None
            except Exception as error:  # whatever a stranger's module raises
                if "meta" not in str(error):
                    _tell_refused(guess, error)
                    return None
                self.meta = None
        try:
            return self._run(self.real, guess, "cpu")
        except Exception as error:  # as above
            _tell_refused(guess, error)
            return None

    def flattened(self, guess: Guess, run: Run) -> dict[str, Flattened]:
        """Which layers stand behind a flatten, from a run in which every layer's channels are marked."""
        if not may_be_flattened(run.calls, {layer.path: layer.kind for layer in self.structure.layers}, guess):
            return {}
        coded = copy.deepcopy(self.real)
        with torch.no_grad():
            for value in (*coded.parameters(), *coded.buffers()):
                if value.is_floating_point():
                    value.fill_(1.0)
        try:
            inputs = self._run(coded, guess, "cpu", coded=True).inputs
        except Exception as error:  # as above
            self.structure.unseen = f"PyTorch: {Failure.of(error).error}"
            return {}
        counts = channel_counts(self.structure.layers, self.structure.shapes, 0)
        return {path: found for path, x in inputs.items() if (found := read_code(x, counts)) is not None}

    def _run(self, module: nn.Module, guess: Guess, device: str, *, coded: bool = False) -> Run:
        run = Run([], [], {}, {})
        outputs: list[tuple[str, Tensor]] = []
        layers = {layer.path: layer for layer in self.structure.layers if layer.is_called}

        def hook_of(layer: Layer) -> Callable:
            def hook(child: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
                x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
                path, y = trees.first(output, is_tensor) or ((), None)
                if x is None or y is None:
                    return None
                if layer.path not in run.order:
                    run.order.append(layer.path)
                    before = next((path for path, v in outputs if v is x), None)
                    if before is not None:
                        run.feeders[layer.path] = before
                    if coded and x.ndim == 2:
                        run.inputs[layer.path] = x[0].numpy().copy()
                run.calls.append((layer.path, tuple(x.shape), tuple(y.shape)))
                if not coded:
                    outputs.append((layer.path, y))
                    return None
                marked = _marked(layer, x, y)
                return trees.replaced(output, path, marked)

            return hook

        handles = [
            child.register_forward_hook(hook_of(layers[path]), with_kwargs=True)
            for path, child in module.named_modules()
            if path in layers
        ]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), default_dtype(torch.float32):
                arrays = enumerate(guess.torch.arrays())
                given = guess.torch.filled([_tensor(a, device, coded=coded, index=i) for i, a in arrays])
                module(*given.args, **given.keywords)
        finally:
            for handle in handles:
                handle.remove()
        return run


def _marked(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    """y with its channels marked; what is flat already keeps its marks through a norm."""
    if y.ndim == 2 and layer.kind in kinds.NORMS and x.shape == y.shape:
        return x
    last = layer.kind not in kinds.CHANNELS_SECOND
    if layer.kind in ("layer_norm", "rms_norm") and y.ndim >= 3 and layer.class_name not in ("LayerNorm", "RMSNorm"):
        last = False  # LayerNorm2d and the like: a hand-written one over the channels of images
    axis = y.ndim - 1 if last else min(1, y.ndim - 1)
    shape = [1] * y.ndim
    shape[axis] = y.shape[axis]
    return torch.from_numpy(code(layer.path, y.shape[axis])).reshape(shape).expand(y.shape).clone()


def _tensor(a: NDArray, device: str, *, coded: bool, index: int) -> Tensor:
    if coded and a.ndim >= 3 and a.dtype.kind == "f":
        a = np.broadcast_to(code(f"input {index}", a.shape[1]).reshape(-1, *(1,) * (a.ndim - 2)), a.shape)
    tensor = torch.tensor(np.array(a, order="C"))
    return (tensor.float() if tensor.is_floating_point() else tensor.long()).to(device)


def may_be_flattened(calls: Sequence[tuple[str, Shape, Shape]], kind: Mapping[str, str], guess: Guess) -> bool:
    """Whether a flat layer takes more numbers than the images before it have channels."""
    shape = next((tuple(a.shape) for a in guess.torch.arrays() if a.ndim >= 3), ())
    channels = {shape[1], shape[-1]} if shape else set()
    for path, x, y in calls:
        if len(x) == 2 and channels and x[1] not in channels and kind[path] in kinds.FLAT:
            return True
        if len(y) >= 3:
            channels = {y[1], y[-1]}
        elif len(x) == 2 and kind[path] == "linear":
            channels = set()
    return False


def convention(layer: nn.Module) -> dict[str, Any]:
    """What a norm says of itself, in this project's words; momentum is the weight of the old value."""
    says: dict[str, Any] = {}
    if (eps := getattr(layer, "eps", None)) is not None:
        says["epsilon"] = eps
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return says | PYTORCH._replace(momentum=complement(layer.momentum))._asdict()
    names = ("momentum", "unbiased_moving_var", "initial_moving_var")
    return says | {name: getattr(layer, name) for name in names if hasattr(layer, "unbiased_moving_var")}
