"""A user's program over the whole public face: `test_typing.py` has mypy and pyright check it. It is never run.

Where a type is asserted, a checker that found Any would say so; where an error is ignored, that there is none.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, assert_type

import flax.linen
import jax
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import image_data
import jax_bn
import parity
import torch_bn
from parity import weights
from parity.report import Diagnosis, Divergence, LayerRow
from parity.testing import assert_parity


def losses() -> tuple[Callable[[Tensor], Tensor], Callable[[jax.Array], jax.Array]]:
    return (lambda y: y.sum(), lambda y: y.sum())


def called(module: jax_bn.BLeNet, variables: Mapping[str, Any], x: jax.Array, train: bool) -> jax.Array:
    return module(x, train)


def compare(
    torch_model: torch.nn.Module, flax_model: flax.linen.Module, transform: object, x: NDArray[np.float32]
) -> str:
    report = parity.check(torch_model, flax_model, x, x, train=False, layer_map={"0": "Conv_0"})
    assert_type(report, parity.Report)
    assert_type(report.ok, bool)
    assert_type(report.first_divergence, Divergence | None)
    assert_type(report.diagnoses, list[Diagnosis])
    assert_type(report.layers, list[LayerRow])
    assert_type(report.notes, list[str])
    assert_type(report.details, dict[str, Any])
    assert_type(report.summary, str)
    for row in report.layers:
        assert_type(row.error, float)
        assert_type(row.error32, float | None)
        assert_type(row.ok, bool)
        print(report.verdict(row), row.phase, row.torch_layer)
    report.to_json("report.json")
    report.to_html(Path("report.html"))
    trained = parity.check(
        torch_model,
        flax_model,
        x,
        variables={"params": {}},
        flax_inputs=[x],
        flax_call=called,
        loss=losses(),
        steps=3,
        optimizers=(lambda p: torch.optim.Adam(p, 1e-3), transform),
    )
    assert_type(assert_parity(torch_model, flax_model, x, train=False, steps=0), parity.Report)
    parity.check(torch_model, flax_model, x, None, 3, {"x": [x]}, keywords={"mask": x}, flax_inputs={"x": x})
    assert_type(parity.assert_parity(torch_model, flax_model, [x, x], loss=losses()), parity.Report)
    fresh = parity.check_initialisation(lambda: torch_model, flax_model, x, seeds=8)
    assert_type(fresh, parity.Report)
    return trained.summary


def carry(torch_model: torch.nn.Module, flax_model: flax.linen.Module) -> dict[str, Tensor]:
    variables = weights.to_flax(torch_model, flax_model, layer_map={"0": "Conv_0"})
    named = {"input_ids": np.zeros((1, 2), np.int64), "attention_mask": None}
    parity.to_flax(torch_model, flax_model, inputs=named, flax_inputs=[named["input_ids"], None], flax_call=called)
    print(variables["params"])
    state = weights.to_torch(variables, torch_model)
    assert_type(state, dict[str, Tensor])
    torch_model.load_state_dict(parity.weights.to_torch(variables, torch_model))
    return state


def in_jax(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    stats = jax_bn.BatchStats(mean=bias, var=bias)
    y, stats = jax_bn.batch_norm(x, scale, bias, stats, train=True, momentum=None, axis=(0, -1))
    assert_type(y, jax.Array)
    assert_type(stats, jax_bn.BatchStats)
    assert_type(stats.mean, jax.Array)
    model = jax_bn.BLeNet(channels=1, fig_size=28, num_class=10)
    assert_type(model(x, train=False), jax.Array)
    assert_type(model.image_shape, tuple[int, int, int])
    layer = jax_bn.BatchNorm(use_running_average=True, momentum=0.9, unbiased_moving_var=True)
    assert_type(layer.momentum, float | None)
    assert_type(layer(x), jax.Array)
    return y


def in_torch(x: Tensor) -> Tensor:
    y, mean, var = torch_bn.batch_norm(
        x, torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(3), train=True, mask=None
    )
    assert_type(y, Tensor)
    assert_type(mean, Tensor)
    assert_type(var, Tensor)
    layer = torch_bn.BatchNorm(num_features=3, num_dims=(2, 3), momentum=None, device="cpu", dtype=torch.float32)
    assert_type(layer(x), Tensor)
    assert_type(layer.moving_mean, Tensor)
    model = torch_bn.BLeNet(channels=1, fig_size=28, num_class=10)
    assert_type(model(x), Tensor)
    assert_type(torch_bn.convert_batch_norm(model), torch.nn.Module)
    torch_bn.precise_statistics(model, [x])
    return layer(x)


def of_images() -> Mapping[str, Sequence[int]]:
    data = image_data.load_sample()
    assert_type(data, image_data.ImageDataset)
    assert_type(data.train_images, NDArray[np.uint8])
    mean, std = image_data.pixel_mean_and_std(data.train_images)
    assert_type(mean, float)
    assert_type(std, float)
    statistics = image_data.feature_statistics([data.train_images])
    z = image_data.standardize(data.train_images, statistics)
    assert_type(image_data.unstandardize(z, statistics), NDArray[np.floating[Any]])
    for indices in image_data.epoch_batches(len(data.train_labels), 32, seed=0, epoch=0):
        assert_type(indices, NDArray[np.int32])
    for indices, weight in image_data.padded_batches(10, 3):
        print(indices, weight)
    image_data.write_idx("a", data.test_images)
    array = image_data.read_idx("a")
    print(array.shape, image_data.steps_per_epoch(10, 3), image_data.epoch_order(3, seed=0, epoch=0))
    assert_type(image_data.read_images("a"), NDArray[np.uint8])
    assert_type(image_data.read_labels("a"), NDArray[np.uint8])
    assert_type(image_data.load_folder("a"), image_data.ImageDataset)
    assert_type(image_data.load_fashion_mnist(), image_data.ImageDataset)
    return {"shape": data.train_images.shape}


def mistakes(torch_model: torch.nn.Module, flax_model: flax.linen.Module, x: NDArray[np.float32]) -> None:
    parity.chek(torch_model, flax_model, x)  # type: ignore[attr-defined]
    parity.check(torch_model, flax_model, x, trian=False)  # type: ignore[call-arg]
    assert_parity(torch_model, flax_model, x, trian=False)  # type: ignore[call-arg]
    assert_parity(torch_model, flax_model, x, steps="3")  # type: ignore[arg-type]
    jax_bn.blenett()  # type: ignore[attr-defined]
    torch_bn.BLeNet(chanels=1)  # type: ignore[call-arg]
