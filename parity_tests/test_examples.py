"""What was found in published ports is found again in each minimal pair, and is gone where the pair is put right."""

import importlib
import re
from pathlib import Path

import pytest

# Module -> the code that is named first, and the argument with which the pair agrees.
FOUND = {
    "resnet_momentum": ("momentum-inverted", 0.9),
    "efficientnet_momentum": ("momentum", 0.99),
    "vit_gelu": ("activation", False),
    "vit_timm_gelu": ("activation", "tanh"),
    "convnext_epsilon": ("epsilon", 1e-6),
    "transformer2d_epsilon": ("epsilon", 1e-6),
    "geglu_gelu": ("gate", False),
    "batch_norm_default": ("momentum", 0.9),
}


@pytest.mark.parametrize("name", FOUND)
def test_found_again(name, x64):
    code, right = FOUND[name]
    check = importlib.import_module(f"examples.published.{name}").check
    assert check().diagnoses[0].code == code
    # PyTorch's own batch norm keeps the unbiased variance, Flax's the biased one: that is left of a training step.
    assert {diagnosis.code for diagnosis in check(right).diagnoses} <= {"unbiased-variance"}


def test_the_readme_names_the_lines():
    """Its table has a row for each, with the repository, commit, file and line that the example names."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    rows = dict(re.findall(r"^\| .*\]\((https:.*?)\) \| `examples\.published\.(\w+)` \|$", readme, re.MULTILINE))
    where = re.compile(r"Where: (\S+), commit (\w{40})\b.*?\s([\w/.-]+\.(?:py|rst)):(\d+)", re.DOTALL)
    for name in FOUND:
        repository, commit, file, line = where.search(
            importlib.import_module(f"examples.published.{name}").__doc__
        ).groups()
        assert rows.pop(f"{repository}/blob/{commit}/{file}#L{line}") == name
    assert not rows
