"""The options of `python -m parity`'s commands, and what each does with them; no framework is imported before."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from bn_common.checks import require

if TYPE_CHECKING:
    from parity.report import Report

HERE = Path(__file__).parent
FACTORY = "package.module:name or file.py:name of a module, its class or a function that makes it"
Flag = tyro.conf.FlagCreatePairsOff


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What the network is given."""

    inputs: Path | None = None
    """A .npz or .npy file of arrays in PyTorch's layout, in the order in which the network takes them."""
    shape: tuple[str, ...] = ()
    """Instead of --inputs: the shape of each input in PyTorch's layout, such as 8,3,32,32; filled with N(0, 1)."""
    seed: int = 0
    """Of the numbers that --shape is filled with, >= 0."""
    eval: Annotated[bool, Flag] = False
    """Compare prediction; otherwise training."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "--seed", self.seed, "an integer >= 0")
        both = self.inputs is not None and bool(self.shape)
        require(not both, "--inputs", f"{self.inputs} with --shape {' '.join(self.shape)}", "one of the two")
        if self.inputs is not None:
            fine = self.inputs.suffix in (".npz", ".npy") and self.inputs.is_file()
            require(fine, "--inputs", self.inputs, "a .npz or .npy file")
        for shape in self.shape:
            fine = all(part.isdigit() and int(part) > 0 for part in shape.split(","))
            require(fine, "--shape", shape, "positive integers with commas between, such as 8,3,32,32")

    def arrays(self) -> list[NDArray]:
        """The network's inputs."""
        if self.inputs is None:
            rng = np.random.default_rng(self.seed)
            shapes = [tuple(map(int, shape.split(","))) for shape in self.shape]
            return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
        try:
            loaded = np.load(self.inputs)
        except (OSError, ValueError) as error:
            raise ValueError(f"--inputs is {self.inputs}, which can't be read ({error}); allowed: numbers") from None
        return [loaded] if isinstance(loaded, np.ndarray) else [loaded[name] for name in loaded.files]


@dataclasses.dataclass(frozen=True)
class _Output:
    """Where the report goes, besides the terminal."""

    json: Path | None = None
    """Write the report to this file as JSON."""
    html: Path | None = None
    """Write the report to this file as one HTML page."""

    def __post_init__(self) -> None:
        for name, path in (("--json", self.json), ("--html", self.html)):
            fine = path is None or (path.absolute().parent.is_dir() and not path.is_dir())
            require(fine, name, path, "a file in a folder that is there")

    def finish(self, report: Report) -> int:
        """Print the report and write its files; gives the exit status."""
        from rich.console import Console

        Console().print(report) if sys.stdout.isatty() else print(report)
        if self.json is not None:
            report.to_json(self.json)
        if self.html is not None:
            report.to_html(self.html)
        return 0 if report.ok else 1


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two modules that should be one network."""

    torch: tyro.conf.Positional[str]
    """PyTorch's module: package.module:name or file.py:name of a module, its class or a function that makes it."""
    flax: tyro.conf.Positional[str]
    """Flax's module, in the same way."""
    given: tyro.conf.OmitArgPrefixes[_Inputs] = dataclasses.field(default_factory=_Inputs)
    output: tyro.conf.OmitArgPrefixes[_Output] = dataclasses.field(default_factory=_Output)
    map: tuple[str, ...] = ()
    """Layers that are not paired rightly by order and kind, such as conv.0=Conv_0 fc=Dense_2."""
    loss: str | None = None
    """package.module:name or file.py:name of a pair of functions of the output, PyTorch's and JAX's."""

    def __post_init__(self) -> None:
        if self.loss is not None:
            check_name("--loss", self.loss)
        for name, value in (("torch", self.torch), ("flax", self.flax)):
            check_name(name, value)
        require(bool(self.given.inputs or self.given.shape), "--inputs", "not given", "--inputs FILE or --shape SIZES")
        layer_map(self.map)

    def modules(self) -> tuple[Any, Any]:
        """Both modules, made."""
        return module_of("torch", self.torch), module_of("flax", self.flax)


