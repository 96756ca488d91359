"""What was found in published ports is found again in each minimal pair, and is gone where the pair is put right."""

import importlib

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
