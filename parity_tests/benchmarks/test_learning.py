"""What the two studies of learning share, and their pages; on a part of the sample."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

import parity
from benchmarks import accuracy, why_batch_norm
from benchmarks.learning.networks import LeNet, torch_lenet
from benchmarks.learning.pool import in_parallel
from benchmarks.learning.runs import Run, begin_jax, index_batches, train
from image_data import load_sample

STUDIES = {"accuracy": accuracy, "why_batch_norm": why_batch_norm}


@pytest.fixture(scope="module")
def small():
    """640 training images and 100 to test on."""
    sample = load_sample()
    return sample._replace(
        train_images=sample.train_images[:640],
        train_labels=sample.train_labels[:640],
        test_images=sample.test_images[:100],
        test_labels=sample.test_labels[:100],
    )


@pytest.mark.thorough
def test_lenet_is_one_network_without_batch_norm():
    """The same function in both wings, with BLeNet's other parameters and no batch norm's."""
    model, flax_model = torch_lenet(), LeNet()
    x = jax.random.normal(jax.random.key(0), (2, 28, 28, 1))
    names = {
        jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(flax_model.init(jax.random.key(0), x, True))
    }
    assert not any("BatchNorm" in name for name in names)
    assert sum(p.numel() for p in model.parameters()) == 62158 - 2 * (6 + 16 + 120 + 84)
    assert parity.check(model, flax_model, np.zeros((2, 1, 28, 28), np.float32) + np.arange(28) / 28).ok


@pytest.mark.parametrize("wing", [pytest.param("jax", marks=pytest.mark.thorough), "torch"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_run_is_the_same_each_time_and_learns(wing, batch_norm, small):
    run = Run(wing, batch_norm, "adamw", 0.01, 4, seed=0)
    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction promotes
        found, again = train(run, small), train(run, small)
    assert set(found) == ({"moving", "precise"} if batch_norm else {"moving"})
    assert all(len(values) == 4 for values in found.values())
    assert all(0 <= value <= 1 for values in found.values() for value in values)
    assert again == found
    if batch_norm:  # chance is 0.1, of 100 images with a standard deviation of 0.03
        assert found["precise"][-1] > 0.3


def test_held_out_images_are_trained_on_by_nobody(small):
    part = Run("jax", True, "sgd", 0.1, 1, seed=0, held_out=100).part(small)
    assert len(part.train_labels) == 540
    assert np.array_equal(part.test_images, small.train_images[-100:])
    assert np.array_equal(part.train_images, small.train_images[:-100])


@pytest.mark.thorough
def test_precise_statistics_leave_the_run_as_it_is(small):
    """Looking at the accuracy changes nothing of what is trained."""
    run = Run("jax", True, "sgd", 0.5, 1, seed=0)
    looked, alone = begin_jax(run, small), begin_jax(run, small)
    for indices in index_batches(run, 640):
        looked.accuracy(True)
        looked.step(indices)
        alone.step(indices)
    assert looked.accuracy(False) == alone.accuracy(False)
    images = np.arange(3, dtype=np.int32)
    for name, value in looked.intermediates(images).items():
        assert np.array_equal(value, alone.intermediates(images)[name])


@dataclasses.dataclass(frozen=True)
class Job:
    """A number."""

    number: int


def process_of(job, dataset):
    """Which process did it, and on how many cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return {"number": job.number, "pid": os.getpid(), "cores": cores}


@pytest.mark.thorough
def test_what_is_finished_is_kept(tmp_path, small):
    """In processes of one core; the second time nothing is done again; other data are another thing."""
    small = small._replace(train_images=small.train_images[:2], test_images=small.test_images[:2])
    jobs, folder = [Job(1), Job(2)], tmp_path / "runs"
    first = dict(in_parallel(process_of, jobs, small, folder))
    assert {found["cores"] for found in first.values()} == {1}
    assert os.getpid() not in {found["pid"] for found in first.values()}
    assert len(list(folder.iterdir())) == 2
    again = dict(in_parallel(process_of, [Job(1), Job(3)], small, folder))
    assert again[Job(1)] == first[Job(1)]
    assert again[Job(3)]["number"] == 3
    other = dict(in_parallel(process_of, [Job(1)], small._replace(name="x", test_images=1 - small.test_images), folder))
    assert other[Job(1)]["pid"] != first[Job(1)]["pid"]


