"""PyTorch's processes and JAX's devices: 50 steps from shared weights, uneven shares; each as one process, too."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

import jax_bn
from parity import weights
from parity.comparison import bounds
from parity_tests.jax_bn.over_devices import FIG_SIZE, as_run, distances, trained
from parity_tests.test_batch_norm import check
from parity_tests.test_processes import ROOT, end, free_port
from parity_tests.torch_bn import over_processes
from parity_tests.wings import WINGS, Result

BATCH_SIZE = 37


def run_processes(path, dtype, count=2):
    """What rank 0 has written."""
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "OMP_NUM_THREADS")
    port, processes = str(free_port()), []
    command = [sys.executable, "-m", "parity_tests.torch_bn.over_processes", str(path), dtype, str(BATCH_SIZE)]
    for rank in range(count):
        own = dict(zip(names, ("127.0.0.1", port, str(count), str(rank), "1"), strict=True))
        processes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * count, errors
    finally:
        end(processes)
    return np.load(path)


def in_flax(dtype, losses, gradients, state):
    """A run as `over_devices.trained` gives it, by JAX's names; the logits are left out."""
    model, flax = over_processes.initial_model(dtype), jax_bn.BLeNet(fig_size=FIG_SIZE)
    carried = []
    for tensors in (state, gradients):
        model.load_state_dict({name: torch.from_numpy(v) for name, v in tensors.items()}, strict=False)
        with jax.enable_x64(dtype == "float64"):
            carried.append(jax.device_get(weights.to_flax(model, flax)))
    variables, gradients = carried
    return as_run(losses, gradients["params"], variables, np.zeros(1))


def check_distances(apart, dtype):
    """The bounds between the wings on one device."""
    if dtype == "float64":
        assert apart["gradients"] <= bounds.FLOAT64
        assert apart["losses"] <= bounds.FLOAT64_LOSSES_200_STEPS
        assert max(apart["parameters"], apart["statistics"]) <= bounds.FLOAT64_PARAMETERS_200_STEPS
    else:
        assert apart["gradients"] <= bounds.FLOAT32_GRADIENTS
        assert apart["parameters"] <= bounds.FLOAT32_PARAMETERS_200_SGD_STEPS
        assert max(apart["losses"], apart["statistics"]) <= bounds.FLOAT32_LOGITS_200_SGD_STEPS


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.usefixtures("two_devices")
def test_both_wings_over_two(dtype, tmp_path, monkeypatch):
    found = run_processes(tmp_path / "found.npz", dtype)
    parts = {
        part: {k.partition("/")[2]: v for k, v in found.items() if k.startswith(part)} for part in ("state", "grad")
    }
    processes = in_flax(dtype, found["losses"], parts["grad"], parts["state"])
    alone = over_processes.initial_model(dtype)
    losses, gradients = over_processes.trained(alone, dtype, BATCH_SIZE)
    one = in_flax(dtype, losses, gradients, {name: v.numpy() for name, v in alone.state_dict().items()})
    with jax.enable_x64(dtype == "float64"):
        variables = weights.to_flax(over_processes.initial_model(dtype), jax_bn.BLeNet(fig_size=FIG_SIZE))
        devices = trained(2, "layers", dtype, BATCH_SIZE, variables=variables)
    for other in (one, (*devices[:3], np.zeros(1))):
        check_distances(distances(other, processes), dtype)
    for kind in over_processes.NORMS:
        result = Result(*(found[f"norm/{kind}/{i}"] for i in range(6)))
        monkeypatch.setitem(WINGS, "processes", lambda *_, result=result, **__: result)
        check("processes", over_processes.inputs(kind, dtype), dtype, train=True, unbiased_moving_var=True)
    # Each with its own statistics: what `DistributedDataParallel` does, and --sync-bn local in JAX.
    local = {k.removeprefix("local/"): v for k, v in found.items() if k.startswith("local/")}
    parts = {part: {k.removeprefix(part): v for k, v in local.items() if part in k} for part in ("state/", "gradient/")}
    local = in_flax(dtype, local["losses"], parts["gradient/"], parts["state/"])
    with jax.enable_x64(dtype == "float64"):
        devices = trained(2, "layers", dtype, BATCH_SIZE, variables=variables, sync_bn="local")
    check_distances(distances((*devices[:3], np.zeros(1)), local), dtype)
    assert distances(processes, local)["losses"] > 1e-3
