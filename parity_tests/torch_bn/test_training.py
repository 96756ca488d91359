"""The PyTorch training loop's parts, and what both loops share by contract."""

import numpy as np
import pytest
import torch

import image_data
import jax_bn.training
from bn_common.config import Config
from torch_bn import BLeNet, training


@pytest.fixture(scope="module")
def data():
    return training.to_device(image_data.load_sample(), torch.device("cpu"))


def test_same_batches_as_jax(data):
    jax_train, _ = jax_bn.training.to_device(image_data.load_sample())
    indices = next(image_data.epoch_batches(6000, 64, seed=5, epoch=1))
    x, labels = data[0].batch(torch.from_numpy(indices))
    jax_x, jax_labels = jax_train.batch(indices)
    # (x - mean) / std, each operation rounded once, the division perhaps done as a product: an ulp of the result.
    np.testing.assert_allclose(x[:, 0].numpy(), jax_x[..., 0], rtol=3e-7)
    np.testing.assert_array_equal(labels.numpy(), jax_labels)


SCHEDULES = [
    {"schedule": schedule, "warmup_epochs": warmup}
    for schedule in ("constant", "cosine")
    for warmup in (0, 0.5, 1, 2.75, 4)
]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_same_learning_rates_as_jax(options, x64):
    """At every step, and both by the formula."""
    config, steps = Config(epochs=4, lr=0.3, **options).resolved(), 12
    optimizer, scheduler = training.make_optimizer(config, steps, torch.nn.Linear(1, 1))
    schedule = jax_bn.training.learning_rate_schedule(config, steps)
    warmup, total = round(config.warmup_epochs * steps), 4 * steps
    for step in range(total):
        if step < warmup:
            truth = 0.3 * step / warmup
        elif config.schedule == "constant":
            truth = 0.3
        else:
            truth = 0.3 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup))) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(truth, rel=1e-12)
        assert float(schedule(step)) == pytest.approx(truth, rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_evaluation_counts_every_example_once(data):
    model = BLeNet()
    found = training.evaluate(model, data[1])
    model.eval()
    with torch.no_grad():
        x, labels = data[1].batch(torch.arange(1000))
        logits = model(x)
    assert found.examples == 1000
    assert found.correct == (logits.argmax(-1) == labels).sum().item()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
