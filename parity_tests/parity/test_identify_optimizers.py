"""Optimisers as update rules: correct pairs give silence, planted mistakes their names, in either wing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from parity.diagnosis.optimizer.family import findings
from parity.diagnosis.optimizer.fit import fit
from parity.diagnosis.optimizer.rules import Numbers, Shape, direction
from parity.records.answers import ProbeError, Response, matched, questions
from parity.sides.jax import ask as flax_ask
from parity.sides.torch import ask as torch_ask
from parity_tests.parity.planted.training import clipped, to_norm, to_norm_added, to_norm_each, to_value

LR = 1e-2
FLAX = {
    "Dense_0": {"kernel": np.zeros((5, 7)), "bias": np.zeros(7)},
    "Out": {"kernel": np.zeros((7, 1)), "bias": np.zeros(1)},
}


def to_torch(tree):
    return {
        "0.weight": tree["Dense_0"]["kernel"].T,
        "0.bias": tree["Dense_0"]["bias"],
        "1.weight": tree["Out"]["kernel"].T,
        "1.bias": tree["Out"]["bias"],
    }


NAMES = {"params/Dense_0/kernel": "0.weight", "params/Dense_0/bias": "0.bias"}
NAMES |= {"params/Out/kernel": "1.weight", "params/Out/bias": "1.bias"}


def probe(torch_factory, transform, known=True, **options):
    """Each side is asked alone; Flax either element by element what PyTorch is asked, or in its own order."""
    shapes = {name: a.shape for name, a in to_torch(FLAX).items()}
    serials = {f: np.arange(np.prod(shapes[t])).reshape(shapes[t]).T for f, t in NAMES.items()} if known else None
    flax_shapes = {f"params/{layer}/{name}": a.shape for layer, of in FLAX.items() for name, a in of.items()}
    sides = torch_ask.answers(torch_factory, shapes), flax_ask.answers(transform, flax_shapes, serials)
    return findings(matched(*sides, [(t, f) for f, t in NAMES.items()]), **options)


def codes(torch_factory, transform, **options):
    return [finding.code for finding in probe(torch_factory, transform, **options)]


def sgd(**options):
    return lambda params: torch.optim.SGD(params, **{"lr": LR, **options})


def adam(**options):
    return lambda params: torch.optim.Adam(params, **{"lr": LR, **options})


def adamw(**options):
    return lambda params: torch.optim.AdamW(params, **{"lr": LR, "weight_decay": 0.01, **options})


def rmsprop(**options):
    return lambda params: torch.optim.RMSprop(params, **{"lr": LR, **options})


def adagrad(**options):
    return lambda params: torch.optim.Adagrad(params, **{"lr": LR, **options})


def decayed(decay, transform):
    return optax.chain(optax.add_decayed_weights(decay), transform)


def kernels_only(params):
    return jax.tree.map(lambda v: v.ndim > 1, params)


def by_rank(params):
    """Decay for matrices only, as masks in optax have it."""
    params = list(params)
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR)


def by_scheduler(params):
    optimizer = torch.optim.Adam(params, lr=LR)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(t / 4, 1.0))


class HandWritten(torch.optim.Optimizer):
    """Adam with all its parts as options."""

    def __init__(self, params, lr=LR, eps=1e-8, first=True, second=True, decoupled=0.0, ema=None, inside=False):
        super().__init__(params, {"lr": lr})
        self.options = eps, first, second, decoupled, ema, inside

    @torch.no_grad()
    def step(self, closure=None):
        eps, first, second, decoupled, ema, inside = self.options
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                t = state["t"] = state.get("t", 0) + 1
                if ema is not None:
                    m = state["m"] = ema * state.get("m", torch.zeros_like(p)) + (1 - ema) * p.grad
                    p -= group["lr"] * m
                    continue
                m = state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * p.grad
                v = state["v"] = 0.999 * state.get("v", torch.zeros_like(p)) + 0.001 * p.grad**2
                m, v = m / (1 - 0.9**t if first else 1), v / (1 - 0.999**t if second else 1)
                root = (v + eps).sqrt() if inside else v.sqrt() + eps
                p -= group["lr"] * (m / root + decoupled * p)


def hand_written(**options):
    return lambda params: HandWritten(params, **options)


def plain_adam(eps=1e-8, first=True, second=True, dtype=jnp.float64):
    """Adam by hand in optax, its corrections computed in a dtype."""

    def init(params):
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)

    def update(gradients, state, params=None):
        t, m, v = state[0] + 1, *state[1:]
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradients)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, gradients)
        c1 = 1 - jnp.asarray(0.9, dtype) ** t.astype(dtype) if first else 1.0
        c2 = 1 - jnp.asarray(0.999, dtype) ** t.astype(dtype) if second else 1.0
        updates = jax.tree.map(lambda m, v: -LR * (m / c1) / (jnp.sqrt(v / c2) + eps), m, v)
        return updates, (t, m, v)

    return optax.GradientTransformation(init, update)


def undamped_first(beta=0.9, dampening=0.5):
    """PyTorch's dampening in optax: the first gradient comes in whole."""

    def init(params):
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)

    def update(gradients, state, params=None):
        t, buffer = state
        kept = jnp.where(t == 0, 1.0, 1 - dampening)
        buffer = jax.tree.map(lambda b, g: beta * b + kept * g, buffer, gradients)
        return jax.tree.map(lambda b: -LR * b, buffer), (t + 1, buffer)

    return optax.GradientTransformation(init, update)


