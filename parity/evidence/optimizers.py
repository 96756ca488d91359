"""The two optimisers' rules by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

from parity.diagnosis.finding import Located
from parity.diagnosis.optimizer.family import probe_findings
from parity.pairing.layers import Pairing
from parity.records.answers import ProbeError
from parity.records.recording import Recording
from parity.sides import jax as flax_side


def rule_findings(
    pairing: Pairing, recording: Recording, optimizers: tuple[Callable, Any]
) -> tuple[list[Located], list[str]]:
    """Whether the two optimisers are the same update rule: (findings, notes)."""
    parameters = _parameters(pairing, recording)
    moved = pairing.to_flax(parameters)
    tree = unflatten_dict({name.removeprefix("params/"): a for name, a in moved.items()}, sep="/")

    def to_torch(tree: Any) -> dict[str, NDArray]:
        arrays = {f"params/{name}": np.asarray(a) for name, a in flatten_dict(tree, sep="/").items()}
        return pairing.to_torch(arrays)

    try:
        with flax_side.environment(float64=True):
            found = probe_findings(*optimizers, torch_params=parameters, flax_params=tree, to_torch=to_torch)
    except ProbeError as error:
        return [], [f"the optimisers' rules were not compared by themselves: {error}"]
    return [Located("optimizer", i, "", "", finding) for i, finding in enumerate(found)], []


def _parameters(pairing: Pairing, recording: Recording) -> dict[str, NDArray]:
    """PyTorch's parameters that both sides have, in the module's order."""
    both = {t for t, _, _ in pairing.tensors()}
    return {name: a for name, a in recording.tensors.items() if name in recording.gradients and name in both}