@dataclasses.dataclass(frozen=True)
class Check(_Pair):
    """Are these two modules the same network, and if not, where do they part, and why?"""

    variables: Path | None = None
    """Flax's own variables, examined too: .safetensors, .npz or Orbax. None: PyTorch's weights are carried over."""
    steps: int = 0
    """How many steps of training to compare on these inputs, >= 0; with --optimizers."""
    optimizers: str | None = None
    """package.module:name or file.py:name of a pair: parameters -> torch optimizer, optax.GradientTransformation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps >= 0, "--steps", self.steps, "an integer >= 0")
        if self.optimizers is not None:
            check_name("--optimizers", self.optimizers)
        fine = (self.steps > 0) == (self.optimizers is not None)
        require(fine, "--steps and --optimizers", f"{self.steps} and {self.optimizers}", "both or neither")
        fine = self.variables is None or self.variables.exists()
        require(fine, "--variables", self.variables, "a file that is there")

    def run(self) -> int:
        """Compare and report; gives the exit status."""
        given, (torch_module, flax_module) = self.given.arrays(), self.modules()
        from parity.checking import check

        variables = None
        if self.variables is not None:
            from flax.traverse_util import unflatten_dict

            from parity.dumping import read_weights

            variables = unflatten_dict(read_weights(self.variables, "--variables"), sep="/")
        with taken("both modules", given):
            report = check(
                torch_module,
                flax_module,
                *given,
                train=not self.given.eval,
                variables=variables,
                layer_map=layer_map(self.map) or None,
                loss=pair_of("--loss", self.loss),
                steps=self.steps,
                optimizers=pair_of("--optimizers", self.optimizers),
            )
        return self.output.finish(report)


@dataclasses.dataclass(frozen=True)
class Trace(_Pair):
    """Every layer's output, gradients and statistics: each side on its own, and every layer on PyTorch's input."""

    def run(self) -> int:
        """Compare and report; gives the exit status."""
        given, (torch_module, flax_module) = self.given.arrays(), self.modules()
        from parity.offline import trace

        loss = pair_of("--loss", self.loss)
        with taken("both modules", given):
            options: dict[str, Any] = {"train": not self.given.eval, "layer_map": layer_map(self.map), "loss": loss}
            report = trace(torch_module, flax_module, *given, **options)
        return self.output.finish(report)


@dataclasses.dataclass(frozen=True)
class Dump:
    """Write down one side, where only its framework is installed."""

    module: tyro.conf.Positional[str]
    """The module: package.module:name or file.py:name of a module, its class or a function that makes it."""
    out: Path
    """NAME of the two files, NAME.safetensors and NAME.json."""
    given: tyro.conf.OmitArgPrefixes[_Inputs] = dataclasses.field(default_factory=_Inputs)
    flax: Annotated[bool, Flag] = False
    """The inputs are in Flax's layout already; otherwise floating ones of rank 3 and more are moved channels last."""
    weights: Path | None = None
    """The name of a dump, of either side, whose weights are taken; or a file of this side's own weights: .safetensors,
    .npz, .pt or Orbax. None: the module's own."""
    loss: str | None = None
    """package.module:name of a function of the output; both sides must be given the same one, each in its framework."""
    map: tuple[str, ...] = ()
    """With another side's weights: layers that are not paired rightly by order and kind, such as conv.0=Conv_0."""

    def __post_init__(self) -> None:
        check_name("module", self.module)
        if self.loss is not None:
            check_name("--loss", self.loss)
        require(bool(self.given.inputs or self.given.shape), "--inputs", "not given", "--inputs FILE or --shape SIZES")
        require(self.out.absolute().parent.is_dir(), "--out", self.out, "a name in a folder that is there")
        if self.weights is not None:
            from parity.recording_file import is_dump

            fine = self.weights.exists() or is_dump(self.weights)
            require(fine, "--weights", self.weights, "the name of a dump, or a file that is there")
        layer_map(self.map)

    def run(self) -> int:
        """Run the module and write both files; gives the exit status."""
        given, module = self.given.arrays(), module_of("module", self.module)
        from parity.offline import dump
        from parity.recording_file import files_of

        with taken("the module", given):
            dump(
                module,
                given,
                self.out,
                train=not self.given.eval,
                weights=self.weights,
                flax_layout=self.flax,
                loss=None if self.loss is None else object_of("--loss", self.loss),
                layer_map=layer_map(self.map),
            )
        print(f"written: {' and '.join(map(str, files_of(self.out)))}")
        return 0


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare two dumps, one of each framework; neither framework is needed."""

    first: tyro.conf.Positional[Path]
    """Name of a dump."""
    second: tyro.conf.Positional[Path]
    """Name of the other side's."""
    output: tyro.conf.OmitArgPrefixes[_Output] = dataclasses.field(default_factory=_Output)
    map: tuple[str, ...] = ()
    """Layers that are not paired rightly by order and kind, such as conv.0=Conv_0."""

    def __post_init__(self) -> None:
        layer_map(self.map)

    def run(self) -> int:
        """Compare and report; gives the exit status."""
        from parity.offline import compare

        return self.output.finish(compare(self.first, self.second, layer_map=layer_map(self.map)))


@dataclasses.dataclass(frozen=True)
class Convert:
    """Carry weights in a file from PyTorch to Flax, or back: the names in it say which."""

    source: tyro.conf.Positional[Path]
    """.pt, .pth, .safetensors, .npz or a folder of Orbax."""
    target: tyro.conf.Positional[Path]
    """Where to write; its suffix says the format, no suffix or .orbax is Orbax."""
    torch_module: str
    """PyTorch's module: package.module:name of a module, its class or a function that makes it."""
    flax_module: str
    """Flax's module, in the same way."""
    inputs: tuple[Path, ...] = ()
    """.npy files of inputs in PyTorch's layout, for networks whose inputs can't be guessed; only their shapes count."""
    map: tuple[str, ...] = ()
    """Layers that are not paired rightly by order and kind, such as conv.0=Conv_0."""

    def __post_init__(self) -> None:
        check_name("--torch-module", self.torch_module)
        check_name("--flax-module", self.flax_module)
        layer_map(self.map)

    def run(self) -> int:
        """Convert; gives the exit status."""
        from parity.convert import convert

        return convert(
            self.source,
            self.target,
            torch_module=self.torch_module,
            flax_module=self.flax_module,
            inputs=self.inputs,
            layer_map=self.map,
        )


