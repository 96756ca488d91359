"""`python -m parity convert`: weights in a file of one framework to a file of the other."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from numpy.typing import NDArray
from rich.console import Console

from bn_common.shown import printable
from parity.cli.named_objects import module_of, object_of, read_arrays
from parity.sides import weight_files

if TYPE_CHECKING:
    import tyro


def convert(
    source: Annotated[Path, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    torch_module: str,
    flax_module: str,
    inputs: tuple[Path, ...] = (),
    keywords: Path | None = None,
    flax_inputs: tuple[Path, ...] = (),
    flax_call: str | None = None,
    layer_map: tuple[str, ...] = (),
) -> int:
    """Carry weights from PyTorch to Flax, or from Flax to PyTorch: the names in the source say which.

    Args:
      source: .pt, .pth, .safetensors, .npz or a folder of Orbax.
      target: where to write; its suffix says the format, no suffix or .orbax is Orbax.
      torch_module: "package.module:factory", called without arguments, or a module object; imported from here.
      flax_module: the same for the Flax module, linen or NNX.
      inputs: .npy files of inputs, in PyTorch's layout, for networks whose inputs can't be guessed; only shapes count.
      keywords: a .npz file of what the networks take by name: its names are those of the arguments.
      flax_inputs: .npy files of what Flax is called with instead, in its layout.
      flax_call: "package.module:name" of a function, see `parity.check`.
      layer_map: "torch.layer=Flax/path" of layers that are paired otherwise than by themselves.

    Returns:
      The exit status: 0, or 2 where something can't be done, with one line (the problems of the weights: one each).
    """
    console = Console(highlight=False, soft_wrap=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options = {"layer_map": _layer_map(layer_map)} | _called(inputs, keywords, flax_inputs, flax_call)
            lines = _convert(source, target, torch_module, flax_module, options)
    except (ValueError, TypeError) as error:
        from bn_common.command_line import program_name

        sys.stderr.write(f"{program_name('parity', 'python -m parity')} convert: error: ")
        # The problems of the weights are a line each.
        sys.stderr.writelines(f"{printable(line)}\n" for line in str(error).splitlines())
        return 2
    from parity.weights import ParityWarning

    lines += [str(warning.message) for warning in caught if issubclass(warning.category, ParityWarning)]
    for line in lines:
        console.print(printable(line), markup=False)
    return 0


def _convert(
    source: Path,
    target: Path,
    torch_module: str,
    flax_module: str,
    options: dict[str, Any],
) -> list[str]:
    torch_made, flax_made = module_of("--torch-module", torch_module), module_of("--flax-module", flax_module)
    # Both have the same weights.
    given = weight_files.load(source, weight_files.expected_of(torch_made))
    from parity import weights

    if given.framework == "torch":
        variables = weights.to_flax(_torch_tensors(given.tensors), flax_made, **options, torch_module=torch_made)
        carried: dict[str, Any] = dict(weights.named(variables))
    else:
        carried = weights.to_torch(weight_files.nested(given.tensors), torch_made, flax_module=flax_made, **options)
    to = "flax" if given.framework == "torch" else "torch"
    conventions = weights.conventions(torch_made, flax_made, **options)
    about = {"framework": to, "batch_norm": conventions[given.framework]} | {
        name: value for name, value in given.metadata.items() if name == "batch_norm" and value
    }
    weight_files.save(target, carried, about)
    lines = [f"{len(carried)} tensors from {source} ({given.framework}) to {target} ({to})"]
    return lines + [f"note: {note}" for note in weights.notes(torch_made, flax_made, **options)]


def _torch_tensors(tensors: dict[str, NDArray]) -> dict[str, Any]:
    from parity import weights

    return {name: weights.as_tensor(a) for name, a in tensors.items()}


def _called(
    inputs: Sequence[Path], keywords: Path | None, flax_inputs: Sequence[Path], flax_call: str | None
) -> dict[str, Any]:
    """The options of `to_flax` and `to_torch` that say how both sides are called."""

    def every(name: str, paths: Sequence[Path]) -> list[NDArray] | None:
        return [a for path in paths for a in read_arrays(name, path).values()] or None

    return {
        "inputs": every("--inputs", inputs),
        "keywords": None if keywords is None else read_arrays("--keywords", keywords),
        "flax_inputs": every("--flax-inputs", flax_inputs),
        "flax_call": None if flax_call is None else object_of("--flax-call", flax_call),
    }


def _layer_map(entries: Sequence[str]) -> dict[str, str]:
    found = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals:
            raise ValueError(f'--map is {entry!r}; allowed: "torch.layer=Flax/path"')
        found[name] = path
    return found