WARM_UP = optax.linear_schedule(0.0, LR, 4)

CORRECT = {
    "sgd": (sgd(), optax.sgd(LR)),
    "sgd-decay": (sgd(weight_decay=0.01), decayed(0.01, optax.sgd(LR))),
    "momentum": (sgd(momentum=0.9), optax.sgd(LR, momentum=0.9)),
    "nesterov": (sgd(momentum=0.9, nesterov=True), optax.sgd(LR, momentum=0.9, nesterov=True)),
    "momentum-l2": (sgd(momentum=0.9, weight_decay=1e-3), decayed(1e-3, optax.sgd(LR, momentum=0.9))),
    "dampening": (sgd(momentum=0.9, dampening=0.5), undamped_first()),
    "rate-inside": (sgd(momentum=0.9), optax.chain(optax.scale(-LR), optax.trace(0.9))),
    "adam": (adam(), optax.adam(LR)),
    "adam-l2": (adam(weight_decay=0.01), decayed(0.01, optax.adam(LR))),
    "adamw": (adamw(), optax.adamw(LR, weight_decay=0.01)),
    "adamw-masked": (by_rank, optax.adamw(LR, weight_decay=0.01, mask=kernels_only)),
    "adam-hand-written": (hand_written(), optax.adam(LR)),
    "adam-hand-written-flax": (adam(), plain_adam()),
    "uncorrected": (hand_written(first=False, second=False), plain_adam(first=False, second=False)),
    "float32-inside": (adam(), plain_adam(dtype=jnp.float32)),
    "schedule": (by_scheduler, optax.adam(WARM_UP)),
    "rmsprop": (rmsprop(alpha=0.9), optax.rmsprop(LR, decay=0.9, eps_in_sqrt=False)),
    "rmsprop-centred": (
        rmsprop(alpha=0.9, centered=True, momentum=0.9),
        optax.rmsprop(LR, decay=0.9, eps_in_sqrt=False, centered=True, momentum=0.9),
    ),
    "adagrad": (adagrad(initial_accumulator_value=0.1, eps=0.0), optax.adagrad(LR, eps=0.0)),
    "unknown": (lambda params: torch.optim.Rprop(params, lr=0.0, step_sizes=(0.0, 0.0)), optax.set_to_zero()),
}


@pytest.mark.parametrize("known", [True, False], ids=["fed", "alone"])
@pytest.mark.parametrize("name", CORRECT)
def test_correct_pairs_give_silence(name, known):
    assert probe(*CORRECT[name], known=known) == []


