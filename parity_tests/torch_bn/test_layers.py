"""torch_bn.BatchNorm as a module: state_dict, devices, saving, compilation."""

import copy
import io

import pytest
import torch

import torch_bn


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = torch_bn.BatchNorm(num_features=3, num_dims=4, momentum=0.5)
    layer(torch.randn(4, 3, 5, 5) + 2)
    return layer


def test_statistics_are_buffers(layer):
    assert [name for name, _ in layer.named_parameters()] == ["gamma", "beta"]
    assert [name for name, _ in layer.named_buffers()] == ["moving_mean", "moving_var"]
    assert list(layer.state_dict()) == ["gamma", "beta", "moving_mean", "moving_var"]
    assert not any(buffer.requires_grad for buffer in layer.buffers())


def test_survive_saving(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = torch_bn.BatchNorm(num_features=3, num_dims=4, momentum=0.5)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(fresh.eval()(x), layer.eval()(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_move_with_the_module(layer):
    assert layer.to("meta").moving_mean.device.type == "meta"
    fresh = torch_bn.BatchNorm(num_features=3, num_dims=2, dtype=torch.float64, device="meta")
    assert {v.dtype for v in fresh.state_dict().values()} == {torch.float64}
    assert {v.device.type for v in fresh.state_dict().values()} == {"meta"}
    assert layer.double().moving_var.dtype == torch.float64


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_statistics_stay_wide(layer, half):
    """Values that float16 has no place for; the parameters follow."""
    with torch.no_grad():
        layer.moving_var.fill_(1e6)
        layer.moving_mean.fill_(0.1)
    before = layer.moving_mean.clone()
    layer.to(half)
    assert layer.gamma.dtype == half
    assert layer.moving_mean.dtype == torch.float32
    assert torch.equal(layer.moving_mean, before)
    assert (layer.moving_var == 1e6).all()
    assert layer(torch.randn(4, 3, 2, 2, dtype=half)).dtype == half
    assert layer.double().moving_var.dtype == torch.float64


def test_options():
    layer = torch_bn.BatchNorm(
        num_features=2, num_dims=2, momentum=0.5, eps=0.25, unbiased_moving_var=True, initial_moving_var=3.0
    )
    y = layer(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    torch.testing.assert_close(layer.moving_var, torch.tensor([0.5 * 3 + 0.5 * 2, 0.5 * 3]))
    torch.testing.assert_close(y[:, 0], torch.tensor([-1.0, 1.0]) / 1.25**0.5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by PyTorch's own tracer
def test_compiled_as_one_graph(layer):
    """Traced and differentiated ahead of time; "inductor" would need a C++ compiler."""
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(compiled(x), layer(x), atol=2e-6, rtol=0)
    torch.testing.assert_close(compiled.moving_var, layer.moving_var)


def test_train_and_eval(layer):
    before = layer.moving_mean.clone()
    x = torch.randn(2, 3, 4, 4)
    layer.eval()(x)
    assert torch.equal(layer.moving_mean, before)
    layer.train()(x)
    assert not torch.equal(layer.moving_mean, before)
    torch.testing.assert_close(layer.moving_mean, 0.5 * before + 0.5 * x.mean((0, 2, 3)))


def test_statistics_keep_no_graph(layer):
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
    assert layer.moving_mean.grad_fn is None


def test_bfloat16_input_keeps_float32_statistics(layer):
    y = layer(torch.randn(4, 3, 2, 2, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert layer.moving_mean.dtype == torch.float32


def test_any_memory_format(layer):
    x = torch.randn(6, 3, 5, 7)
    y = layer(x)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(layer(other), y, atol=2e-6, rtol=0)


def test_functional_transformations():
    """torch.func: vmap over models, and grad, give what a loop gives."""
    x, gammas, beta = torch.randn(8, 3), torch.rand(4, 3) + 0.5, torch.zeros(3)

    def total(gamma):
        return (torch_bn.batch_norm(x, gamma, beta, beta, beta, train=True)[0] ** 3).sum()

    grads = torch.func.vmap(torch.func.grad(total))(gammas)
    torch.testing.assert_close(grads, torch.stack([torch.func.grad(total)(g) for g in gammas]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's forward mode
def test_hessian_in_either_mode():
    x, gamma = torch.randn(5, 2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5
    zeros = torch.zeros(2, dtype=torch.float64)

    def total(x):
        return (torch_bn.batch_norm(x, gamma, zeros, zeros, zeros, train=True)[0] ** 3).sum()

    torch.testing.assert_close(torch.func.hessian(total)(x), torch.func.jacrev(torch.func.jacrev(total))(x))


def test_printed():
    layer = torch_bn.BatchNorm(num_features=3, num_dims=2)
    assert repr(layer) == "BatchNorm(num_features=3, num_dims=2, momentum=0.9, eps=1e-05)"
