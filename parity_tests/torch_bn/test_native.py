"""PyTorch's own layers taken over and given back, alone and in a model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import torch_bn
from torch_bn import BatchNorm, convert_batch_norm

KINDS = {nn.BatchNorm1d: (8, 3), nn.BatchNorm2d: (4, 3, 5, 5), nn.BatchNorm3d: (2, 3, 2, 3, 4)}


def trained(kind, shape, **options):
    torch.manual_seed(0)
    layer = kind(3, **options).double()
    for _ in range(3):
        layer(torch.randn(shape, dtype=torch.float64) * 2 + 5)
    if layer.affine:
        with torch.no_grad():
            layer.weight.uniform_(0.5, 2)
            layer.bias.normal_()
    return layer


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-3}, {"affine": False}], ids=str
)
@pytest.mark.parametrize(("kind", "shape"), KINDS.items())
def test_goes_on_as_the_native_one_would(kind, shape, options):
    """Training and prediction, y, gradients and statistics, step by step; and given back, once more."""
    native = trained(kind, shape, **options)
    layer = BatchNorm.from_native(copy.deepcopy(native))
    for step in range(4):
        x = torch.randn(shape, dtype=torch.float64) + step
        results = []
        for module in (native, layer):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            (y**3).sum().backward()
            results.append((y.detach(), leaf.grad, *(p.grad for p in module.parameters())))
            module.zero_grad()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(layer.moving_mean, native.running_mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(layer.moving_var, native.running_var, rtol=1e-13, atol=0)
    torch.testing.assert_close(layer.eval()(x), native.eval()(x), rtol=1e-11, atol=1e-11)
    back = layer.to_native()
    assert type(back) is kind
    assert (back.momentum, back.eps, back.affine, back.training) == (native.momentum, native.eps, native.affine, False)
    assert list(back.state_dict()) == list(native.state_dict())
    assert back.num_batches_tracked == native.num_batches_tracked == 7
    torch.testing.assert_close(back(x), native(x), rtol=1e-11, atol=1e-11)


def test_round_trip_is_the_same_tensors():
    """So that an optimiser keeps its hold on the parameters."""
    native = trained(nn.BatchNorm2d, (4, 3, 5, 5))
    layer = BatchNorm.from_native(native)
    back = layer.to_native()
    assert back.weight is layer.gamma is native.weight
    assert back.bias is layer.beta is native.bias
    assert back.running_var is layer.moving_var is native.running_var
    for name, value in native.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


def test_rank_2_and_3_for_1d():
    layer = BatchNorm.from_native(nn.BatchNorm1d(3))
    layer(torch.randn(4, 3))
    layer(torch.randn(4, 3, 7))
    with pytest.raises(ValueError, match="allowed: 2 or 3"):
        layer(torch.randn(4, 3, 7, 7))


def test_a_biased_variance_is_converted_or_refused():
    """Native layers keep the unbiased: exact where every batch had m values, refused where m is not known."""
    layer, other = (
        BatchNorm(num_features=3, num_dims=2, unbiased_moving_var=u, dtype=torch.float64) for u in (False, True)
    )
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(8, 3, dtype=torch.float64)
        layer(x)
        other(x)
    with pytest.raises(ValueError, match="values_per_channel is None"):
        layer.to_native()
    native = layer.to_native(values_per_channel=8)
    torch.testing.assert_close(native.running_var, other.to_native().running_var, rtol=1e-14, atol=0)
    assert torch.equal(native.running_mean, layer.moving_mean)
    started = BatchNorm(num_features=3, num_dims=2, initial_moving_var=1.0)
    with pytest.raises(ValueError, match="num_batches is None"):
        started.to_native(values_per_channel=8)
    assert (started.to_native(values_per_channel=8, num_batches=0).running_var == 1).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_dims": 6}, "num_dims is 6"),
        ({"num_dims": 4, "axis": -1}, "axis is -1"),
        ({"num_dims": 4, "use_bias": False}, "gamma or beta alone"),
        ({"num_dims": 4, "frozen_statistics": True}, "frozen_statistics is True"),
    ],
    ids=str,
)
def test_no_native_layer_is_like_it(options, words):
    with pytest.raises(ValueError, match=words):
        BatchNorm(num_features=3, unbiased_moving_var=True, **options).to_native()


def test_not_taken_over():
    for module in (nn.Linear(2, 2), nn.SyncBatchNorm(3), nn.LazyBatchNorm1d(), nn.InstanceNorm1d(3), None):
        with pytest.raises(TypeError, match=r"allowed: nn\.BatchNorm1d, 2d or 3d"):
            BatchNorm.from_native(module)
    with pytest.raises(ValueError, match="track_running_stats is False"):
        BatchNorm.from_native(nn.BatchNorm1d(3, track_running_stats=False))


class Model(nn.Module):
    """Batch norms in a list, in a sequence, as an attribute, and one that stands in two places."""

    def __init__(self):
        super().__init__()
        shared = nn.BatchNorm2d(4)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU())
        self.again = shared
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=0.2))] * 1)
        self.head = nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(2, eps=1e-3)

    def forward(self, x):
        x = self.again(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.norm(self.head(x.mean((2, 3))))


def test_a_whole_model_and_back():
    torch.manual_seed(0)
    model = Model().double()
    converted = copy.deepcopy(model)
    optimizer = torch.optim.SGD(converted.parameters(), 0.1)
    assert convert_batch_norm(converted) is converted
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in converted.modules())
    assert converted.again is converted.first[1]
    reference = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        x = torch.randn(6, 3, 9, 9, dtype=torch.float64)
        for net, opt in ((model, reference), (converted, optimizer)):
            opt.zero_grad()
            (net(x) ** 3).sum().backward()
            opt.step()
    back = convert_batch_norm(converted, to_native=True)
    assert list(back.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(back.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_one_layer_under_two_names():
    net = nn.Module()
    net.x = net.y = nn.BatchNorm2d(3)
    convert_batch_norm(net)
    assert isinstance(net.x, BatchNorm)
    assert net.x is net.y


def test_statistics_of_a_half_layer_are_widened():
    layer = BatchNorm.from_native(nn.BatchNorm1d(3).half())
    assert layer.gamma.dtype == torch.float16
    assert layer.moving_mean.dtype == layer.moving_var.dtype == torch.float32


def test_the_module_itself():
    assert isinstance(convert_batch_norm(nn.BatchNorm1d(3)), BatchNorm)
    assert isinstance(convert_batch_norm(BatchNorm.from_native(nn.BatchNorm3d(3)), to_native=True), nn.BatchNorm3d)
    with pytest.raises(TypeError, match=r"allowed: a torch\.nn\.Module"):
        convert_batch_norm({"weight": 1})


def test_all_or_nothing():
    """All that cannot be converted in one message, and nothing is swapped."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.BatchNorm1d(3, track_running_stats=False))
    before = list(model)
    with pytest.raises(ValueError, match=r"2 batch norm\(s\)") as caught:
        convert_batch_norm(model)
    assert "1: the layer is SyncBatchNorm" in str(caught.value)
    assert "2: track_running_stats is False" in str(caught.value)
    assert list(model) == before
    model = nn.Sequential(torch_bn.BatchNorm(num_features=3, num_dims=2))
    with pytest.raises(ValueError, match="0: values_per_channel is None"):
        convert_batch_norm(model, to_native=True)


def test_predictions_are_more_exact():
    """What the swap is for."""
    native = nn.BatchNorm1d(1).eval()
    x = torch.full((4, 1), 1e6) + torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    native.running_mean.fill_(1e6)
    native.running_var.fill_(0.01)
    truth = (x.double() - 1e6).numpy() / np.sqrt(np.float64(np.float32(0.01)) + 1e-5)
    ours = convert_batch_norm(copy.deepcopy(native))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert np.abs(ours(x).detach().numpy() - truth).max() <= 8 * np.finfo("float32").eps * truth.max()
