"""The table of porting mistakes: every code that a finding may have, and what is to be known about it.

`docs/parity_mistakes.md`, `docs/gallery.md` and the list of what the tests plant are made from it. A new mistake is a
row here, a way to see it in the file of its family, and a way to plant it in `parity_tests/parity/planted`.
"""

from __future__ import annotations

from typing import NamedTuple

from parity.diagnosis.fixes import FIXES, Fix


class Mistake(NamedTuple):
    """One known mistake.

    Attributes:
      code: its name.
      phase: one of `parity.records.recording.PHASES`: where it shows. One of "forward" that leaves the outputs as they
        are (a bias in front of a batch norm) is told in the first phase that differs.
      charges: which part of what lies between two layers is charged, where it is found there: "activation", "pool",
        "dropout" or "flatten". "", and everywhere else: the layer itself.
      sentence: what the mistake is.
      one_sided: whether it may be a parameter that one side only has. That is known before any number differs.
      convention: what is to be said, where it is no mistake of the port, but a convention of the frameworks themselves.
    """

    code: str
    phase: str
    charges: str
    sentence: str
    one_sided: bool = False
    convention: str = ""

    @property
    def fix(self) -> Fix:
        """What to write instead, in both frameworks."""
        return FIXES[self.code]


# The order is the rank: of two at one place the upper one is named first, as the lower one may follow from it.
TABLE = (
    Mistake(
        "no-partner",
        "forward",
        "",
        "a layer, parameter, statistic or output that one side only has",
        one_sided=True,
    ),
    # norms
    Mistake("eval-uses-batch-statistics", "forward", "", "prediction normalises with the batch's own statistics"),
    Mistake("train-uses-moving-statistics", "forward", "", "training normalises with the moving statistics"),
    Mistake("wrong-reduction-axes", "forward", "", "statistics per row, per pixel or per image"),
    Mistake("per-device-statistics", "forward", "", "statistics of half a batch, or a quarter"),
    Mistake("affine-swapped", "forward", "", "gamma and beta exchanged"),
    Mistake(
        "norm-offset", "forward", "", "the scale taken for gamma - 1 on one side: x_hat is multiplied by 1 + scale"
    ),
    Mistake("affine-missing", "forward", "", "gamma and beta not loaded, or not there", one_sided=True),
    Mistake("bias-missing", "forward", "", "a layer without bias on one side", one_sided=True),
    Mistake("variance-ddof", "forward", "", "normalises with a variance divided by n - 1 for n"),
    Mistake("epsilon-outside-sqrt", "forward", "", "sqrt(var) + eps for sqrt(var + eps)"),
    Mistake("epsilon", "forward", "", "1e-3 for 1e-5, and so on"),
    Mistake("initial-variance", "forward", "", "moving_var starts at 0 on one side, at 1 on the other"),
    Mistake("statistics-frozen", "statistics", "", "the moving statistics never move"),
    Mistake("momentum-inverted", "statistics", "", "the weight of the old value taken for the weight of the new one"),
    Mistake("momentum", "statistics", "", "another momentum, neither equal nor the complement"),
    Mistake(
        "unbiased-variance",
        "statistics",
        "",
        "the moving variance is kept times m/(m-1) on one side",
        convention="PyTorch's BatchNorm keeps it so, and Flax's does not: no mistake of the port",
    ),
    Mistake("stopped-statistics-gradient", "backward", "", "mean and var taken as constants in the derivative"),
    Mistake("tied-weights", "backward", "", "one tensor of two layers on one side, a copy for each on the other"),
    Mistake(
        "padding-index", "backward", "", "a row of an embedding that one side does not train: padding_idx=, or a mask"
    ),
    # products
    Mistake("kernel-transposed", "forward", "", "the matrix of a linear layer not transposed"),
    Mistake("kernel-layout", "forward", "", "OIHW read as HWIO, axes exchanged"),
    Mistake("kernel-flipped", "forward", "", "true convolution for correlation"),
    Mistake("kernel-hw-swapped", "forward", "", "height and width exchanged"),
    Mistake("stride", "forward", "pool", "another stride, of a convolution or a pool"),
    Mistake("dilation", "forward", "", "another dilation"),
    Mistake("padding", "forward", "pool", "SAME for explicit padding, circular for zeros, none"),
    Mistake("matmul-precision", "forward", "", "TF32 or bfloat16 products"),
    Mistake(
        "weight-order",
        "forward",
        "",
        "weights of one shape in each other's place: layers of a list or a stack, gates of a cell, keys and values",
    ),
    # between two layers
    Mistake("activation", "forward", "activation", "tanh-GELU for GELU, SiLU for sigmoid, another slope, none"),
    Mistake("gate", "forward", "activation", "another activation in a gated unit, or of the other half"),
    Mistake("pool-kind", "forward", "pool", "maximum for average"),
    Mistake("pool-count-padding", "forward", "pool", "padding counted in the average on one side"),
    Mistake("norm-after-activation", "forward", "", "batch norm on the wrong side of the activation"),
    Mistake("norm-position", "forward", "", "a norm before a branch for one behind its sum: pre-norm, post-norm"),
    Mistake("dropout-active", "forward", "dropout", "dropout left on in prediction"),
    Mistake("flatten-order", "forward", "flatten", "C, H, W for H, W, C behind a flatten"),
    Mistake("concat-order", "forward", "", "blocks of channels joined or shuffled in another order"),
    Mistake("resize", "forward", "", "an image resized by another method: nearest, bilinear, corners, antialiasing"),
    Mistake("pad-mode", "forward", "", "zeros for reflected or repeated borders, where a function pads"),
    Mistake("attention-heads", "forward", "", "heads, q, k, v of one projection, or rotary pairs taken otherwise"),
    Mistake("attention-scale", "forward", "", "1/sqrt(d) left out, or another factor"),
    Mistake("attention-mask", "forward", "", "the causal mask left out or one off, padding seen, a mask inverted"),
    Mistake("softmax-axis", "forward", "", "softmax over another axis"),
    Mistake("position-ids", "forward", "", "positions that count padding, or begin at another number"),
    Mistake("output-taken-early", "forward", "", "an output of the network taken before or behind another layer"),
    # the network's input
    Mistake("input-layout", "forward", "", "NHWC read as NCHW, height and width exchanged"),
    Mistake("input-scale", "forward", "", "0..255 for 0..1"),
    # loss
    Mistake("label-offset", "loss", "", "labels from 1"),
    Mistake("ignore-index", "loss", "", "padded labels left out on one side only, or left out and counted in the mean"),
    Mistake("huber-delta", "loss", "", "a Huber loss for a smooth L1, which divides by beta"),
    Mistake("loss-reduction", "loss", "", "sum for mean"),
    # optimisers
    Mistake(
        "gradient-clipping",
        "optimizer",
        "",
        "gradients clipped on one side only, or otherwise: each tensor, by value, behind the rule, norm + 1e-6",
    ),
    Mistake("adam-epsilon", "optimizer", "", "another epsilon, or inside the root"),
    Mistake("bias-correction", "optimizer", "", "Adam without it"),
    Mistake("weight-decay-coupling", "optimizer", "", "L2 for decoupled weight decay"),
    Mistake("momentum-dampening", "optimizer", "", "dampening on one side"),
    Mistake("nesterov", "optimizer", "", "Nesterov's momentum on one side"),
    Mistake("learning-rate", "optimizer", "", "a factor between the learning rates"),
    # new networks
    Mistake(
        "initialisation",
        "initialisation",
        "",
        "new weights drawn otherwise: fan, gain, uniform or normal, cut off or not, a bias of zeros",
    ),
)
MISTAKES = {mistake.code: mistake for mistake in TABLE}

