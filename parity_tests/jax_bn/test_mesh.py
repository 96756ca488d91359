"""Training over several devices is training on one: the same numbers, few collectives; and on one, the same program."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import image_data
import jax_bn.training
import torch_bn.training
from bn_common import run_folder
from bn_common.config import Config
from jax_bn import BLeNet, mesh, training
from jax_bn.devices import send
from parity.comparison import bounds
from parity_tests.jax_bn.over_devices import FORMS, batches, distances, program, trained
from parity_tests.test_options import trained as train_loop
from parity_tests.test_same_bytes import assert_same_bytes
from parity_tests.wings import promoting

ROOT = Path(__file__).parents[2]
# Even shares, and shares that differ; on each device enough images for the form for CPUs.
BATCHES = {"even": 36, "uneven": 37}
QUICKLY_COMPILED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
# Statistics forward and their gradient's sums backward, of each of BLeNet's four batch norms; all gradients with the
# metrics.
COLLECTIVES = 4 + 4 + 1


def check_float64(found):
    """The bounds between the wings, which round differently as well."""
    assert found["gradients"] <= bounds.FLOAT64
    assert found["losses"] <= bounds.FLOAT64_LOSSES_200_STEPS
    assert max(found["parameters"], found["statistics"]) <= bounds.FLOAT64_PARAMETERS_200_STEPS
    assert found["logits"] <= bounds.FLOAT64_LOGITS_200_STEPS


@pytest.mark.parametrize("batch", [pytest.param("even", marks=pytest.mark.thorough), "uneven"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("two_devices", "x64", "quickly_compiled")
def test_two_devices_in_float64(form, batch):
    check_float64(distances(*(trained(n, form, "float64", BATCHES[batch]) for n in (1, 2))))


def check_float32(found):
    """As `test_lockstep` has them: a loss is a mean of what the logits are made into, a moving statistic of outputs."""
    assert found["gradients"] <= bounds.FLOAT32_GRADIENTS
    assert found["parameters"] <= bounds.FLOAT32_PARAMETERS_200_SGD_STEPS
    assert max(found["losses"], found["statistics"], found["logits"]) <= bounds.FLOAT32_LOGITS_200_SGD_STEPS


@pytest.mark.parametrize("form", [pytest.param("layers", marks=pytest.mark.thorough), "cpu"])
@pytest.mark.usefixtures("two_devices")
def test_two_devices_in_float32(form):
    check_float32(distances(*(trained(n, form, "float32", BATCHES["uneven"]) for n in (1, 2))))


# Shares of 16 and 17; of 1 and 2; and of none: from 5 images, few steps, as they blow up rounding.
EIGHT = [
    ("float64", check_float64, ["cpu:133:50", "layers:11:50", "layers:5:3"]),
    pytest.param("float32", check_float32, ["cpu:133:50", "layers:133:50"], marks=pytest.mark.thorough),
]


@pytest.mark.parametrize(("dtype", "check", "cases"), EIGHT, ids=["float64", "float32"])
def test_eight_devices(dtype, check, cases):
    flags = f"{QUICKLY_COMPILED['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | QUICKLY_COMPILED | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "parity_tests.jax_bn.over_devices", "8", dtype, *cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(cases)
    for case in found:
        check(case)


def collectives(text):
    """How many there are in a compiled program's text, of any kind."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    return len(re.findall(rf" (?:{kinds})(?:-start)?\(", text))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("two_devices", "quickly_compiled")
def test_a_step_has_few_collectives(form, batch):
    devices, _, step, state = program(2, form, "float32", BATCHES[batch])
    x, labels, order = batches(BATCHES[batch], "float32", steps=1)
    indices, mask = mesh.shares(order[0], devices)
    masks = () if mask is None else (mask,)
    text = step.lower(state, x[indices], labels[indices], *masks).compile().as_text()
    assert collectives(text) == COLLECTIVES


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_sum_in_the_devices_order(platform):
    """On a CPU the collective only puts rows together, and cannot round; elsewhere it adds, and no more is sent."""
    devices = mesh.make_mesh(Config(devices=2, batch_size=4))

    def gradient(w, x):
        return jax.grad(lambda w: lax.psum((send(w, x) * x[0]).sum(), mesh.AXIS))(w)

    step = mesh.on_mesh(gradient, devices, (mesh.SAME, mesh.SHARE))
    w, x = jnp.ones(3), jnp.arange(6.0).reshape(2, 3)
    assert_same_bytes(step(w, x), x[0] + x[1])
    text = step.trace(w, x).lower(lowering_platforms=(platform,)).as_text()
    sums = re.findall(r"all_reduce.*?\) : \((tensor<.*?>)\) ->", text, re.DOTALL)
    assert ("tensor<2x3xf32>" in sums, "tensor<3xf32>" in sums) == (platform == "cpu", platform == "cuda")
    # Nothing is to be sent where there is one device, or x is the same on all.
    assert send(w, x) is w