def layer_map(pairs: Sequence[str]) -> Mapping[str, str]:
    """{PyTorch's name: Flax's path} of "a.b=A/B" and so on."""
    for pair in pairs:
        require(pair.count("=") == 1, "--map", pair, "PyTorch's name=Flax's path, such as conv.0=Conv_0")
    return {pair.split("=")[0]: pair.split("=")[1] for pair in pairs}


def check_name(option: str, name: str) -> None:
    """ValueError if it is not of the form MODULE:NAME, or if there is no such module; nothing is imported."""
    place, colon, last = name.rpartition(":")
    require(bool(colon and place and last.isidentifier()), option, repr(name), FACTORY)
    if place.endswith(".py"):
        require(Path(place).is_file(), option, repr(name), f"{FACTORY}; there is no file {place}")


def object_of(option: str, name: str) -> Any:
    """What the name MODULE:NAME stands for; modules are looked for in the working directory, too.

    Raises:
      ValueError: no such module, one that can't be imported, or no such name in it.
    """
    check_name(option, name)
    place, _, last = name.rpartition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = _file(place) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever a stranger's module raises
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and f"{place}.".startswith(f"{absent}."):
            raise ValueError(f"{option} is {name!r}, and there is no module {absent}; allowed: {FACTORY}") from None
        raise ValueError(f"{option} is {name!r}, which can't be imported: {told(error)}; allowed: {FACTORY}") from error
    require(hasattr(module, last), option, repr(name), f"{FACTORY}; {place} has no {last}")
    return getattr(module, last)


def _file(place: str) -> Any:
    """The module in this file, run."""
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, such as linen modules, look their module up.
    sys.modules[spec.name] = module
    # Its neighbours are found as if it were run itself.
    sys.path.insert(0, str(Path(place).resolve().parent))
    spec.loader.exec_module(module)
    return module


def pair_of(option: str, name: str | None) -> tuple[Any, Any] | None:
    """The two objects, PyTorch's and JAX's, that the name stands for.

    Raises:
      ValueError: no such name, or what it gives is no pair.
    """
    if name is None:
        return None
    found = object_of(option, name)
    fine = isinstance(found, tuple | list) and len(found) == 2
    require(fine, option, f"{name!r}, which gives {type(found).__name__}", "a pair, PyTorch's and JAX's")
    return found[0], found[1]


def module_of(option: str, name: str) -> Any:
    """The module that the name stands for, made if it is a class or a function.

    Raises:
      ValueError: no such name, one that needs arguments or fails, or what it gives is no module.
    """
    from parity.offline import framework_of

    found = object_of(option, name)
    is_made = isinstance(found, type) or (callable(found) and framework_of(found) is None)
    module = _made(option, name, found) if is_made else found
    wanted = next((one for one in ("torch", "flax") if one in option), None)
    is_fine = framework_of(module) is not None and wanted in (None, framework_of(module))
    allowed = {"torch": "a torch.nn.Module", "flax": "a flax.linen.Module or flax.nnx.Module"}
    what = allowed[wanted] if wanted else " or ".join(allowed.values())
    require(is_fine, option, f"{name!r}, which gives {type(module).__name__}", what)
    return module


def _made(option: str, name: str, factory: Any) -> Any:
    try:
        return factory()
    except Exception as error:  # whatever a stranger's factory raises
        allowed = FACTORY
        if isinstance(factory, type):  # an NNX class wants its rngs
            allowed += f"; {factory.__name__} by a function without arguments: lambda: {factory.__name__}(...)"
        raise ValueError(f"{option} is {name!r}, which fails: {told(error)}; allowed: {allowed}") from error


@contextlib.contextmanager
def taken(who: str, inputs: Sequence[NDArray]) -> Iterator[None]:
    """ValueError with one line for whatever the modules raise on these inputs.

    What is raised in the bridge's own code is a mistake of its own, and stays as it is.
    """
    try:
        yield
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if "allowed:" in str(error) or Path(last.filename).is_relative_to(HERE):
            raise
        shapes = ", ".join(f"{a.dtype} {a.shape}" for a in inputs)
        allowed = f"what {who} can take, in PyTorch's layout"
        raise ValueError(f"the input is {shapes}, on which a run fails: {told(error)}; allowed: {allowed}") from error


def told(error: Exception) -> str:
    """An error in one line, with the last place in the user's own code that it came through."""
    places = [
        f"{Path(frame.filename).name}, line {frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not {"site-packages", "dist-packages"} & set(Path(frame.filename).parts)
        and Path(frame.filename).is_file()
        and not Path(frame.filename).is_relative_to(HERE)
        and not Path(frame.filename).is_relative_to(Path(os.__file__).parent)
    ]
    return f"{type(error).__name__}: {' '.join(str(error).split())}" + (f" ({places[-1]})" if places else "")
