"""The benchmark of `parity.check`, on its smallest pair; nothing here depends on a time."""

import json

import flax.linen as linen
import jax
import pytest
import torch

from benchmarks import check
from benchmarks.check_pairs import PAIRS


def test_a_pair_is_measured(tmp_path, capsys):
    check.main(["--pairs", "readme", "--json", str(tmp_path / "a.json"), "--write", str(tmp_path / "page.md")])
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["runs"][0]["codes"] == ["activation"]
    assert row["cpu_s"] > 0
    assert row["gb"] > 0.1
    page = (tmp_path / "page.md").read_text()
    assert "python -m benchmarks.check --write docs/check_speed.md" in page
    for text in (page, capsys.readouterr().out):
        assert "the README's pair, with its mistake" in text


def test_every_pair_has_a_bound():
    assert check.WHAT.keys() == check.BOUNDS.keys() == PAIRS.keys()


@pytest.mark.parametrize("name", ["unet", "transformer", "resnet50"])
def test_both_sides_are_of_one_size(name):
    """Without a number computed: both have as many parameters, and give outputs of as many numbers."""
    with torch.device("meta"):
        module, flax_module, inputs = PAIRS[name]()
        outputs = module(torch.from_numpy(inputs[0]).to("meta"))
    x = inputs[0] if inputs[0].ndim == 2 else inputs[0].transpose(0, 2, 3, 1)
    options = {"train": False} if name == "resnet50" else {}
    shapes = jax.eval_shape(lambda: flax_module.init_with_output(jax.random.key(0), x, **options))
    assert isinstance(flax_module, linen.Module)
    assert sum(v.size for v in jax.tree.leaves(shapes[1]["params"])) == sum(p.numel() for p in module.parameters())
    assert shapes[0].size == outputs.numel()


@pytest.mark.parametrize("args", [["--rounds", "0"], ["--write", "no/such/file"], ["--pairs", "vgg"]], ids=str)
def test_refused(args, capsys):
    with pytest.raises(SystemExit) as stop:
        check.main(args)
    assert stop.value.code == 2
    assert "allowed" in capsys.readouterr().err or args[0] == "--pairs"
