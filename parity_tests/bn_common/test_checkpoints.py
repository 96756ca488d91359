"""Checkpoints on disk: a flipped byte is found, the newest whole one is taken, the last and the best are kept."""

import pytest

from bn_common.checkpoints import DAMAGED, SEAL, Place, check_arrays, describe, newest, prune, seal, unseal


def make(folder, step, *, accuracy=None, place=None):
    path = folder / str(step)
    (path / "deep").mkdir(parents=True)
    (path / "a").write_bytes(b"abc")
    (path / "deep" / "b").write_bytes(bytes(range(20)))
    about = {"place": (place or Place(step))._asdict(), "test_accuracy": accuracy, "metrics": []}
    seal(path, about)
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