@pytest.mark.parametrize("form", FORMS)
def test_on_one_device_it_is_the_plain_step(form):
    """To the letter: the program that there would be if nobody had ever thought of several devices."""
    devices, model, step, state = program(1, form, "float32", 36)
    x, labels, order = batches(36, "float32", steps=1)

    def plain(state, x, labels):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
            targets = optax.smooth_labels(jax.nn.one_hot(labels, 10, dtype=logits.dtype), 0.05)
            return optax.softmax_cross_entropy(logits, targets).mean(), (updated["batch_stats"], logits)

        gradients, (batch_stats, logits) = jax.grad(loss_fn, has_aux=True)(state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda g: -0.1 * g, gradients))
        weights = jnp.ones(len(labels), logits.dtype)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = (logits.argmax(-1).astype(labels.dtype) == labels).astype(weights.dtype)
        metrics = training.Metrics((losses * weights).sum(), (correct * weights).sum(), weights.sum())
        return training.TrainState(params, batch_stats, gradients), metrics

    batch, mask = mesh.shares(order[0], devices)
    assert mask is None
    texts = [f.lower(state, x[batch], labels[batch]).as_text() for f in (step, jax.jit(plain))]
    assert texts[0].replace("jit_step", "jit_plain") == texts[1]


@pytest.mark.usefixtures("two_devices", "x64", "quickly_compiled")
def test_local_statistics():
    """Each half of the batch for itself, as PyTorch's DDP: gradients are averaged, the first half's statistics kept."""
    _, model, step, state = program(2, "layers", "float64", 20, sync_bn="local")
    assert model.axis_name is None
    x, labels, (batch,) = batches(20, "float64", steps=1)
    new, _ = step(state, x[batch], labels[batch])
    alone = program(1, "layers", "float64", 10)[2]
    halves = [alone(state, x[half], labels[half])[0] for half in np.split(batch, 2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(half.opt_state for half in halves))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=bounds.FLOAT64)  # noqa: E731
    jax.tree.map(close, new.opt_state, mean)
    jax.tree.map(close, new.batch_stats, halves[0].batch_stats)
    together = program(2, "layers", "float64", 20)[2](state, x[batch], labels[batch])[0]
    assert any((abs(a - b) > 1e-6).any() for a, b in zip(*map(jax.tree.leaves, (new, together)), strict=True))


@pytest.mark.usefixtures("two_devices", "quickly_compiled")
def test_the_loop(tmp_path, monkeypatch):
    """Shares that differ, in training and in evaluation: the same lines of metrics, but for how fast it was."""
    monkeypatch.setattr(training, "EVAL_BATCH_SIZE", 33)
    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: b"")
    # Adam would make steps out of the rounding noise of biases before a batch norm.
    options = {"epochs": 1, "batch_size": 9, "optimizer": "sgd", "lr": 0.1}
    one, two, local = (
        train_loop("jax", tmp_path / str(i), **options, **each).metrics[0]
        for i, each in enumerate(({"devices": 1}, {"devices": 2}, {"devices": 2, "sync_bn": "local"}))
    )
    for key in ("step", "train_accuracy", "test_accuracy", "learning_rate"):
        assert one[key] == two[key]
    # 7 steps of float32; see `test_two_devices_in_float32`.
    assert two["loss"] == pytest.approx(one["loss"], abs=bounds.FLOAT32_LOGITS_200_SGD_STEPS)
    assert two["test_loss"] == pytest.approx(one["test_loss"], abs=bounds.FLOAT32_LOGITS_200_SGD_STEPS)
    assert abs(local["loss"] - one["loss"]) > 1e-3


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("num_devices", [1, 2])
def test_slices_are_the_batches(num_devices):
    """Of an epoch put in order once, to the bit what is fetched step by step."""
    sample, batch_size = image_data.load_sample(), 37
    cut = sample._replace(train_images=sample.train_images[:300], train_labels=sample.train_labels[:300])
    devices = mesh.make_mesh(Config(devices=num_devices))
    data, _ = training.to_device(cut, devices)
    batches = np.stack(list(image_data.epoch_batches(300, batch_size, seed=2, epoch=1)))
    size = len(mesh.shares(batches[0], devices)[0]) // num_devices
    in_order = training.DeviceData(mesh.SHARE, mesh.SHARE, mesh.SAME, mesh.SAME)
    permuted = mesh.on_mesh(training.DeviceData.permuted, devices, (mesh.SAME, mesh.SHARE), in_order)
    epoch = permuted(data, mesh.in_turn(batches, devices))
    both = mesh.SHARE, mesh.SHARE
    sliced = mesh.on_mesh(lambda data, k: data.slice(k, size), devices, (in_order, mesh.SAME), both)
    fetched = mesh.on_mesh(training.DeviceData.batch, devices, (mesh.SAME, mesh.SHARE), both)
    for step, batch in enumerate(batches):
        indices, _ = mesh.shares(batch, devices)
        assert_same_bytes(sliced(epoch, np.int32(step)), fetched(data, indices))
    assert len(batches) == 8


