"""Folders of four files, where they are looked for, and the sample."""

import gzip

import numpy as np
import pytest

import image_data
from image_data import sources
from image_data.dataset import FILES, is_complete
from image_data.make_sample import first_of_each_class


def write_folder(folder, *, train=6, test=4, size=(12, 12), suffix=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, count in zip(FILES, (train, train, test, test), strict=True):
        shape = (count, *size) if "images" in name else (count,)
        image_data.write_idx(folder / f"{name}{suffix}", rng.integers(0, 10, shape).astype(np.uint8))
    return folder


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_load_folder(tmp_path, suffix):
    dataset = image_data.load_folder(write_folder(tmp_path, suffix=suffix))
    assert dataset.train_images.shape == (6, 12, 12)
    assert dataset.test_labels.shape == (4,)
    assert dataset.name == str(tmp_path)
    assert dataset.notice == ""


def test_folder_problems(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        image_data.load_folder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no such folder"):
        image_data.load_folder(tmp_path / ("a" * 300))
    folder = write_folder(tmp_path / "a")
    with pytest.raises(ValueError, match="found a file"):
        image_data.load_folder(folder / f"{FILES[0]}.gz")
    (folder / f"{FILES[1]}.gz").unlink()
    (folder / f"{FILES[2]}.gz").unlink()
    with pytest.raises(ValueError, match=f"found no {FILES[1]}, no {FILES[2]}"):
        image_data.load_folder(folder)
    (folder / f"{FILES[2]}.gz").mkdir()
    with pytest.raises(ValueError, match="found no"):
        image_data.load_folder(folder)


def test_swapped_and_unequal_files(tmp_path):
    folder = write_folder(tmp_path)
    images, labels = folder / f"{FILES[0]}.gz", folder / f"{FILES[1]}.gz"
    first, second = images.read_bytes(), labels.read_bytes()
    images.write_bytes(second)
    labels.write_bytes(first)
    with pytest.raises(ValueError, match="label file in its place") as caught:
        image_data.load_folder(folder)
    assert str(images) in str(caught.value)
    images.write_bytes(first)
    image_data.write_idx(labels, np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match="found 5 labels; expected 6") as caught:
        image_data.load_folder(folder)
    assert str(labels) in str(caught.value)


def test_image_sizes(tmp_path):
    folder = write_folder(tmp_path, size=(12, 13))
    with pytest.raises(ValueError, match="expected square"):
        image_data.load_folder(folder)
    write_folder(tmp_path)
    image_data.write_idx(folder / f"{FILES[2]}.gz", np.zeros((4, 14, 14), np.uint8))
    with pytest.raises(ValueError, match="expected 12x12, as in training"):
        image_data.load_folder(folder)


def test_sample():
    sample = image_data.load_sample()
    assert sample.train_images.shape == (6000, 28, 28)
    assert sample.test_images.shape == (1000, 28, 28)
    np.testing.assert_array_equal(np.bincount(sample.train_labels), [600] * 10)
    np.testing.assert_array_equal(np.bincount(sample.test_labels), [100] * 10)
    assert sample.name == "sample"
    assert "sample" in sample.notice
    files = list(sources.SAMPLE_FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) <= 4 * 2**20
    assert "MIT License" in (sources.SAMPLE_FOLDER / "LICENSE").read_text()


@pytest.mark.skipif(not is_complete(sources.DEBIAN_FOLDER), reason="the package dataset-fashion-mnist is not installed")
def test_sample_is_a_subset_of_the_real_data():
    full, sample = image_data.load_folder(sources.DEBIAN_FOLDER), image_data.load_sample()
    for split, count in (("train", 600), ("test", 100)):
        chosen = first_of_each_class(getattr(full, f"{split}_labels"), count)
        for kind in ("images", "labels"):
            name = f"{split}_{kind}"
            np.testing.assert_array_equal(getattr(full, name)[chosen], getattr(sample, name))


def test_places_in_their_order(tmp_path, no_network, monkeypatch):
    """Cache folder, system folder, download, sample: the first that is complete."""
    dataset = image_data.load_fashion_mnist()
    assert dataset.name == "sample"
    assert "the download failed" in dataset.notice
    assert "127.0.0.1" in dataset.notice

    system = write_folder(tmp_path / "system")
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", system)
    assert image_data.load_fashion_mnist().name == str(system)

    cache = sources.cache_folder()
    assert cache == tmp_path / "cache" / "fashion-mnist"
    write_folder(cache)
    assert image_data.load_fashion_mnist().name == str(cache)
    (cache / f"{FILES[3]}.gz").unlink()  # incomplete: passed over
    assert image_data.load_fashion_mnist().name == str(system)


def test_places_that_may_not_be_looked_at(tmp_path, no_network, monkeypatch):
    """Passed over like missing ones (a name too long for the file system stands for every refusal of it)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("a" * 300)))
    assert image_data.load_fashion_mnist().name == "sample"


def test_a_damaged_cache(tmp_path, no_network, monkeypatch):
    """The next place is taken, and that is said; what broke is downloaded anew where there is no other."""
    cache = write_folder(sources.cache_folder())
    whole = (cache / f"{FILES[0]}.gz").read_bytes()
    (cache / f"{FILES[0]}.gz").write_bytes(gzip.compress(b"broken"))
    dataset = image_data.load_fashion_mnist()
    assert dataset.name == "sample"
    for words in (f"{FILES[0]}.gz: found magic bytes", "from sample instead", "the download failed"):
        assert words in dataset.notice

    def downloading(folder, *, progress, anew):
        assert anew
        (folder / f"{FILES[0]}.gz").write_bytes(whole)

    monkeypatch.setattr(sources, "download", downloading)
    dataset = image_data.load_fashion_mnist()
    assert dataset.name == str(cache)
    assert f"from {cache} instead" in dataset.notice
    assert image_data.load_fashion_mnist().notice == ""

    (cache / f"{FILES[1]}.gz").write_bytes(b"broken")
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", write_folder(tmp_path / "system"))
    dataset = image_data.load_fashion_mnist()
    assert dataset.name == str(tmp_path / "system")
    assert f"{FILES[1]}.gz: found magic bytes" in dataset.notice
