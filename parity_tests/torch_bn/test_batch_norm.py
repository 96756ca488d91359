"""The function in PyTorch's own circumstances: memory formats, threads, transformations, export."""

import importlib

import numpy as np
import pytest
import torch

import torch_bn
from parity_tests.test_batch_norm import check, draw
from torch_bn import kernels
from torch_bn.channels import spread
from truth import batch_norm as exact


def layouts(x):
    """The same values in every way that memory can lie."""
    wide = torch.empty(x.shape[0], x.shape[1], *(2 * n for n in x.shape[2:]), dtype=x.dtype)
    sliced = wide[(slice(None), slice(None), *[slice(None, None, 2)] * (x.ndim - 2))]
    sliced.copy_(x)
    found = {"contiguous": x, "sliced": sliced, "reversed": x.permute(*reversed(range(x.ndim))).contiguous()}
    found["reversed"] = found["reversed"].permute(*reversed(range(x.ndim)))
    if x.ndim > 3:
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        found["channels last"] = x.to(memory_format=last)
    found["examples last"] = x.movedim(0, -1).contiguous().movedim(-1, 0)
    return found


@pytest.mark.parametrize("shape", [(64, 3), (16, 3, 20), (8, 3, 6, 5), (4, 3, 2, 3, 4), (32, 1, 4, 4)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_memory_formats_and_threads(shape, mean):
    """Within the bounds of the truth in each, with one thread and with two."""
    arrays = draw(shape, "float32", mean=mean)
    x, gamma, beta, m, v, dy = map(torch.tensor, arrays)
    truth = exact.batch_norm(*arrays, train=True)
    axes = tuple(a for a in range(x.ndim) if a != 1)
    scale = np.abs(arrays[1]) * np.abs(arrays[5]).max(axes) / np.sqrt(truth.var.astype(float) + 1e-5)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name, laid_out in layouts(x).items():
                for dy_name, dy_laid_out in layouts(dy).items():
                    leaf = laid_out.detach().requires_grad_()
                    y, _, var = torch_bn.batch_norm(leaf, gamma, beta, m, v, train=True)
                    (dx,) = torch.autograd.grad(y, leaf, dy_laid_out)
                    where = f"x {name}, dy {dy_name}, {threads} thread(s)"
                    assert exact.error_in_eps(y.detach().numpy(), truth.y, "float32") <= 8, where
                    assert exact.error_in_eps(var.detach().numpy(), truth.moving_var, "float32") <= 8, where
                    assert exact.error_in_eps(dx.numpy(), truth.dx, "float32", scale) <= 32, where
    finally:
        torch.set_num_threads(before)


def test_expanded():
    """Stride 0: the same example many times."""
    one = torch.randn(1, 3, 4, 4)
    x = one.expand(16, 3, 4, 4)
    zeros, ones = torch.zeros(3), torch.ones(3)
    y, mean, _ = torch_bn.batch_norm(x, ones, zeros, zeros, zeros, train=True, momentum=0.0)
    again, same, _ = torch_bn.batch_norm(x.contiguous(), ones, zeros, zeros, zeros, train=True, momentum=0.0)
    torch.testing.assert_close(y, again, atol=2e-6, rtol=0)
    torch.testing.assert_close(mean, same, atol=1e-6, rtol=0)


@pytest.fixture(params=[False, True], ids=["planes", "large planes"])
def planes(request, monkeypatch):
    """Gamma's gradient as PyTorch's kernel has it; or added up beside it, as for large planes."""
    if request.param:
        monkeypatch.setattr(importlib.import_module("torch_bn.kernels"), "LARGEST_PLANE", 1)


@pytest.mark.parametrize("mean", [1.6, 3.0], ids=["x as it is", "differences"])
@pytest.mark.parametrize("offset", [0.0, 0.01, 100.0])
def test_offset_of_the_gradient(mean, offset):
    """What all dy share is not added up with the mean's rounding, m times: looked for, where that pays."""
    *arrays, dy = draw((32, 2, 48, 48), "float32", mean=mean)
    assert arrays[0].size >= kernels.LARGE
    check("torch", (*arrays, dy + np.float32(offset)), "float32", train=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2**13, 24), (300, 16), (24, 8, 40, 40)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_large_batches(dtype, shape, channels_last):
    """The sums within their bounds, in float32 whatever x is; the gradient of x within a rounding to its dtype."""
    rng = np.random.default_rng(11)
    mean = rng.uniform(-1.5, 1.5, shape[1]).reshape(-1, *[1] * (len(shape) - 2))
    x, dy = (torch.tensor(rng.standard_normal(shape) + offset, dtype=dtype) for offset in (mean, 0.02))
    if channels_last and x.ndim == 4:
        x, dy = (value.to(memory_format=torch.channels_last) for value in (x, dy))
    gamma, beta = (torch.tensor(rng.uniform(0.5, 2, shape[1]), dtype=torch.float32).requires_grad_() for _ in "gb")
    leaf = x.clone().requires_grad_()
    y, *_ = torch_bn.batch_norm(leaf, gamma, beta, torch.zeros(shape[1]), torch.ones(shape[1]), train=True)
    assert y.dtype == dtype
    y.backward(dy)
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    wide_x, wide_dy = x.double(), dy.double()
    centred = wide_x - wide_x.mean(axes, keepdim=True)
    r = torch.rsqrt(centred.square().mean(axes, keepdim=True) + 1e-5)
    x_hat = centred * r
    dbeta, dgamma = wide_dy.sum(axes), (wide_dy * x_hat).sum(axes)
    eps = torch.finfo(torch.float32).eps
    sizes = [torch.linalg.vector_norm(terms, dim=axes) for terms in (wide_dy, wide_dy * x_hat)]
    assert ((beta.grad.double() - dbeta).abs() <= 4 * eps * sizes[0]).all()
    assert ((gamma.grad.double() - dgamma).abs() <= 8 * eps * sizes[1]).all()
    m = x.numel() / shape[1]
    by_channel = (dbeta / m, dgamma / m, gamma.detach().double())
    shift, slope, factor = (spread(value, wide_x) for value in by_channel)
    dx = factor * r * (wide_dy - shift - x_hat * slope)
    largest = (factor * r).abs() * wide_dy.abs().amax(axes, keepdim=True)
    assert ((leaf.grad.double() - dx).abs() <= (32 * eps + torch.finfo(dtype).eps) * largest).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_prediction_where_the_mean_is_small(dtype):
    """PyTorch's kernel on x as it is: within an eps of x's dtype, and 4 of float32, of the largest y."""
    x, gamma, beta, _, var, _ = map(torch.tensor, draw((8, 3, 6, 5), "float32"))
    mean = 3.9 * var.sqrt()
    x = (x * spread(var.sqrt(), x) + spread(mean, x)).to(dtype)
    assert kernels.is_centred(x, mean, var, kernels.SMALL_KNOWN_MEAN)
    with torch.no_grad():
        y, *_ = torch_bn.batch_norm(x, gamma, beta, mean, var, train=False)
    truth, *_ = torch_bn.batch_norm(*(v.double() for v in (x, gamma, beta, mean, var)), train=False)
    error = (y.double() - truth).abs().amax((0, 2, 3)) / truth.abs().amax((0, 2, 3))
    assert y.dtype == dtype
    assert (error <= 4 * 2.0**-23 + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize(
    ("mean", "var", "is_small"),
    [
        (1.7, 1.0, True),
        (1.8, 1.0, False),
        (0.0, 0.0, True),
        (0.1, 0.0, False),
        (1.0, np.inf, False),
        (1.0, np.nan, False),
    ],
)
def test_whose_mean_is_small(mean, var, is_small):
    """Not a constant channel's, nor where a sum was too large; one channel decides, but not by a NaN."""
    means, variances = torch.tensor([0.0, mean, np.nan]), torch.tensor([1.0, float(var), np.nan])
    assert kernels.is_centred(torch.zeros(2, 3), means, variances) == is_small


@pytest.mark.usefixtures("planes")
@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 6, 6)], ids=str)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's forward mode
def test_functional_transformations(shape):
    """vmap over models, over batches and over both; grad and jvp under it."""
    torch.manual_seed(0)
    xs, gammas, dys = torch.randn(5, *shape) + 3, torch.rand(5, 3) + 0.5, torch.randn(5, *shape)
    zeros = torch.zeros(3)

    def normalise(x, gamma):
        return torch_bn.batch_norm(x, gamma, zeros, zeros, zeros, train=True)

    def total(x, gamma, dy):
        return (normalise(x, gamma)[0] * dy).sum()

    for in_dims in ((0, 0, 0), (None, 0, None), (0, None, None)):
        arguments = [v if d == 0 else v[0] for v, d in zip((xs, gammas, dys), in_dims, strict=True)]
        found = torch.func.vmap(torch.func.grad(total, argnums=(0, 1)), in_dims)(*arguments)
        for i in range(5):
            alone = torch.func.grad(total, argnums=(0, 1))(
                *(v[i] if d == 0 else v for v, d in zip(arguments, in_dims, strict=True))
            )
            for a, b in zip(found, alone, strict=True):
                torch.testing.assert_close(a[i], b, atol=2e-5, rtol=1e-4)
    y, y_dot = torch.func.jvp(lambda x: normalise(x, gammas[0])[0], (xs[0],), (dys[0],))
    (back,) = torch.func.vjp(lambda x: normalise(x, gammas[0])[0], xs[0])[1](dys[1])
    torch.testing.assert_close((y_dot * dys[1]).sum(), (back * dys[0]).sum(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.func.vmap(normalise)(xs, gammas)[0][0], y, atol=2e-6, rtol=0)
    x = xs[0].requires_grad_()
    y = normalise(x, gammas[0])[0]
    (rows,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    for row, dy in zip(rows, dys, strict=True):
        torch.testing.assert_close(row, torch.autograd.grad(y, x, dy, retain_graph=True)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("planes")
@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 6, 6)], ids=str)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by PyTorch's own tracer
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_compiled_and_exported(shape):
    """fullgraph, forward and backward; an exported program predicts, and trains."""
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    layer = torch_bn.BatchNorm(num_features=3, num_dims=len(shape), unbiased_moving_var=True)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.moving_mean.zero_()
        layer.moving_var.zero_()
        y = run(x)
        results.append((y, *torch.autograd.grad(y, (x, layer.gamma, layer.beta), dy), layer.moving_var.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for mode in (layer.eval(), layer.train()):
        program = torch.export.export(mode, (x.detach(),)).module()
        torch.testing.assert_close(program(x.detach()), mode(x.detach()), atol=2e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_with_numbers_that_vary():
    """Layers with other momenta and epsilons, as one graph each: then the numbers are symbols to the compiler."""
    torch._dynamo.reset()
    for momentum, eps in ((0.9, 1e-5), (0.8, 1e-5), (0.7, 1e-3)):
        layer = torch_bn.BatchNorm(num_features=3, num_dims=2, momentum=momentum, eps=eps)
        for dynamic in (None, True):
            x = torch.randn(6, 3)
            compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=dynamic)
            torch.testing.assert_close(compiled(x), layer(x), atol=2e-6, rtol=0)


@pytest.mark.usefixtures("planes")
@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives_of_images_in_float32(masked):
    """Where the first derivative is PyTorch's kernel, the second is the closed form's: against float64."""
    arrays = draw((4, 3, 5, 5), "float32")
    mask = torch.rand(4, 1, 5, 5) < 0.8 if masked else None
    results = []
    for dtype in (torch.float32, torch.float64):
        x, gamma, beta, m, v, dy = (torch.tensor(a, dtype=dtype) for a in arrays)
        x.requires_grad_()
        y, _, var = torch_bn.batch_norm(x, gamma, beta, m, v, train=True, mask=mask)
        (dx,) = torch.autograd.grad((y * dy).sum() + var.sum(), x, create_graph=True)
        results.append(torch.autograd.grad((dx**2).sum(), x)[0])
    torch.testing.assert_close(results[0].double(), results[1], atol=2e-5, rtol=1e-4)
