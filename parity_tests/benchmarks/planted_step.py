"""Peers of the training step that are none: another network, and one whose process ends."""

import os

from torch import nn

from benchmarks.step import torch_peers


def other_epsilon(weights, fig_size):
    """PyTorch's network with Keras's epsilon."""

    def build(fig_size):
        model = torch_peers._native(fig_size)
        for layer in model:
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.eps = 1e-3
        return model

    return torch_peers._make(build, weights, fig_size)


def ends(weights, fig_size):
    os._exit(1)
