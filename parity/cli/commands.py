"""The options of `python -m parity`'s commands, and what each does with them; no framework is imported before."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from bn_common.checks import require
from bn_common.files import check_can_write
from parity.cli.named_objects import check_name, module_of, object_of, pair_of, read_arrays, taken
from parity.diagnosis.mistakes import COULD_NOT_RUN

if TYPE_CHECKING:
    from parity.report import Report


Flag = tyro.conf.FlagCreatePairsOff


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What the network is given."""

    inputs: Path | None = None
    """A .npz or .npy file of arrays in PyTorch's layout, in the order in which the network takes them."""
    shape: tuple[str, ...] = ()
    """Instead of --inputs: the shape of each input in PyTorch's layout, such as 8,3,32,32; filled with N(0, 1)."""
    keywords: Path | None = None
    """A .npz file of what the network takes by name: its names are those of the arguments."""
    flax_inputs: Path | None = None
    """What Flax is called with instead, in its layout: a .npy file, or a .npz file in the order of the arguments."""
    flax_call: str | None = None
    """package.module:name or file.py:name of flax_call(module, variables, *inputs, train, **keywords)."""
    seed: int = 0
    """Of the numbers that --shape is filled with, and of weights that a class or function draws, >= 0."""
    eval: Annotated[bool, Flag] = False
    """Compare prediction; otherwise training."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "--seed", self.seed, "an integer >= 0")
        both = self.inputs is not None and bool(self.shape)
        require(not both, "--inputs", f"{self.inputs} with --shape {' '.join(self.shape)}", "one of the two")
        for name, path in (("--inputs", self.inputs), ("--flax-inputs", self.flax_inputs)):
            fine = path is None or (path.suffix in (".npz", ".npy") and path.is_file())
            require(fine, name, path, "a .npz or .npy file")
        fine = self.keywords is None or (self.keywords.suffix == ".npz" and self.keywords.is_file())
        require(fine, "--keywords", self.keywords, "a .npz file")
        if self.flax_call is not None:
            check_name("--flax-call", self.flax_call)
        for shape in self.shape:
            fine = all(part.isdigit() and int(part) > 0 for part in shape.split(","))
            require(fine, "--shape", shape, "positive integers with commas between, such as 8,3,32,32")

    def arrays(self) -> list[NDArray]:
        """The network's inputs."""
        if self.inputs is None:
            rng = np.random.default_rng(self.seed)
            shapes = [tuple(map(int, shape.split(","))) for shape in self.shape]
            return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
        return list(read_arrays("--inputs", self.inputs).values())

    @property
    def are_given(self) -> bool:
        """Whether there is something to call the network with."""
        return bool(self.inputs or self.shape or self.keywords)

    def options(self) -> dict[str, Any]:
        """How else both sides are called, where that is said: what `parity.check` takes beside the inputs."""
        named = None if self.keywords is None else read_arrays("--keywords", self.keywords)
        flax = None if self.flax_inputs is None else [*read_arrays("--flax-inputs", self.flax_inputs).values()]
        call = None if self.flax_call is None else object_of("--flax-call", self.flax_call)
        every = {"keywords": named, "flax_inputs": flax, "flax_call": call}
        return {name: value for name, value in every.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class _Output:
    """Where the report goes, besides the terminal."""

    json: Path | None = None
    """Write the report to this file as JSON."""
    html: Path | None = None
    """Write the report to this file as one HTML page."""
    rows: Literal["differing", "all"] | None = None
    """Which rows the table has. None: those that differ, and three around the first; of trace, all."""
    depth: int | None = None
    """A row for every module of this depth instead, >= 1: its worst error, and how many of its layers differ."""

    def __post_init__(self) -> None:
        require(self.depth is None or self.depth >= 1, "--depth", self.depth, "an integer >= 1")
        for name, path in (("--json", self.json), ("--html", self.html)):
            fine = path is None or (path.absolute().parent.is_dir() and not path.is_dir())
            require(fine, name, path, "a file in a folder that is there")
            if path is not None:
                check_can_write(name, path)

    def finish(self, report: Report, rows: str = "differing") -> int:
        """Print the report, with these rows if --rows says nothing, and write its files; gives the exit status."""
        rows, report.depth = self.rows or rows, self.depth
        if sys.stdout.isatty():
            from rich import box
            from rich.console import Console

            from parity.report.table import parts

            console = Console()
            console.print(*parts(report, console.width, box.SIMPLE_HEAD, rows), sep="\n")
        else:
            print(report.table(rows=rows))
        if self.json is not None:
            report.to_json(self.json)
        if self.html is not None:
            report.to_html(self.html)
        if report.ok:
            return 0
        return (
            2 if {d.code for d in report.diagnoses} == {COULD_NOT_RUN} else 1
        )  # an error in a module is no difference


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
        require(self.given.are_given, "--inputs", "not given", "--inputs FILE or --shape SIZES")
        layer_map(self.map)

    def modules(self) -> tuple[Any, Any]:
        """Both modules, made."""
        return module_of("torch", self.torch, self.given.seed), module_of("flax", self.flax, self.given.seed)


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
        from parity.check import check

        variables = None
        if self.variables is not None:
            from parity.sides.weight_files import expected_of, nested, read_weights

            # Both have the same weights.
            variables = nested(read_weights(self.variables, "--variables", expected_of(torch_module)))
        with taken("both modules", given):
            report = check(
                torch_module,
                flax_module,
                *given,
                **self.given.options(),
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
        from parity.check import trace

        loss = pair_of("--loss", self.loss)
        with taken("both modules", given):
            options: dict[str, Any] = {"train": not self.given.eval, "layer_map": layer_map(self.map), "loss": loss}
            report = trace(torch_module, flax_module, *given, **self.given.options(), **options)
        return self.output.finish(report, "all")


@dataclasses.dataclass(frozen=True)
class Initialisation:
    """Do new networks of both sides begin with weights of the same distributions?"""

    torch: tyro.conf.Positional[str]
    """PyTorch's: package.module:name or file.py:name of a class or a function that makes the module."""
    flax: tyro.conf.Positional[str]
    """Flax's: of a linen module, its class, or of a class or function of rngs that makes an NNX module."""
    given: tyro.conf.OmitArgPrefixes[_Inputs] = dataclasses.field(default_factory=_Inputs)
    output: tyro.conf.OmitArgPrefixes[_Output] = dataclasses.field(default_factory=_Output)
    map: tuple[str, ...] = ()
    """Layers that are not paired rightly by order and kind, such as conv.0=Conv_0 fc=Dense_2."""
    seeds: int = 32
    """How many networks are made on each side, >= 8."""

    def __post_init__(self) -> None:
        check_name("torch", self.torch)
        check_name("flax", self.flax)
        require(self.given.are_given, "--inputs", "not given", "--inputs FILE or --shape SIZES")
        require(self.seeds >= 8, "--seeds", self.seeds, "an integer >= 8")
        layer_map(self.map)

    def run(self) -> int:
        """Compare and report; gives the exit status."""
        given, torch, flax = self.given.arrays(), object_of("torch", self.torch), object_of("flax", self.flax)
        from parity.initialisation import check_initialisation

        with taken("both modules", given):
            options: dict[str, Any] = {"layer_map": layer_map(self.map) or None, "seeds": self.seeds}
            report = check_initialisation(torch, flax, *given, **self.given.options(), **options)
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
    optimizer: str | None = None
    """package.module:name or file.py:name of parameters -> torch optimizer, or of an optax.GradientTransformation: its
    rule is written down, too."""
    steps: int = 0
    """How many steps of training to write down, >= 0; with --optimizer."""
    map: tuple[str, ...] = ()
    """With another side's weights: layers that are not paired rightly by order and kind, such as conv.0=Conv_0."""

    def __post_init__(self) -> None:
        check_name("module", self.module)
        if self.optimizer is not None:
            check_name("--optimizer", self.optimizer)
        require(self.steps >= 0, "--steps", self.steps, "an integer >= 0")
        require(not self.steps or self.optimizer is not None, "--optimizer", None, "a name, where --steps > 0")
        if self.loss is not None:
            check_name("--loss", self.loss)
        require(self.given.are_given, "--inputs", "not given", "--inputs FILE or --shape SIZES")
        require(self.out.absolute().parent.is_dir(), "--out", self.out, "a name in a folder that is there")
        check_can_write("--out", self.out)
        if self.weights is not None:
            from parity.records.dump_file import is_dump

            fine = self.weights.exists() or is_dump(self.weights)
            require(fine, "--weights", self.weights, "the name of a dump, or a file that is there")
        layer_map(self.map)

    def run(self) -> int:
        """Run the module and write both files; gives the exit status."""
        given, module = self.given.arrays(), module_of("module", self.module, self.given.seed)
        from parity.offline import dump
        from parity.records.dump_file import files_of

        with taken("the module", given):
            dump(
                module,
                given,
                self.out,
                **self.given.options(),
                train=not self.given.eval,
                weights=self.weights,
                flax_layout=self.flax,
                loss=None if self.loss is None else object_of("--loss", self.loss),
                layer_map=layer_map(self.map),
                optimizer=None if self.optimizer is None else object_of("--optimizer", self.optimizer),
                steps=self.steps,
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


CALLED = "keywords", "flax_inputs", "flax_call"


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
    keywords: Path | None = None
    """A .npz file of what the networks take by name: its names are those of the arguments."""
    flax_inputs: tuple[Path, ...] = ()
    """.npy files of what Flax is called with instead, in its layout."""
    flax_call: str | None = None
    """package.module:name or file.py:name of flax_call(module, variables, *inputs, train, **keywords)."""
    map: tuple[str, ...] = ()
    """Layers that are not paired rightly by order and kind, such as conv.0=Conv_0."""

    def __post_init__(self) -> None:
        check_name("--torch-module", self.torch_module)
        check_name("--flax-module", self.flax_module)
        layer_map(self.map)

    def run(self) -> int:
        """Convert; gives the exit status."""
        from parity.cli.convert import convert

        return convert(
            self.source,
            self.target,
            torch_module=self.torch_module,
            flax_module=self.flax_module,
            inputs=self.inputs,
            layer_map=self.map,
            **{name: value for name in CALLED if (value := getattr(self, name))},
        )


def layer_map(pairs: Sequence[str]) -> Mapping[str, str]:
    """{PyTorch's name: Flax's path} of "a.b=A/B" and so on."""
    for pair in pairs:
        require(pair.count("=") == 1, "--map", pair, "PyTorch's name=Flax's path, such as conv.0=Conv_0")
    return {pair.split("=")[0]: pair.split("=")[1] for pair in pairs}
