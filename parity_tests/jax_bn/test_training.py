"""The JAX training loop's parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import image_data
from bn_common.config import Config
from jax_bn import BLeNet, training
from parity_tests.wings import promoting


def setup(**options):
    config = Config(batch_size=32, **options).resolved()
    model = BLeNet()
    optimizer = promoting(training.make_optimizer(config, 10))
    return model, optimizer, training.init_state(model, optimizer, config.seed)


@pytest.fixture(scope="module")
def data():
    return training.to_device(image_data.load_sample())


def test_batches_are_standardised(data):
    train, test = data
    x, labels = train.batch(jnp.arange(6000))
    assert x.shape == (6000, 28, 28, 1)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-4)
    assert train.images.dtype == jnp.uint8
    np.testing.assert_array_equal(labels, image_data.load_sample().train_labels)
    assert test.mean == train.mean


def test_a_step_moves_everything_and_is_pure(data, quickly_compiled):
    model, optimizer, state = setup(warmup_epochs=0)
    before = jax.tree.map(np.array, state)
    x, labels = data[0].batch(jnp.arange(32))
    new, metrics = jax.jit(partial(training.train_step, model, optimizer))(state, x, labels)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state), before)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), new.variables, state.variables)
    assert jax.tree.all(moved)
    assert metrics.examples == 32
    assert 0 <= metrics.correct <= 32


def test_the_same_seed_gives_the_same_weights():
    first, second, other = setup(seed=1)[2], setup(seed=1)[2], setup(seed=2)[2]
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert (first.params["Dense_0"]["kernel"] != other.params["Dense_0"]["kernel"]).any()


def test_donated_step_compiles_without_complaint(data, quickly_compiled):
    """Every buffer of the state is reused (JAX would warn, and warnings are errors here)."""
    model, optimizer, state = setup()

    def step(state, data, indices):
        return training.train_step(model, optimizer, state, *data.batch(indices))

    compiled = jax.jit(step, donate_argnums=0).lower(state, data[0], jnp.arange(32)).compile()
    new, _ = compiled(state, data[0], jnp.arange(32))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


def test_evaluation_counts_every_example_once(data, quickly_compiled, monkeypatch):
    monkeypatch.setattr(training, "EVAL_BATCH_SIZE", 300)  # the last of 1000 examples are padded
    model, _, state = setup()
    x, labels = data[1].batch(jnp.arange(1000))
    logits = jax.jit(partial(model.apply, train=False))(state.variables, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def eval_batch(variables, data, indices, weights):
        return training.eval_step(model, variables, *data.batch(indices), weights)

    for size in (1000, 300, 7):
        cut = data[1]._replace(images=data[1].images[:size], labels=data[1].labels[:size])
        found = training.evaluate(jax.jit(eval_batch), state.variables, cut)
        assert found.examples == size
        assert found.correct == int((logits.argmax(-1).astype(jnp.int32) == labels)[:size].sum())
        assert found.loss == pytest.approx(float(losses[:size].sum()), rel=1e-5)


def test_named_weights(data):
    names = training.named_weights(setup()[2].variables)
    assert names["params/Conv_0/kernel"].shape == (5, 5, 1, 6)
    assert names["batch_stats/BatchNorm_3/var"].shape == (84,)
    assert len(names) == 10 + 4 * 4