PLANTED = {
    "eps": (adam(eps=1e-7), optax.adam(LR), ["adam-epsilon"]),
    "eps-flax": (adam(), optax.adam(LR, eps=1e-3), ["adam-epsilon"]),
    "eps-inside": (adam(), optax.adam(LR, eps=0.0, eps_root=1e-8), ["adam-epsilon"]),
    "eps-inside-too": (adam(), optax.adam(LR, eps_root=1e-8), ["adam-epsilon"]),
    "eps-inside-torch": (hand_written(inside=True), optax.adam(LR), ["adam-epsilon"]),
    "eps-rmsprop": (rmsprop(alpha=0.9), optax.rmsprop(LR, decay=0.9), ["adam-epsilon"]),
    "correction-torch": (hand_written(first=False, second=False), optax.adam(LR), ["bias-correction"]),
    "correction-flax": (adam(), plain_adam(first=False, second=False), ["bias-correction"]),
    "correction-second": (adam(), plain_adam(second=False), ["bias-correction"]),
    "correction-first": (hand_written(first=False), optax.adam(LR), ["bias-correction"]),
    "l2-torch": (adam(weight_decay=0.01), optax.adamw(LR, weight_decay=0.01), ["weight-decay-coupling"]),
    "l2-flax": (adamw(), decayed(0.01, optax.adam(LR)), ["weight-decay-coupling"]),
    "l2-momentum": (
        sgd(momentum=0.9, weight_decay=0.01),
        optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.01), optax.scale(-LR)),
        ["weight-decay-coupling"],
    ),
    "decay-value": (adamw(), optax.adamw(LR), ["weight-decay-coupling"]),
    "decay-missing": (adamw(), optax.adam(LR), ["weight-decay-coupling"]),
    "dampening-torch": (sgd(momentum=0.9, dampening=0.9), optax.sgd(LR, momentum=0.9), ["momentum-dampening"]),
    "dampening-flax": (sgd(momentum=0.9), undamped_first(), ["momentum-dampening"]),
    "average-flax": (
        sgd(momentum=0.9),
        optax.chain(optax.ema(0.9, debias=False), optax.scale(-LR)),
        ["momentum-dampening"],
    ),
    "average-torch": (hand_written(ema=0.9), optax.sgd(LR, momentum=0.9), ["momentum-dampening"]),
    "nesterov-torch": (sgd(momentum=0.9, nesterov=True), optax.sgd(LR, momentum=0.9), ["nesterov"]),
    "nesterov-flax": (sgd(momentum=0.9), optax.sgd(LR, momentum=0.9, nesterov=True), ["nesterov"]),
    "nadam": (adam(), optax.nadam(LR), ["nesterov"]),
    "nadam-torch": (lambda params: torch.optim.NAdam(params, lr=LR), optax.adam(LR), ["nesterov"]),
    "rate": (adam(), optax.adam(LR / 10), ["learning-rate"]),
    "rate-momentum": (sgd(momentum=0.9), optax.sgd(LR / 10, momentum=0.9), ["learning-rate"]),
    "rate-schedule": (adam(), optax.adam(WARM_UP), ["learning-rate"]),
    "rate-unknown": (lambda params: torch.optim.Adadelta(params, lr=0.5), optax.adadelta(1.0), ["learning-rate"]),
    "eps-and-rate": (adam(eps=1e-5), optax.adam(LR * 2), ["adam-epsilon", "learning-rate"]),
    "decay-and-correction": (
        hand_written(second=False, decoupled=0.01),
        decayed(0.01, optax.adam(LR)),
        ["bias-correction", "weight-decay-coupling"],
    ),
    "nesterov-and-rate": (
        sgd(momentum=0.9),
        optax.sgd(1.0, momentum=0.9, nesterov=True),
        ["nesterov", "learning-rate"],
    ),
    "beta": (adam(), optax.adam(LR, b2=0.99), ["unexplained"]),
    "momentum": (sgd(momentum=0.9), optax.sgd(LR, momentum=0.8), ["unexplained"]),
    "accumulator": (adagrad(), optax.adagrad(LR), ["unexplained"]),
    "algorithm": (adam(), optax.rmsprop(LR), ["unexplained"]),
    "lion": (sgd(), optax.lion(LR), ["unexplained"]),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_named(name):
    torch_factory, transform, expected = PLANTED[name]
    assert codes(torch_factory, transform) == codes(torch_factory, transform, known=False) == expected


