"""Checkpoints on disk: a flipped byte is found, the newest whole one is taken, the last and the best are kept."""

import hashlib
import json
import os

import pytest

from bn_common.checkpoints import (
    DAMAGED,
    SEAL,
    Place,
    UnfitError,
    check_arrays,
    describe,
    newest,
    prune,
    reading,
    seal,
    unseal,
)
from bn_common.config import Config
from bn_common.record import record_of

NUMBERS = {"step": 1, "loss": 1.0, "train_accuracy": 0.5, "test_loss": 1.0, "test_accuracy": 0.5, "seconds": 1.0}


def about_of(place, accuracy=None):
    metrics = [{"epoch": epoch + 1, **NUMBERS} for epoch in range(place.epoch)]
    run = record_of(Config(), "jax")
    about = {"place": place._asdict(), "run": run, "test_accuracy": accuracy, "metrics": metrics}
    return about | {"arrays": {"w": "float32 2"}, "made_with": {"jax": "1"}}


def make(folder, step, *, accuracy=None, place=None):
    path = folder / str(step)
    (path / "deep").mkdir(parents=True)
    (path / "a").write_bytes(b"abc")
    (path / "deep" / "b").write_bytes(bytes(range(20)))
    seal(path, about_of(place or Place(step), accuracy))
    return path


def test_what_is_sealed_is_read(tmp_path):
    place = Place(3, ((0.1, 2.0, 64.0), (1e-45, 3.0, 64.0)), 1.5e9, 0.3)
    path = make(tmp_path, 7, place=place)
    found = newest(tmp_path, pytest.fail)
    assert (found.step, found.path, found.place) == (7, path, place)
    assert newest(tmp_path / "nothing", pytest.fail) is None


def test_every_flipped_byte_is_found(tmp_path):
    path = make(tmp_path, 7)
    for file in ("a", "deep/b", SEAL):
        content = (path / file).read_bytes()
        for where in range(len(content)):
            (path / file).write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
            with pytest.raises(ValueError, match=f"{file} is not what was written"):
                unseal(path)
        (path / file).write_bytes(content[:-1])
        with pytest.raises(ValueError, match=f"{file} is not"):
            unseal(path)
        (path / file).unlink()
        with pytest.raises(ValueError, match=f"{file} can't be read"):
            unseal(path)
        (path / file).write_bytes(content)
    unseal(path)


def test_the_newest_whole_one(tmp_path):
    for step in (9, 10, 100):
        make(tmp_path, step)
    (tmp_path / "100" / "a").write_bytes(b"abd")
    (tmp_path / "200").mkdir()  # killed before the seal
    (tmp_path / "300.orbax-checkpoint-tmp").mkdir()
    said = []
    assert newest(tmp_path, said.append).step == 10
    assert "checkpoint 100 is damaged: a is not what was written" in said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", f"100{DAMAGED}", "9"]
    make(tmp_path, 100)  # its step is free again
    assert newest(tmp_path, pytest.fail).step == 100


def test_what_is_not_ours_stays(tmp_path):
    """Nobody's notes are deleted, whatever lies beside the checkpoints or in one."""
    (make(tmp_path, 7) / "notes").write_text("mine")
    (tmp_path / "7 (copy)").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert newest(tmp_path, pytest.fail).step == 7
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_what_a_link_leads_to_stays(tmp_path):
    """A checkpoint on another disk is as good as one here; of one that goes, the link alone is ours."""
    (tmp_path / "here").mkdir()
    for step in range(4):
        make(tmp_path / "there", step)
        (tmp_path / "here" / str(step)).symlink_to(tmp_path / "there" / str(step))
    (tmp_path / "here" / "9").symlink_to(tmp_path / "nowhere")
    (tmp_path / "there" / "8").mkdir()
    (tmp_path / "here" / "8").symlink_to(tmp_path / "there" / "8")
    before = sorted((tmp_path / "there").rglob("*"))
    (tmp_path / "there" / "3" / "a").write_bytes(b"abd")
    said = []
    for _ in range(2):  # the second time, one that was damaged before goes
        assert newest(tmp_path / "here", said.append).step == 2
        (tmp_path / "here" / "3").symlink_to(tmp_path / "there" / "3")
    assert "checkpoint 3 is damaged" in said[1]
    (tmp_path / "here" / "3").unlink()
    prune(tmp_path / "here", 1)
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["2", f"3{DAMAGED}"]
    assert sorted((tmp_path / "there").rglob("*")) == before


