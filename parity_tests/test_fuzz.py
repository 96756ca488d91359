"""The corpus of `make fuzz` again, and whole files: what a reader may say of any file is its content or one line."""

import numpy as np
import pytest

from parity_tests import damage, fuzz


@pytest.mark.parametrize("name", fuzz.READERS)
def test_corpus(name, tmp_path):
    for whole in fuzz.READERS[name][2]():
        assert fuzz.try_file(name, whole, tmp_path) is None
    assert fuzz.kept(name), "a reader without a corpus"
    for path in fuzz.kept(name):
        fuzz.try_file(name, path.read_bytes(), tmp_path)


def test_what_is_found_is_kept(monkeypatch, tmp_path):
    """A reader that raises KeyError of a file that is cut."""

    def read(path):
        if len(path.read_bytes()) < 10:
            raise KeyError("short")

    monkeypatch.setattr(fuzz, "CORPUS", tmp_path / "corpus")
    monkeypatch.setitem(fuzz.READERS, "npy", (".npy", read, lambda: [damage.bytes_of(lambda f: np.save(f, np.eye(2)))]))
    _, found = fuzz.fuzz("npy", 60, tmp_path)
    assert found is not None
    assert "KeyError" in found
    (path,) = fuzz.kept("npy")
    assert len(path.read_bytes()) < 10