GLOBAL = optax.clip_by_global_norm(1.0)
TO_ONE = "clips all gradients together to a norm of 1"
CLIPPED = {
    # name: PyTorch's, optax's, [(code, words that its evidence has)]
    "same-adam": (clipped(adam(), to_norm), optax.chain(GLOBAL, optax.adam(LR)), []),
    "same-value": (clipped(adamw(), to_value), optax.chain(optax.clip(0.5), optax.adamw(LR, weight_decay=0.01)), []),
    "rate": (
        clipped(sgd(), to_norm),
        optax.chain(GLOBAL, optax.sgd(2 * LR)),
        [("learning-rate", "0.01 in PyTorch and 0.02 in Flax")],
    ),
    "added": (
        clipped(sgd(), to_norm_added),
        optax.chain(GLOBAL, optax.sgd(LR)),
        [("gradient-clipping", "norm of 1, divided by norm + 1e-06; Flax")],
    ),
    "none-flax": (
        clipped(sgd(momentum=0.9), to_norm),
        optax.sgd(LR, momentum=0.9),
        [("gradient-clipping", f"PyTorch {TO_ONE}; Flax clips nothing")],
    ),
    "none-torch": (
        adam(),
        optax.chain(GLOBAL, optax.adam(LR)),
        [("gradient-clipping", f"PyTorch clips nothing; Flax {TO_ONE}")],
    ),
    "each": (
        clipped(adam(), to_norm_each),
        optax.chain(GLOBAL, optax.adam(LR)),
        [("gradient-clipping", f"the gradient of each tensor to a norm of 1; Flax {TO_ONE}")],
    ),
    "value": (
        clipped(sgd(), to_value),
        optax.chain(GLOBAL, optax.sgd(LR)),
        [("gradient-clipping", f"every element of a gradient to 0.5; Flax {TO_ONE}")],
    ),
    "most": (
        clipped(adamw(), to_norm),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(LR, weight_decay=0.01)),
        [("gradient-clipping", "a norm of 1; Flax clips all gradients together to a norm of 0.5")],
    ),
    "order": (
        clipped(sgd(weight_decay=0.01), to_norm),
        decayed(0.01, optax.chain(GLOBAL, optax.sgd(LR))),
        [("gradient-clipping", f"before weight decay; Flax {TO_ONE}, after weight decay of 0.01 is added")],
    ),
    "behind": (
        clipped(sgd(momentum=0.9), to_norm),
        optax.chain(optax.sgd(LR, momentum=0.9), GLOBAL),
        [("gradient-clipping", f"PyTorch {TO_ONE}; Flax clips all updates together, behind the rule, to a norm of 1")],
    ),
    "behind-always": (
        adam(),
        optax.chain(optax.adam(LR), optax.clip_by_global_norm(LR)),
        [("gradient-clipping", "PyTorch clips nothing; Flax clips all updates together")],
    ),
    "and-rate": (
        clipped(adam(), to_norm_added),
        optax.chain(GLOBAL, optax.adam(2 * LR)),
        [("gradient-clipping", "norm + 1e-06"), ("learning-rate", "a factor of 0.5")],
    ),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_is_named_with_its_numbers_and_what_else_differs(name):
    torch_factory, transform, expected = CLIPPED[name]
    found = probe(torch_factory, transform)
    assert [finding.code for finding in found] == [code for code, _ in expected]
    for finding, (_, words) in zip(found, expected, strict=True):
        assert words in finding.evidence
        assert "parameters:" not in finding.evidence  # of all of them


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("decay-value", ("0.01 in PyTorch", "0.0001 in Flax")),
        ("eps-inside", ("1e-08, outside the root, in PyTorch", "1e-08, inside the root, in Flax")),
        ("rate", ("a factor of 10",)),
        ("dampening-torch", ("0.9 in PyTorch and 0 in Flax",)),
        ("beta", ("beta2 is 0.999 in PyTorch and 0.99 in Flax",)),
        ("accumulator", ("initial accumulator is 0 in PyTorch and 0.1 in Flax",)),
        ("algorithm", ("Adam(lr=0.01, beta1=0.9, beta2=0.999", "RMSprop(lr=0.01, decay=0.9")),
    ],
)
def test_evidence_has_the_numbers(name, words):
    torch_factory, transform, _ = PLANTED[name]
    (finding,) = probe(torch_factory, transform)
    for part in words:
        assert part in finding.evidence