# No mistakes, and therefore not in the table. A finding may be the first; the report alone says the other two.
UNEXPLAINED = "unexplained"
"""The sides differ, and no known mistake does that."""
NOT_COMPARED = "not-compared"
"""The first number that differs is not finite, so that what follows says nothing."""
COULD_NOT_RUN = "could-not-run"
"""One side failed in this part of the comparison."""

_RANK = {code: rank for rank, code in enumerate([*MISTAKES, UNEXPLAINED])}


FIRST_OF = {
    "norm": "eval-uses-batch-statistics",
    "product": "kernel-transposed",
    "between": "activation",
    "input": "input-layout",
    "loss": "label-offset",
    "optimizer": "gradient-clipping",
    "initialisation": "initialisation",
}
"""Of each family the first in the table: from there on it looks for all, up to the next."""


def codes_of(family: str) -> tuple[str, ...]:
    """What a family looks for, by its name in `FIRST_OF`."""
    codes, firsts = [*MISTAKES], [*FIRST_OF.values(), None]
    end = firsts[firsts.index(FIRST_OF[family]) + 1]
    return tuple(codes[codes.index(FIRST_OF[family]) : len(codes) if end is None else codes.index(end)])


def rank(code: str) -> int:
    """The place in the table; what is unexplained comes last."""
    return _RANK[code]


def phase_of(code: str) -> str:
    """The phase in which it shows; of what is unexplained "forward": in the first that differs."""
    return MISTAKES[code].phase if code in MISTAKES else "forward"


def is_one_sided(code: str) -> bool:
    """Whether it may be a parameter that one side only has."""
    return code in MISTAKES and MISTAKES[code].one_sided