def of_run(run, dataset):
    """In place of training: more with batch norm, and no two seeds alike."""
    last = (
        0.9 + 0.02 * run.batch_norm + 0.001 * run.seed + 0.0001 * (run.wing == "jax") if run.seed < 100 else run.lr / 9
    )
    curve = [last / 2] * (run.epochs - 1) + [last]
    return {"moving": curve, "precise": curve} if run.batch_norm else {"moving": curve}


def test_the_page_of_the_accuracy_study(monkeypatch, tmp_path, capsys):
    """A row for each kind, wing and statistics, the rate that did best without batch norm, bounds, a figure."""
    monkeypatch.setattr(
        accuracy, "in_parallel", lambda work, jobs, dataset, _: ((job, of_run(job, dataset)) for job in jobs)
    )
    page, figures = tmp_path / "page.md", tmp_path / "a.json"
    accuracy.main(["--data", "sample", "--seeds", "3", "--write", str(page), "--json", str(figures)])
    found = json.loads(figures.read_text())
    assert len(found["rows"]) == 2 * (3 * 2 + 2)
    default = next(row for row in found["rows"] if (row["title"], row["wing"]) == ("with batch norm, adamw", "torch"))
    assert np.isclose(default["mean"], 0.921)
    assert np.isclose(default["std"], 0.001)
    assert {row["lr"] for row in found["rows"] if row["title"] == "without batch norm, sgd"} == {10}
    text = page.read_text()
    assert "jax, with batch norm, adamw: 0.9211, bound 0.918: met" in text
    assert "0.0001 apart, 0.1 standard errors" in text
    assert str(tmp_path) not in text
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert "bound 0.918: met" in capsys.readouterr().out


def test_the_page_of_what_batch_norm_does(monkeypatch, tmp_path, capsys):
    def at_once(work, jobs, dataset, _):
        for job in jobs:
            if work is why_batch_norm.steps_to_accuracy:
                steps = round(100 / job.run.lr) if job.run.batch_norm or job.run.lr < 1 else None
                yield job, {"steps": steps, "best": 0.85 if steps else 0.1}
            else:
                layers = [*why_batch_norm.LAYERS, *(f"BatchNorm_{n}" for n in range(4) if job.batch_norm)]
                yield job, {name: [[-1.0, 0.25 * epoch, 1.0] for epoch in range(3)] for name in layers}

    monkeypatch.setattr(why_batch_norm, "in_parallel", at_once)
    page = tmp_path / "page.md"
    why_batch_norm.main(["--data", "sample", "--write", str(page)])
    text = page.read_text()
    assert "not reached; best 0.1000" in text
    assert "With batch norm it got there at 7 of 7 rates, fastest in 10 steps, at a rate of 10." in text
    assert "Without batch norm it got there at 4 of 7 rates" in text
    assert "0.50" in text
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert "steps without" in capsys.readouterr().out


def test_steps_and_quantiles(small):
    """Steps are counted until the accuracy is there; batch norm's output has mean 0 before the first step."""
    run = Run("jax", True, "sgd", 1.0, 12, seed=0, schedule="constant")
    found = why_batch_norm.steps_to_accuracy(why_batch_norm.Search(run, 0.2), small)
    assert found["steps"] == 100
    assert found["best"] >= 0.2
    never = why_batch_norm.Search(dataclasses.replace(run, lr=1e-6, epochs=10), 0.9)
    assert why_batch_norm.steps_to_accuracy(never, small)["steps"] is None
    seen = why_batch_norm.quantiles_by_epoch(dataclasses.replace(run, epochs=1), small)
    assert len(seen["Conv_0"]) == len(seen["BatchNorm_3"]) == 2
    learner = begin_jax(run, small)
    before = learner.intermediates(np.arange(100, dtype=np.int32))
    assert np.allclose(before["BatchNorm_2"].mean(0), 0, atol=1e-5)
    assert np.array_equal(seen["BatchNorm_2"][0], np.quantile(before["BatchNorm_2"], why_batch_norm.QUANTILES))


@pytest.mark.parametrize(
    ("study", "args"),
    [
        ("accuracy", ["--seeds", "1"]),
        ("accuracy", ["--epochs", "0"]),
        ("accuracy", ["--runs", __file__]),
        ("accuracy", ["--write", "no/such/file"]),
        ("why_batch_norm", ["--accuracy", "1"]),
        ("why_batch_norm", ["--epochs", "0"]),
        ("why_batch_norm", ["--seed", "-1"]),
        ("why_batch_norm", ["--runs", __file__]),
    ],
    ids=str,
)
def test_bad_options(study, args, capsys):
    with pytest.raises(SystemExit) as stop:
        STUDIES[study].main(["--data", "sample", *args])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert args[-1] in err
    assert "allowed: " in err