def test_a_mask_on_one_side_names_the_parameters():
    (finding,) = probe(adamw(), optax.adamw(LR, weight_decay=0.01, mask=kernels_only))
    assert finding.code == "weight-decay-coupling"
    assert "2 of 4 parameters: 0.bias, 1.bias" in finding.evidence


def test_a_part_that_only_one_side_trains():
    frozen = optax.multi_transform(
        {"train": optax.sgd(LR), "freeze": optax.set_to_zero()}, {"Dense_0": "train", "Out": "freeze"}
    )
    (finding,) = probe(sgd(), frozen)
    assert finding.code == "unexplained"
    assert "Flax's optimiser leaves the parameters as they are" in finding.evidence


def test_what_cannot_be_asked():
    with pytest.raises(ProbeError, match="LBFGS"):
        probe(lambda params: torch.optim.LBFGS(params), optax.sgd(LR))
    with pytest.raises(ProbeError, match="Flax"):
        probe(sgd(), optax.contrib.reduce_on_plateau())
    with pytest.raises(ProbeError, match="holds none"):
        probe(lambda _: torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR), optax.sgd(LR))


def test_the_random_state_and_x64_are_left_as_they_are():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    probe(sgd(), optax.sgd(LR))
    assert torch.equal(before, torch.get_rng_state())
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("elements", [1, 24])
@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        (Shape("ema", "outside", corrected=True), Numbers(b1=0.95, b2=0.95, epsilon=2e-3)),
        (Shape("ema", "inside", corrected=True), Numbers(b1=0.5, b2=0.9999, epsilon_root=3e-5, l2=1e-4)),
        (Shape("ema", "outside"), Numbers(b1=0.8, b2=0.99, epsilon=5e-10, l2=1e-2)),
        (Shape("ema", "outside", corrected=True, nesterov="optax"), Numbers(b1=0.9, b2=0.9, epsilon=1e-6)),
        (Shape("ema", "inside", centred=True, trace="plain"), Numbers(b2=0.9, beta=0.8, epsilon_root=1e-6)),
        (Shape("sum", "outside"), Numbers(initial=0.3, epsilon=1e-4)),
        (Shape(nesterov="plain"), Numbers(beta=0.8, dampening=0.3, l2=1e-3)),
    ],
    ids=str,
)
def test_unusual_numbers_are_solved(shape, numbers, elements):
    """Every hyperparameter to 1e-3, also from a tensor of one element."""
    column = np.arange(24) if elements == 24 else np.arange(8) * 5 % 24
    asked = questions(6)
    g, p = asked.gradients[:, column], asked.parameters[:, column]
    updates = -0.03 * (direction(shape, numbers, g, p) + 1e-3 * p)
    rule = fit(Response(g, p, (p + updates) - p), 1e-9)[0]
    assert rule.shape == shape
    np.testing.assert_allclose(rule.numbers, numbers, rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(rule.decay, 3e-5, rtol=1e-3)


def test_adagrad_with_its_epsilon_inside_the_root():
    """As optax has it; the fit leaves a trifle outside of it, too, which is no epsilon."""
    (found,) = probe(adagrad(), optax.adagrad(LR, initial_accumulator_value=0.0, eps=1e-10))
    assert found.code == "adam-epsilon"
    assert found.evidence == "epsilon is 1e-10, outside the root, in PyTorch and 1e-10, inside the root, in Flax"
