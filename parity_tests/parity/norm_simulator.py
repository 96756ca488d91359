"""A batch norm with every convention and every mistake, written plainly in PyTorch: data for the identification."""

from typing import NamedTuple

import numpy as np
import torch

from parity.diagnosis.norm.sources import NormSide


class Convention(NamedTuple):
    epsilon: float = 1e-5
    outside: bool = False
    # "batch", "moving", "updated", "halves", "strided halves", "first half", or the axes that are averaged over.
    source: str | tuple[int, ...] = "batch"
    unbiased_forward: bool = False
    affine: str = "held"
    weight: float = 0.9
    unbiased: bool = False
    statistics: str = "batch"  # or "halves", "first half"
    stopped: str = ""  # "mean", "variance", "both"
    single: bool = False  # computed in float32


class Data(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    gamma: np.ndarray | None
    beta: np.ndarray | None
    mean: np.ndarray
    var: np.ndarray


def data(rng, shape, *, trivial=False, size=1.0, offset=0.0, initial=None):
    channels = shape[-1]
    x = rng.normal(size=shape) * rng.uniform(0.1, 2, channels) * size + rng.normal(size=channels) * size + offset
    gamma, beta = rng.normal(size=channels), rng.normal(size=channels)
    if trivial:
        gamma, beta = np.ones(channels), np.zeros(channels)
    mean, var = rng.normal(size=channels), rng.uniform(0.5, 2, channels)
    if initial is not None:
        mean, var = np.zeros(channels), np.full(channels, float(initial))
    return Data(x, rng.normal(size=shape), gamma, beta, mean, var)


def _moments(x, source, unbiased):
    kept = tuple(range(x.ndim - 1))
    if isinstance(source, tuple):
        kept = source
    elif source in ("halves", "strided halves"):
        pieces = x.chunk(2) if source == "halves" else (x[::2], x[1::2])
        both = [_moments(piece, "batch", unbiased) for piece in pieces]
        half = x.shape[0] // 2
        index = [0] * half + [1] * half if source == "halves" else [0, 1] * half
        return tuple(torch.cat([both[i][moment] for i in index]) for moment in (0, 1))
    elif source == "first half":
        return _moments(x[: x.shape[0] // 2], "batch", unbiased)
    mean = x.mean(kept, keepdim=True)
    return mean, x.var(kept, keepdim=True, correction=int(unbiased))


def _per_channel(moment):
    return moment.mean(tuple(range(moment.ndim - 1)))


def simulate(data, convention, *, train=True):
    dtype = torch.float32 if convention.single else torch.float64
    x, dy, mean, var = (torch.tensor(v, dtype=dtype) for v in (data.x, data.dy, data.mean, data.var))
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    gamma = one if data.gamma is None else torch.tensor(data.gamma, dtype=dtype)
    beta = zero if data.beta is None else torch.tensor(data.beta, dtype=dtype)
    x.requires_grad_()
    new_mean, new_var = mean, var
    if train and convention.weight != 1.0:
        source = convention.statistics
        if source == "batch" and isinstance(convention.source, tuple):
            source = convention.source
        mu, sigma2 = _moments(x, source, convention.unbiased)
        new_mean = convention.weight * mean + (1 - convention.weight) * _per_channel(mu)
        new_var = convention.weight * var + (1 - convention.weight) * _per_channel(sigma2)
    if convention.source == "moving":
        mu, sigma2 = mean, var
    elif convention.source == "updated":
        mu, sigma2 = new_mean, new_var
    else:
        mu, sigma2 = _moments(x, convention.source, convention.unbiased_forward)
    if convention.stopped in ("mean", "both"):
        mu = mu.detach()
    if convention.stopped in ("variance", "both"):
        sigma2 = sigma2.detach()
    s = sigma2.sqrt() + convention.epsilon if convention.outside else (sigma2 + convention.epsilon).sqrt()
    a, b = {
        "held": (gamma, beta),
        "swapped": (beta, gamma),
        "missing": (one, zero),
        "bias missing": (gamma, zero),
        "scale missing": (one, beta),
    }[convention.affine]
    y = a * (x - mu) / s + b
    (dx,) = torch.autograd.grad((y * dy).sum(), x)
    numpy = [v.detach().double().numpy() for v in (x, y, new_mean, new_var, dx)]
    return NormSide(
        numpy[0], numpy[1], data.gamma, data.beta, data.mean, data.var, numpy[2], numpy[3], data.dy, numpy[4]
    )  # fmt: skip