def test_numbers_that_are_no_steps(tmp_path):
    """Python takes them for digits."""
    for name in ("²", "٣", "007"):
        make(tmp_path, 0).rename(tmp_path / name)
    make(tmp_path, 5)
    assert newest(tmp_path, pytest.fail).step == 5
    prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["007", "5", "²", "٣"]


MADE_UP = {
    "nothing": [],
    "no place": {"place": None},
    "an epoch of words": {"place": {"epoch": "2"}},
    "a field that there is not": {"place": {"hour": 2}},
    "two numbers of a step": {"place": {"found": [[1.0, 2.0]]}},
    "more epochs than lines": {"place": {"epoch": 7}},
    "a line of words": {"metrics": [{"epoch": "1"}] * 2},
    "a run of words": {"run": "x"},
    "another framework": {"run": {**record_of(Config(), "jax"), "framework": "x"}},
    "an option of another type": {"run": {**record_of(Config(), "jax"), "epochs": "x"}},
    "a score of words": {"test_accuracy": "high"},
    "arrays of numbers": {"arrays": {"w": 1}},
}


@pytest.mark.parametrize("change", MADE_UP.values(), ids=MADE_UP)
def test_a_seal_that_is_made_up(change, tmp_path):
    """Its digest is right, and it says what no run does: set aside as what is damaged."""
    path, whole = make(tmp_path, 4), make(tmp_path, 3)
    seal(path, about_of(Place(2)) | change if change else [])
    said = []
    assert newest(tmp_path, said.append).path == whole
    assert said == [
        f"checkpoint 4 is damaged: {SEAL} is none of a checkpoint; it is now {path}{DAMAGED}, and an older one is "
        "looked for"
    ]


@pytest.mark.parametrize("held", ["[" * 100_000, '{"about": {}, "sha256": {}}', '{"about": 1}', "7"])
def test_a_seal_of_other_json(held, tmp_path):
    path = make(tmp_path, 4)
    (path / SEAL).write_text(f"{held}\n{hashlib.sha256(held.encode()).hexdigest()}\n")
    with pytest.raises(ValueError, match=r"nested too deeply|none of a checkpoint"):
        unseal(path)


def test_a_seal_leads_nowhere_else(tmp_path):
    """Files that are not the checkpoint's are not read."""
    path = make(tmp_path, 4)
    for name in ("/dev/zero", "../4/a"):
        held = json.dumps({"about": about_of(Place(2)), "sha256": {name: "0" * 64}})
        (path / SEAL).write_text(f"{held}\n{hashlib.sha256(held.encode()).hexdigest()}\n")
        with pytest.raises(ValueError, match="none of a checkpoint"):
            unseal(path)


def test_whatever_a_framework_raises_is_one_line(tmp_path):
    words = r"^p can't be read: OSError: a b; allowed: what this program wrote$"
    with pytest.raises(UnfitError, match=words), reading("p"):
        raise OSError("a\nb")


def test_the_last_and_the_best_are_kept(tmp_path):
    for step, accuracy in enumerate([None, 0.5, 0.9, 0.7, None, 0.8, 0.6]):
        make(tmp_path, step, accuracy=accuracy)
        prune(tmp_path, 2)
        kept = {int(p.name) for p in tmp_path.iterdir()}
        assert kept == {step, max(step - 1, 0)} | ({2} if step > 2 else set())


def test_other_arrays_are_refused():
    class Held:
        def __init__(self, dtype, *shape):
            self.dtype, self.shape = dtype, shape

    mine = describe({"a": Held("float32", 2, 3), "b": Held("torch.int32")})
    assert mine == {"a": "float32 2x3", "b": "int32 scalar"}
    check_arrays(mine, mine)
    cases = [({"a": "float64 2x3"}, "a is float32 2x3; allowed: float64 2x3"), ({"c": "int8 1"}, "c is missing")]
    for other, words in cases:
        with pytest.raises(ValueError, match=words):
            check_arrays(mine, mine | other)
    with pytest.raises(ValueError, match="b is int32 scalar; allowed: none"):
        check_arrays(mine, {"a": mine["a"]})
