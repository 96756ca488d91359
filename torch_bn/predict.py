"""What a trained network makes of image files: class names and probabilities. `jax_bn/predict.py` is the same.

    python -m torch_bn.predict runs/mine shoe.png shirt.jpg
    python -m torch_bn.predict runs/mine photo.jpg --resize --invert --json
    python -m torch_bn.predict fashion.onnx shoe.png          what python -m torch_bn.export has written, or JAX's

Images are made grey, and have to be of the size that the network was trained on, bright on black, unless --resize and
--invert say otherwise. A wrong file is told in one line, the others are still predicted; the exit status is 2 then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bn_common.config import NUM_CLASS
from bn_common.onnx_files import of_onnx
from bn_common.predict import program
from bn_common.predictions import Network
from bn_common.trained import Trained, check_weights, class_names, read_trained
from torch_bn.blenet import BLeNet

PROG = "python -m torch_bn.predict"


def network(run: Trained) -> BLeNet:
    """The network of a run, with its weights, in prediction.

    Raises:
      ValueError: the weights are another network's.
    """
    dtype = None if run.precision == "float32" else getattr(torch, run.precision)
    model = BLeNet(channels=1, fig_size=run.fig_size, num_class=NUM_CLASS, eps=run.epsilon, dtype=dtype)
    check_weights(run.weights, {name: tuple(v.shape) for name, v in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(v) for name, v in run.weights.items()})
    return model.eval()


class Predictor(nn.Module):
    """The module that predicts: raw images uint8 [b, H, W] -> logits float32 [b, num_class].

    PyTorch only: JAX exports a function. `torch.onnx` takes a module.
    """

    levels: Tensor

    def __init__(self, model: nn.Module, levels: NDArray[np.float32]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("levels", torch.from_numpy(levels))

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.model(self.levels[images.to(torch.int64)][:, None])
        return logits


def predictor(run: Trained) -> nn.Module:
    """The module that predicts, and that is exported: raw images uint8 [b, H, W] -> logits float32 [b, num_class]."""
    return Predictor(network(run), run.levels).eval()


def of_run(run: Trained) -> Network:
    """A run's network, on a GPU where there is one.

    Raises:
      ValueError: the weights are another network's.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _network(predictor(run).to(device), device, run.fig_size, class_names(run.is_fashion_mnist, NUM_CLASS))


def _network(
    function: Callable[[Tensor], Tensor], device: torch.device, fig_size: int, classes: Sequence[str]
) -> Network:
    @torch.no_grad()
    def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = function(torch.from_numpy(images).to(device)).cpu().numpy()
        return found

    return Network(logits, fig_size, classes)


def load(path: Path) -> Network:
    """The network of a run folder, or of an exported file, which ONNX Runtime runs.

    Raises:
      ValueError: it is neither.
    """
    return of_onnx(path) if path.is_file() else of_run(read_trained(path, "torch"))


def main(args: Sequence[str] | None = None) -> None:
    """The program: exit status 2 and one line for what it refuses."""
    program(args, prog=PROG, description=__doc__ or "", load=load)


if __name__ == "__main__":
    main()