@pytest.mark.parametrize("loop", ["jax", "torch"])
@pytest.mark.usefixtures("two_devices", "quickly_compiled")
def test_the_loop_with_slices(loop, tmp_path, monkeypatch):
    """As on an accelerator: two epochs end as they do where each batch is fetched."""
    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: b"")
    options = {"batch_size": 9, "optimizer": "sgd", "lr": 0.1, "devices": 2 if loop == "jax" else 1}
    fetched = train_loop(loop, tmp_path / "fetched", **options).metrics
    monkeypatch.setattr(jax_bn.training if loop == "jax" else torch_bn.training, "GATHERING", frozenset())
    sliced = train_loop(loop, tmp_path / "sliced", **options).metrics
    assert len(sliced) == 2
    for one, other in zip(fetched, sliced, strict=True):
        # The batches are the same to the bit; XLA may fuse what reads them otherwise.
        rounding = bounds.FLOAT32_LOGITS_200_SGD_STEPS if loop == "jax" else 0
        assert other["loss"] == pytest.approx(one["loss"], abs=rounding, rel=0)
        assert other["test_loss"] == pytest.approx(one["test_loss"], abs=rounding, rel=0)


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_step_on_accelerators_gathers_nothing(platform):
    """Lowered for them on this machine: a slice of the images, where fetching them would be a gather."""
    devices, in_order = mesh.make_mesh(Config(devices=2)), training.DeviceData(*[mesh.SHARE] * 2, *[mesh.SAME] * 2)
    model = BLeNet(fig_size=12, platform=platform, axis_name=mesh.AXIS)
    optimizer = promoting(optax.sgd(0.1))
    state = training.init_state(model, optimizer, 0)
    data = training.DeviceData(np.zeros((64, 12, 12), np.uint8), np.zeros(64, np.int32), np.float32(0), np.float32(1))
    texts = []
    for read, kinds in (
        (lambda data, k: data.slice(k, 4), (in_order, mesh.SAME)),
        (lambda data, indices: data.batch(indices), (mesh.SAME, mesh.SHARE)),
    ):

        def step(state, data, where, read=read):
            x, labels = read(data, where)
            return training.train_step(model, optimizer, state, x, labels, axis_name=mesh.AXIS)

        where = np.int32(1) if kinds[0] is in_order else np.arange(8, dtype=np.int32)
        traced = mesh.on_mesh(step, devices, (mesh.SAME, *kinds)).trace(state, data, where)
        texts.append(traced.lower(lowering_platforms=(platform,)).as_text())
    # Of images; what is as small as labels and statistics does not matter.
    assert [bool(re.search(r"stablehlo\.gather.*ui8", text)) for text in texts] == [False, True]
    assert "stablehlo.dynamic_slice" in texts[0]


def test_shares():
    """In order, of sizes that differ by one at most; what fills them up does not count."""
    devices = type("Mesh", (), {"size": 4})
    indices, mask = mesh.shares(np.arange(100, 108), devices)
    assert (indices.tolist(), mask) == (list(range(100, 108)), None)
    for count in (1, 2, 3, 5, 11):
        batch = np.arange(100, 100 + count)
        indices, mask = mesh.shares(np.stack([batch, batch[::-1]]), devices)
        assert (indices[:, mask] == [batch, batch[::-1]]).all()
        sizes = mask.reshape(4, -1).sum(1)
        assert sizes.max() - sizes.min() <= 1
        assert np.isin(indices, batch).all()


@pytest.mark.usefixtures("two_devices")
def test_refused():
    with pytest.raises(ValueError, match=r"--devices is \d+; allowed: 1 to \d+, the cpu devices there are"):
        mesh.make_mesh(Config(devices=jax.device_count() + 1))
    with pytest.raises(ValueError, match="--batch-size is 3; allowed: 4 or more with --sync-bn local on 2 devices"):
        mesh.make_mesh(Config(devices=2, batch_size=3, sync_bn="local"))
    assert mesh.make_mesh(Config(devices=2, batch_size=3)).size == 2
    assert mesh.make_mesh(Config(batch_size=2)).size == jax.device_count()
