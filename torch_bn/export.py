"""Write a run's network into one ONNX file, which predicts without this project, and without PyTorch.

    python -m torch_bn.export runs/mine --out fashion.onnx
    python -m torch_bn.export runs/mine --out fashion.onnx --fold

Weights, moving statistics and the standardisation of the images are inside. A program with nothing but ONNX Runtime has
the logits of raw images, from one image on:

    network = onnxruntime.InferenceSession("fashion.onnx")
    (logits,) = network.run(None, {"images": images})    # uint8 [b, 28, 28] -> float32 [b, 10]

`jax_bn/export.py` does the same with `--format onnx`; without, it writes by `jax.export`, which PyTorch has not.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from bn_common.checks import require
from bn_common.command_line import parse, refuse
from bn_common.files import write_whole
from bn_common.onnx_files import IMAGES, LOGITS, OPSET, check_installed
from bn_common.trained import Trained, check_new_file, function_name, read_trained
from torch_bn.layers import BatchNorm
from torch_bn.predict import Predictor, network

PROG = "python -m torch_bn.export"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is exported, and where to."""

    run: tyro.conf.Positional[Path]
    """The run folder, of python -m torch_bn.training."""
    out: Path
    """The new file."""
    fold: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Each batch norm goes into the layer before it: a smaller program, whose last digits differ."""


def exported(run: Trained, *, fold: bool = False) -> bytes:
    """The file's content.

    Args:
      run: of PyTorch's wing, in float32.
      fold: have no batch norm in it, see `folded`.

    Raises:
      ValueError: onnx or onnxscript is not installed, the run is in bfloat16, or the weights are another network's.
    """
    check_installed()
    require(run.precision == "float32", "the run's precision", run.precision, "float32, which all that reads ONNX has")
    model = network(run)
    predictor = Predictor(folded(model) if fold else model, run.levels).eval()
    images = torch.zeros(2, run.fig_size, run.fig_size, dtype=torch.uint8)
    # What PyTorch's exporter warns of and prints is about itself.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            predictor,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("b", min=1)},),
            opset_version=OPSET,
            input_names=[IMAGES],
            output_names=[LOGITS],
            verbose=False,
        )
    assert program is not None, "dynamo gives one"
    found = program.model_proto
    found.graph.name = function_name(run.is_fashion_mnist)
    _without_source_paths(found)
    content: bytes = found.SerializeToString(deterministic=True)
    return content


def folded(model: nn.Module) -> nn.Module:
    """A copy that predicts the same without batch norm, of a network of `nn.Sequential`s. PyTorch only: XLA fuses it.

    With s = gamma / sqrt(moving_var + eps), the layer before has weight * s and (bias - moving_mean) * s + beta
    instead, worked out in float64 and rounded once.
    """
    model = copy.deepcopy(model)
    for chain in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for at, (layer, norm) in enumerate(itertools.pairwise(chain)):
            if isinstance(norm, BatchNorm) and isinstance(layer, nn.Conv2d | nn.Linear):
                _fold(layer, norm)
                chain[at + 1] = nn.Identity()
    return model


@torch.no_grad()
def _fold(layer: nn.Conv2d | nn.Linear, norm: BatchNorm) -> None:
    """Change the layer, see `folded`. PyTorch only."""
    assert norm.gamma is not None, "BLeNet's have both"
    assert norm.beta is not None, "BLeNet's have both"
    assert layer.bias is not None, "BLeNet's have one"
    gamma, beta, mean, var = (v.double() for v in (norm.gamma, norm.beta, norm.moving_mean, norm.moving_var))
    factor = gamma / (var + norm.eps).sqrt()
    weight = layer.weight.double() * factor.reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight.copy_(weight)
    layer.bias.copy_((layer.bias.double() - mean) * factor + beta)


def _without_source_paths(model: Any) -> None:
    """Take out where in whose source each node comes from. PyTorch only: JAX is told beforehand not to keep it."""
    model.ClearField("metadata_props")
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def main(args: Sequence[str] | None = None) -> None:
    """The program: exit status 2 and one line for what it refuses."""
    options = parse(Options, args, prog=PROG, description=__doc__ or "")
    try:
        check_new_file("--out", options.out)
        check_installed()
        content = exported(read_trained(options.run, "torch"), fold=options.fold)
        write_whole(options.out, content)
    except ValueError as error:
        refuse(PROG, str(error))
    except OSError as error:
        refuse(PROG, f"--out is {options.out}: {error.strerror}; allowed: a new file")
    print(f"{options.out}: {len(content):,} bytes, ONNX of opset {OPSET}")


if __name__ == "__main__":
    main()
