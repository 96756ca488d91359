"""The corpus of planted mistakes."""

from parity_tests.parity.planted import (
    attentions,
    counted,
    glue,
    initial,
    kernels,
    lone,
    networks,
    norms,
    orders,
    outputs,
    positions,
    tables,
    training,
    unets,
)
from parity_tests.parity.planted.chain import Case, Planted

CASES: list[Case] = [
    *norms.cases(),
    *kernels.cases(),
    *glue.cases(),
    *attentions.cases(),
    *training.cases(),
    *lone.cases(),
    *outputs.cases(),
    *unets.cases(),
    *positions.cases(),
    *counted.cases(),
    *tables.cases(),
    *orders.cases(),
    *networks.cases(),
    *initial.cases(),
]

__all__ = ["CASES", "Case", "Planted"]
