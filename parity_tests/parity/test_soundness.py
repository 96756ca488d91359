"""Never ok in silence: what hides a mistake, what cannot be compared, weights that have no place."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import parity
from parity import offline, weights
from parity.sides import torch as torch_side

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def gelu_net(approximate="none"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(approximate), nn.Linear(5, 3))


class TanhGelu(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.gelu(linen.Dense(5)(x)))


def test_the_nudge_that_measures_rounding_is_no_rounding_itself():
    """A nudge in float32 would make the bound of every float64 comparison that of float32."""
    module = gelu_net()
    h = 1e-6
    runs = [torch_side.record(module, [X], train=False, nudge=step) for step in (0.0, h, -h)]
    for name, a in runs[0].tensors.items():
        signs = np.arange(a.size).reshape(a.shape) % 2 * 2 - 1
        for sign, run in ((1, runs[1]), (-1, runs[2])):
            np.testing.assert_allclose(run.tensors[name], a * (1 + sign * h * signs), rtol=1e-15, atol=0)


class Norm(linen.Module):
    """A norm with another epsilon behind a layer whose outputs are large."""

    kind: str
    epsilon: float

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(8)(x)
        norm = (
            linen.LayerNorm if self.kind == "layer" else lambda epsilon: linen.GroupNorm(num_groups=2, epsilon=epsilon)
        )
        return linen.Dense(4)(norm(epsilon=self.epsilon)(x))


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_a_norms_epsilon_behind_large_activations(kind):
    """1e-5 for 1e-6 where the activations are of size 16: 1e-7 of the output, which float64 shows."""
    torch.manual_seed(0)
    made = nn.LayerNorm(8, eps=1e-5) if kind == "layer" else nn.GroupNorm(2, 8, eps=1e-5)
    module = nn.Sequential(nn.Linear(4, 8), made, nn.Linear(8, 4))
    with torch.no_grad():
        module[0].weight *= 16
    report = parity.check(module, Norm(kind, 1e-6), X, train=False)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("epsilon", "1")]
    assert parity.check(module, Norm(kind, 1e-5), X, train=False).ok


def test_empty_inputs_are_refused(tmp_path):
    for call in (
        lambda: parity.check(gelu_net(), TanhGelu(), X[:0], train=False),
        lambda: parity.trace(gelu_net(), TanhGelu(), X[:0], train=False),
        lambda: offline.dump(gelu_net(), [X[:0]], tmp_path / "dump"),
    ):
        with pytest.raises(ValueError, match=r"inputs are empty, of shape \(0, 4\).*allowed: an example or more"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["input", "one infinity a row", "weight"])
@pytest.mark.parametrize("way", ["check", "trace"])
def test_what_is_not_finite_is_not_compared(where, way):
    """The two differ (exact GELU for tanh's), and nothing that they are given can show it: then they are not ok."""
    module, x = gelu_net(), X.copy()
    if where == "weight":
        with torch.no_grad():
            module[2].weight[0, 0] = torch.nan
    else:
        x[:, 0] = np.nan if where == "input" else np.inf
    function = parity.check if way == "check" else parity.trace
    report = function(module, TanhGelu(), x, train=False)
    assert not report.ok
    assert report.diagnoses[0].code == "not-compared"
    assert report.diagnoses[0].layer == ("2" if where == "weight" else "0")
    assert "not finite at" in str(report)


def test_a_mask_of_infinities_is_compared():
    """An infinity among finite values, the same on both sides, is one more value that agrees."""
    x = X.copy()
    x[0, 0] = -np.inf
    masked = torch.nn.Softmax(1)
    report = parity.check(nn.Sequential(masked, nn.Linear(4, 3)), Softmaxed(), x, train=False)
    assert report.ok, report


class Softmaxed(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.softmax(x))


class FailsIn(linen.Module):
    """Raises in one of the runs that `parity.check` makes."""

    dtype: str

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(5)(x)
        if x.dtype == self.dtype and not self.is_initializing():
            raise RuntimeError("not in this dtype")
        return x


def test_a_run_that_fails_is_said_and_not_ok():
    report = parity.check(nn.Linear(4, 5), FailsIn("float32"), X, train=False)
    assert not report.ok
    assert [d.code for d in report.diagnoses] == ["could-not-run"]
    assert "RuntimeError: not in this dtype" in str(report)


def test_tensors_do_not_cross_kinds():
    """A norm that the other side forgot: its scale is no convolution's bias."""

    class Forgotten(nnx.Module):
        def __init__(self, rngs):
            self.c1, self.c2 = (nnx.Conv(n, 8, (3, 3), padding="VALID", rngs=rngs) for n in (3, 8))

        def __call__(self, x):
            return self.c2(self.c1(x))

    module = nn.Sequential()
    for name, layer in (
        ("c1", nn.Conv2d(3, 8, 3, bias=False)),
        ("n1", nn.GroupNorm(2, 8)),
        ("c2", nn.Conv2d(8, 8, 3, bias=False)),
    ):
        module.add_module(name, layer)
    with pytest.raises(ValueError, match="problem") as error:
        weights.to_flax(module, Forgotten(nnx.Rngs(0)))
    for line in (
        "n1.weight is left over", "n1.bias is left over", "c1.bias is missing (for params/c1/bias)",
        "c2.bias is missing (for params/c2/bias)",
    ):  # fmt: skip
        assert line in str(error.value)
    report = parity.check(module, Forgotten(nnx.Rngs(0)), np.ones((2, 3, 8, 8), np.float32) * X[:2, :3, None, None])
    found = {(d.code, layer) for d in report.diagnoses for layer in d.layers}
    assert found == {("no-partner", "n1"), ("bias-missing", "c1"), ("bias-missing", "c2")}
    assert report.diagnoses[0].evidence == "PyTorch's n1 (weight, bias) has no partner in Flax"


def test_what_has_no_partner_is_named():
    """Query, key and value in one matrix on one side, and of another size: no line of the report mentioned it."""

    class Separate(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.MultiHeadDotProductAttention(2, qkv_features=16)(x)

    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    report = parity.check(QkvInOne(), Separate(), x, train=False, flax_inputs=[x])
    assert not report.ok
    assert report.diagnoses[0].code == "no-partner"
    assert "qkv (weight, bias)" in report.diagnoses[0].evidence


class QkvInOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class WithoutValue(linen.Module):
    @linen.compact
    def __call__(self, x):
        q, k = linen.DenseGeneral((2, 4), name="query")(x), linen.DenseGeneral((2, 4), name="key")(x)
        y = linen.dot_product_attention(q, k, x.reshape(*x.shape[:2], 2, 4))
        return linen.Dense(8, name="proj")(y.reshape(x.shape))


def test_a_guess_takes_nobodys_partner_away():
    """The value, which Flax has not, as the projection: then proj would have no partner, and be accused of it."""
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    report = parity.check(QkvInOne(), WithoutValue(), x, train=False, flax_inputs=[x])
    assert report.diagnoses[0].code == "no-partner"
    assert "proj" not in report.diagnoses[0].evidence
    assert {("proj", "proj")} <= {(row.torch_layer, row.flax_layer) for row in report.layers}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.logit_scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.a(x) * self.logit_scale.exp()


class FlaxScaled(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(x) * jnp.exp(self.param("logit_scale", linen.initializers.ones, ()))


def test_a_scalar_parameter_stays_a_scalar():
    variables = weights.to_flax(Scaled(), FlaxScaled(), inputs=[X])
    assert variables["params"]["logit_scale"].shape == ()
    FlaxScaled().apply(variables, X)
    state = weights.to_torch(variables, Scaled(), flax_module=FlaxScaled(), inputs=[X])
    assert state["logit_scale"].shape == ()
    Scaled().load_state_dict(state)
    assert parity.check(Scaled(), FlaxScaled(), X, train=False).ok


class MakesState(nn.Module):
    """Makes tensors of the default dtype in its forward: a state, and a mask of the smallest number of y's dtype."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x) + self.b(torch.zeros(len(x), 8))
        return torch.softmax(y[:, None, :] + torch.full((8, 8), torch.finfo(y.dtype).min).triu(1), -1)


class FlaxMakesState(linen.Module):
    @linen.compact
    def __call__(self, x):
        y = linen.Dense(8)(x) + linen.Dense(8)(jnp.zeros((len(x), 8), x.dtype))
        return linen.softmax(y[:, None, :] + jnp.triu(jnp.full((8, 8), jnp.finfo(y.dtype).min, y.dtype), 1), -1)


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_tensors_of_the_default_dtype(default):
    """In the float64 run they are float64, and the caller's default dtype is what it was."""
    before = torch.get_default_dtype()
    module = MakesState()
    torch.set_default_dtype(default)
    try:
        options = {"steps": 1, "optimizers": (lambda p: torch.optim.SGD(p, 0.1), optax.sgd(0.1))}
        report = parity.check(module, FlaxMakesState(), X, train=True, **options)
        after = torch.get_default_dtype()
    finally:
        torch.set_default_dtype(before)
    assert report.ok, report
    assert after == default


class Tied(nn.Module):
    """A head that shares its weight with the embedding."""

    def __init__(self):
        super().__init__()
        self.wte, self.ln, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        return self.head(self.ln(self.wte(ids)))


class FlaxTied(linen.Module):
    tied: bool = True

    @linen.compact
    def __call__(self, ids):
        embed = linen.Embed(9, 4)
        x = linen.LayerNorm(epsilon=1e-5)(embed(ids))
        return embed.attend(x) if self.tied else linen.Dense(9, use_bias=False)(x)


def test_a_second_name_of_a_tensor_needs_no_partner():
    torch.manual_seed(0)
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    report = parity.check(Tied(), FlaxTied(), ids, train=False)
    assert report.ok, report
    assert not parity.check(Tied(), FlaxTied(tied=False), ids, train=False).ok


class TiedBesideABias(nn.Module):
    """The weight of the head is the embedding's; its bias is its own."""

    def __init__(self, *, tied=True):
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(torch.relu(self.hidden(self.words(ids))))


class BiasAlone(linen.Module):
    @linen.compact
    def __call__(self, x, table):
        return x @ table.T + self.param("bias", linen.initializers.zeros, (len(table),))


class FlaxTiedBesideABias(linen.Module):
    activation: object = linen.relu

    @linen.compact
    def __call__(self, ids):
        words = linen.Embed(9, 4, name="words")
        x = self.activation(linen.Dense(4, name="hidden")(words(ids)))
        return BiasAlone(name="head")(x, words.embedding)


def test_a_second_name_in_a_layer_that_has_a_partner():
    """As DistilBERT's head for masked words: PyTorch's has the tied weight and a bias, Flax's the bias alone."""
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    torch.manual_seed(0)
    report = parity.check(TiedBesideABias(), FlaxTiedBesideABias(), ids, train=False)
    assert report.ok, report
    assert not parity.check(TiedBesideABias(tied=False), FlaxTiedBesideABias(), ids, train=False).ok
    report = parity.check(TiedBesideABias(), FlaxTiedBesideABias(linen.gelu), ids, train=False)
    assert [d.code for d in report.diagnoses] == ["activation"]


@pytest.mark.parametrize("size", [0.01, 10.0, 1000.0, 1e6])
def test_a_large_output_widens_no_bound(size):
    """A derivative that is off by 1e-6 is seen whatever the size of the output that it is seen through."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(8)(x)
            mean, var = x.mean(0), x.var(0)
            mean = mean + 1e-6 * (jax.lax.stop_gradient(mean) - mean)  # the same number, another derivative
            scale, bias = (self.param(name, linen.initializers.ones, (8,)) for name in ("scale", "bias"))
            return linen.Dense(4)((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias)

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 4))
    with torch.no_grad():
        module[1].weight.uniform_(0.5, 1.5)
        module[2].weight *= size
    assert not parity.check(module, Net(), X).ok


class SomeAttention(nn.Module):
    """Dropout inside of the function of attention, beside a module of dropout."""

    def __init__(self, rate):
        super().__init__()
        self.a, self.b, self.drop, self.rate = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.1), rate

    def forward(self, x):
        y = self.drop(self.a(x))
        rate = self.rate if self.training else 0.0
        return self.b(nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=rate))


class LinenSomeAttention(linen.Module):
    rate: float

    @linen.compact
    def __call__(self, x, train):
        y = linen.Dropout(0.1, deterministic=not train)(linen.Dense(8)(x))[..., None, :]
        rng = self.make_rng("dropout") if train and self.rate else None
        options = {"dropout_rng": rng, "dropout_rate": self.rate, "deterministic": not train}
        return linen.Dense(8)(linen.dot_product_attention(y, y, y, **options)[..., 0, :])


class NnxSomeAttention(nnx.Module):
    def __init__(self, rate):
        rngs = nnx.Rngs(0)
        self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.drop, self.rate, self.rngs = nnx.Dropout(0.1, rngs=rngs), rate, rngs

    def __call__(self, x, deterministic):
        y = self.drop(self.a(x))[..., None, :]
        options = {"dropout_rng": self.rngs.dropout(), "dropout_rate": self.rate, "deterministic": deterministic}
        return self.b(nnx.dot_product_attention(y, y, y, **options)[..., 0, :])


@pytest.mark.parametrize("flax_net", [LinenSomeAttention, NnxSomeAttention])
@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.1, 0.0), (0.0, 0.1)], ids=str)
def test_dropout_inside_of_attention_is_off_in_training(flax_net, rates):
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    report = parity.check(SomeAttention(rates[0]), flax_net(rates[1]), x, flax_inputs=[x])
    assert report.ok, report
    assert any("dropout was switched off" in note for note in report.notes)


def scheduled(make, **options):
    """SGD whose scheduler makes a step after each of the optimiser's."""

    def factory(parameters):
        optimizer = torch.optim.SGD(parameters, **options)
        return optimizer, make(optimizer)

    return factory


SCHEDULES = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("torch_schedule", "optax_schedule"),
    [
        pytest.param(lambda o: SCHEDULES.LinearLR(o, 0.2, 1.0, 5), optax.linear_schedule(0.02, 0.1, 5), id="linear"),
        pytest.param(
            lambda o: SCHEDULES.LambdaLR(o, lambda k: min(1.0, (k + 1) / 5)),
            lambda s: 0.1 * jnp.minimum(1.0, (s + 1) / 5),
            id="warm-up",
        ),
        pytest.param(lambda o: SCHEDULES.ExponentialLR(o, 0.9), optax.exponential_decay(0.1, 1, 0.9), id="exponential"),
    ],
)
def test_a_schedule_of_the_integer_step_is_float32_in_jax(torch_schedule, optax_schedule):
    """Whatever the parameters are. It is no difference; what is larger is one."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(jnp.tanh(linen.Dense(5)(x)))

    factory = scheduled(torch_schedule, lr=0.1)
    report = parity.check(module, Net(), X, steps=3, optimizers=(factory, optax.sgd(optax_schedule)))
    assert report.ok, report
    assert any("float32 inside" in note for note in report.notes)
    off = optax.sgd(lambda step: optax_schedule(step) * 1.0001)
    assert not parity.check(module, Net(), X, steps=3, optimizers=(factory, off)).ok


class Shy(nn.Module):
    """Does not run with the weights of 1 that mark the channels in front of a flatten."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 2, 3), nn.Linear(2 * 2 * 2, 3)

    def forward(self, x):
        if (self.conv.weight == 1).all():
            raise RuntimeError("weights are all 1")
        return self.linear(self.conv(x).flatten(1))


class Flattens(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(2, (3, 3), padding="VALID")(x)
        return linen.Dense(3)(x.reshape(len(x), -1))


def test_what_could_not_be_looked_at_is_said():
    """A flatten that no run shows: to_flax, to_torch and lockstep say so, and not to a log."""
    torch.manual_seed(0)
    module, images = Shy(), np.random.default_rng(0).normal(size=(2, 1, 4, 4)).astype(np.float32)
    with pytest.warns(
        weights.ParityWarning, match=r"no run shows .* flatten.*PyTorch: RuntimeError: weights are all 1"
    ):
        variables = weights.to_flax(module, Flattens(), inputs=[images])
    with pytest.warns(weights.ParityWarning, match="weights are all 1"):
        weights.to_torch(variables, module, flax_module=Flattens(), inputs=[images])
    labels = np.zeros(2, np.int64)
    trajectory = parity.lockstep(module, Flattens(), [(images, labels)], steps=1, dtype="float64")
    (note,) = trajectory.notes
    assert "weights are all 1" in note


class PartlyDerived(linen.Module):
    """A linear layer that passes only a part of its matrix's gradient."""

    kept: float

    @linen.compact
    def __call__(self, y):
        kernel = self.param("kernel", linen.initializers.lecun_normal(), (y.shape[-1], 7))
        return y @ (self.kept * kernel + (1 - self.kept) * jax.lax.stop_gradient(kernel))


class Copies(linen.Module):
    """An embedding and a head, each with a matrix of its own."""

    kept: float = 1.0

    @linen.compact
    def __call__(self, ids):
        return PartlyDerived(self.kept, name="head")(linen.Embed(7, 5, name="words")(ids))


class WordsAndHead(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.words(ids))


def test_a_tied_tensor_and_copies_of_it():
    """The sum of the copies' gradients is the tensor's; where it is not, or the tensors are two, it is not said."""
    ids = np.random.default_rng(0).integers(0, 7, (6, 3)).astype(np.int32)
    torch.manual_seed(0)
    report = parity.check(WordsAndHead(tied=True), Copies(), ids)
    assert [(d.code, d.layer) for d in report.diagnoses] == [("tied-weights", "head")]
    assert report.first_divergence.phase == "backward"
    for tied in True, False:
        report = parity.check(WordsAndHead(tied), Copies(kept=0.5), ids)
        assert not report.ok
        assert "tied-weights" not in [d.code for d in report.diagnoses]
    equal = WordsAndHead(tied=False)
    equal.head.weight.data.copy_(equal.words.weight.data)
    assert parity.check(equal, Copies(), ids).ok
