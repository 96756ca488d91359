"""What to write instead: for every mistake of `parity.diagnosis.mistakes`, a line that is wrong and one that is right.

The two right lines of a mistake are the same thing in both frameworks; each wrong line differs from both. A line is an
example: `c`, `n`, `x` and the like are the user's. F is torch.nn.functional, nn torch.nn in PyTorch; Flax's lines are
NNX, whose arguments have the same names in linen, and JAX.
"""

from __future__ import annotations

from typing import NamedTuple


class Fix(NamedTuple):
    """Code of either framework.

    Attributes:
      torch: (wrong, right) in PyTorch.
      flax: (wrong, right) in Flax and JAX.
    """

    torch: tuple[str, str]
    flax: tuple[str, str]


FIXES = {
    "no-partner": Fix(
        ("self.norm = nn.Identity()", "self.norm = nn.LayerNorm(c)"),
        ("self.norm = lambda x: x", "self.norm = nnx.LayerNorm(c, epsilon=1e-5, rngs=rngs)"),
    ),
    "eval-uses-batch-statistics": Fix(
        ("model(x)  # in training mode", "model.eval()(x)"),
        ("model(x)  # in training mode", "model.eval()  # before; in linen: use_running_average=True"),
    ),
    "train-uses-moving-statistics": Fix(
        ("model.eval()", "model.train()"),
        (
            "nnx.BatchNorm(c, use_running_average=True, rngs=rngs)",
            "nnx.BatchNorm(c, use_running_average=False, rngs=rngs)",
        ),
    ),
    "wrong-reduction-axes": Fix(
        ("x.mean((2, 3), keepdim=True)", "x.mean((0, 2, 3), keepdim=True)"),
        ("x.mean((1, 2), keepdims=True)", "x.mean((0, 1, 2), keepdims=True)"),
    ),
    "per-device-statistics": Fix(
        ("nn.BatchNorm2d(c)  # in DistributedDataParallel", "nn.SyncBatchNorm.convert_sync_batchnorm(model)"),
        ("nnx.BatchNorm(c, rngs=rngs)  # in pmap", 'nnx.BatchNorm(c, axis_name="batch", rngs=rngs)'),
    ),
    "affine-swapped": Fix(
        ("y = x_hat * beta + gamma", "y = x_hat * gamma + beta"),
        ('scale, bias = state["bias"], state["weight"]', 'scale, bias = state["weight"], state["bias"]'),
    ),
    "norm-offset": Fix(
        ("y = x_hat * weight", "y = x_hat * (1 + weight)"),
        ("y = x_hat * scale", "y = x_hat * (1 + scale)"),
    ),
    "affine-missing": Fix(
        ("nn.LayerNorm(c, elementwise_affine=False)", "nn.LayerNorm(c)"),
        (
            "nnx.LayerNorm(c, epsilon=1e-5, use_scale=False, use_bias=False, rngs=rngs)",
            "nnx.LayerNorm(c, epsilon=1e-5, rngs=rngs)",
        ),
    ),
    "bias-missing": Fix(
        ("nn.Linear(n, m, bias=False)", "nn.Linear(n, m)"),
        ("nnx.Linear(n, m, use_bias=False, rngs=rngs)", "nnx.Linear(n, m, rngs=rngs)"),
    ),
    "variance-ddof": Fix(
        ("x.var(0)  # correction=1", "x.var(0, correction=0)"),
        ("x.var(0, ddof=1)", "x.var(0)  # ddof=0"),
    ),
    "epsilon-outside-sqrt": Fix(
        ("x / (var.sqrt() + eps)", "x / (var + eps).sqrt()"),
        ("x / (jnp.sqrt(var) + eps)", "x / jnp.sqrt(var + eps)"),
    ),
    "epsilon": Fix(
        ("nn.LayerNorm(c, eps=1e-12)", "nn.LayerNorm(c)  # eps=1e-5"),
        ("nnx.LayerNorm(c, rngs=rngs)  # epsilon=1e-6", "nnx.LayerNorm(c, epsilon=1e-5, rngs=rngs)"),
    ),
    "initial-variance": Fix(
        ('self.register_buffer("running_var", torch.zeros(c))', 'self.register_buffer("running_var", torch.ones(c))'),
        ("self.var = nnx.BatchStat(jnp.zeros(c))", "self.var = nnx.BatchStat(jnp.ones(c))"),
    ),
    "statistics-frozen": Fix(
        ("nn.BatchNorm2d(c, momentum=0.0)", "nn.BatchNorm2d(c, momentum=0.1)"),
        (
            "model.apply(variables, x, train=True)  # linen",
            'model.apply(variables, x, train=True, mutable=["batch_stats"])',
        ),
    ),
    "momentum-inverted": Fix(
        ("nn.BatchNorm2d(c, momentum=0.9)", "nn.BatchNorm2d(c, momentum=0.1)  # weight of the new value"),
        (
            "nnx.BatchNorm(c, momentum=0.1, rngs=rngs)",
            "nnx.BatchNorm(c, momentum=0.9, rngs=rngs)  # weight of the old value",
        ),
    ),
    "momentum": Fix(
        ("nn.BatchNorm2d(c, momentum=0.01)", "nn.BatchNorm2d(c)  # momentum=0.1"),
        ("nnx.BatchNorm(c, rngs=rngs)  # momentum=0.99", "nnx.BatchNorm(c, momentum=0.9, rngs=rngs)"),
    ),
    "unbiased-variance": Fix(
        (
            "torch_bn.BatchNorm(num_features=c, num_dims=4)  # keeps the biased one",
            "nn.BatchNorm2d(c)  # keeps the unbiased one",
        ),
        (
            "nnx.BatchNorm(c, momentum=0.9, rngs=rngs)",
            "jax_bn.nnx.BatchNorm(c, momentum=0.9, unbiased_moving_var=True, rngs=rngs)",
        ),
    ),
    "stopped-statistics-gradient": Fix(
        ("mu = x.mean(0).detach()", "mu = x.mean(0)"),
        ("mu = jax.lax.stop_gradient(x.mean(0))", "mu = x.mean(0)"),
    ),
    "tied-weights": Fix(
        ("head.weight = nn.Parameter(embed.weight.clone())", "head.weight = embed.weight"),
        ("logits = self.head(x)", "logits = self.embed.attend(x)"),
    ),
    "padding-index": Fix(
        ("self.embed = nn.Embedding(n, c)", "self.embed = nn.Embedding(n, c, padding_idx=0)"),
        ("y = self.embed(ids)", "y = jnp.where((ids == 0)[..., None], 0, self.embed(ids))  # row 0 is 0"),
    ),
    "kernel-transposed": Fix(
        ("linear.weight.copy_(kernel)", "linear.weight.copy_(kernel.T)"),
        ('kernel = state["weight"]', 'kernel = state["weight"].T'),
    ),
    "kernel-layout": Fix(
        ("conv.weight.copy_(kernel.reshape(conv.weight.shape))", "conv.weight.copy_(kernel.permute(3, 2, 0, 1))"),
        ("kernel = weight.reshape(kernel.shape)", "kernel = weight.transpose(2, 3, 1, 0)"),
    ),
    "kernel-flipped": Fix(
        ("F.conv2d(x, weight.flip(2, 3))", "F.conv2d(x, weight)"),
        ("jax.scipy.signal.convolve(x, kernel)", "jax.scipy.signal.correlate(x, kernel)"),
    ),
    "kernel-hw-swapped": Fix(
        ("weight = kernel.permute(3, 2, 1, 0)", "weight = kernel.permute(3, 2, 0, 1)"),
        ("kernel = weight.transpose(3, 2, 1, 0)", "kernel = weight.transpose(2, 3, 1, 0)"),
    ),
    "stride": Fix(
        ("nn.MaxPool2d(2, stride=1)", "nn.MaxPool2d(2)  # stride=2"),
        ("nnx.max_pool(x, (2, 2))  # strides=(1, 1)", "nnx.max_pool(x, (2, 2), strides=(2, 2))"),
    ),
    "dilation": Fix(
        ("nn.Conv2d(i, o, 3)", "nn.Conv2d(i, o, 3, dilation=2)"),
        (
            'nnx.Conv(i, o, (3, 3), padding="VALID", rngs=rngs)',
            'nnx.Conv(i, o, (3, 3), kernel_dilation=2, padding="VALID", rngs=rngs)',
        ),
    ),
    "padding": Fix(
        ("nn.Conv2d(i, o, 3, stride=2)", "nn.Conv2d(i, o, 3, stride=2, padding=1)"),
        (
            'nnx.Conv(i, o, (3, 3), strides=2, rngs=rngs)  # padding="SAME"',
            "nnx.Conv(i, o, (3, 3), strides=2, padding=1, rngs=rngs)",
        ),
    ),
    "matmul-precision": Fix(
        ('torch.set_float32_matmul_precision("high")', 'torch.set_float32_matmul_precision("highest")'),
        (
            'jax.config.update("jax_default_matmul_precision", "tensorfloat32")',
            'jax.config.update("jax_default_matmul_precision", "highest")',
        ),
    ),
    "weight-order": Fix(
        ("i, g, f, o = gates.chunk(4, -1)", "i, f, g, o = gates.chunk(4, -1)"),
        ("i, g, f, o = jnp.split(gates, 4, -1)", "i, f, g, o = jnp.split(gates, 4, -1)"),
    ),
    "activation": Fix(
        ('F.gelu(x, approximate="tanh")', "F.gelu(x)  # exact"),
        ("nnx.gelu(x)  # tanh", "nnx.gelu(x, approximate=False)"),
    ),
    "gate": Fix(
        ("y = a * F.gelu(b)", "y = F.gelu(a) * b"),
        ("y = a * nnx.gelu(b, approximate=False)", "y = nnx.gelu(a, approximate=False) * b"),
    ),
    "pool-kind": Fix(
        ("nn.MaxPool2d(2)", "nn.AvgPool2d(2)"),
        ("nnx.max_pool(x, (2, 2), strides=(2, 2))", "nnx.avg_pool(x, (2, 2), strides=(2, 2))"),
    ),
    "pool-count-padding": Fix(
        ("nn.AvgPool2d(3, 1, 1)  # counts it", "nn.AvgPool2d(3, 1, 1, count_include_pad=False)"),
        (
            'nnx.avg_pool(x, (3, 3), padding="SAME")  # counts it',
            'nnx.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)',
        ),
    ),
    "norm-after-activation": Fix(
        ("norm(F.relu(x))", "F.relu(norm(x))"),
        ("norm(nnx.relu(x))", "nnx.relu(norm(x))"),
    ),
    "norm-position": Fix(
        ("x = norm(x + block(x))", "x = x + block(norm(x))"),
        ("x = norm(x + block(x))", "x = x + block(norm(x))"),
    ),
    "dropout-active": Fix(
        ("F.dropout(x, 0.1)  # training=True", "F.dropout(x, 0.1, self.training)"),
        ("nnx.Dropout(0.1, deterministic=False, rngs=rngs)", "nnx.Dropout(0.1, deterministic=True, rngs=rngs)"),
    ),
    "flatten-order": Fix(
        ("x.permute(0, 2, 3, 1).flatten(1)", "x.flatten(1)  # C, H, W"),
        ("x.reshape(len(x), -1)  # H, W, C", "x.transpose(0, 3, 1, 2).reshape(len(x), -1)"),
    ),
    "concat-order": Fix(
        ("torch.cat([skip, x], 1)", "torch.cat([x, skip], 1)"),
        ("jnp.concatenate([skip, x], -1)", "jnp.concatenate([x, skip], -1)"),
    ),
    "resize": Fix(
        ('F.interpolate(x, scale_factor=2)  # mode="nearest"', 'F.interpolate(x, scale_factor=2, mode="bilinear")'),
        ('jax.image.resize(x, shape, "nearest")', 'jax.image.resize(x, shape, "bilinear")'),
    ),
    "pad-mode": Fix(
        ('F.pad(x, (1, 1, 1, 1))  # mode="constant"', 'F.pad(x, (1, 1, 1, 1), mode="reflect")'),
        ('jnp.pad(x, pads)  # mode="constant"', 'jnp.pad(x, pads, mode="reflect")'),
    ),
    "attention-heads": Fix(
        ("q.view(n, l, d, heads)", "q.view(n, l, heads, d)"),
        ("q.reshape(n, l, d, heads)", "q.reshape(n, l, heads, d)"),
    ),
    "attention-scale": Fix(
        ("scores = q @ k.mT", "scores = q @ k.mT / d**0.5"),
        ("scores = q @ k.mT", "scores = q @ k.mT / d**0.5"),
    ),
    "attention-mask": Fix(
        ("seen = torch.ones(l, l).triu().bool()", "seen = torch.ones(l, l).tril().bool()"),
        ("seen = jnp.triu(jnp.ones((l, l), bool))", "seen = jnp.tril(jnp.ones((l, l), bool))"),
    ),
    "softmax-axis": Fix(
        ("F.softmax(scores, 1)", "F.softmax(scores, -1)"),
        ("jax.nn.softmax(scores, 1)", "jax.nn.softmax(scores)  # axis=-1"),
    ),
    "position-ids": Fix(
        ("positions = torch.arange(l)", "positions = (mask.cumsum(-1) - 1) * mask"),
        ("positions = jnp.arange(l)", "positions = (mask.cumsum(-1) - 1) * mask"),
    ),
    "output-taken-early": Fix(
        ("return x", "return self.norm(x)"),
        ("return x", "return self.norm(x)"),
    ),
    "input-layout": Fix(
        ("model(images)  # N, H, W, C", "model(images.permute(0, 3, 1, 2))"),
        ("model(images.reshape(n, h, w, c))  # N, C, H, W", "model(images.transpose(0, 2, 3, 1))"),
    ),
    "input-scale": Fix(
        ("model(images.float())", "model(images.float() / 255)"),
        ("model(images.astype(jnp.float32))", "model(images.astype(jnp.float32) / 255)"),
    ),
    "label-offset": Fix(
        ("F.cross_entropy(logits, labels)  # from 1", "F.cross_entropy(logits, labels - 1)"),
        (
            "optax.softmax_cross_entropy_with_integer_labels(logits, labels)",
            "optax.softmax_cross_entropy_with_integer_labels(logits, labels - 1)",
        ),
    ),
    "ignore-index": Fix(
        ("F.cross_entropy(logits, labels)  # ignore_index=-100", "F.cross_entropy(logits, labels, ignore_index=0)"),
        ("losses.mean()", "losses.mean(where=labels != 0)"),
    ),
    "huber-delta": Fix(
        ("F.smooth_l1_loss(y, target, beta=0.5)", "F.huber_loss(y, target, delta=0.5)"),
        ("optax.huber_loss(y, target, delta=0.5).mean() / 0.5", "optax.huber_loss(y, target, delta=0.5).mean()"),
    ),
    "loss-reduction": Fix(
        ('F.cross_entropy(logits, labels, reduction="sum")', 'F.cross_entropy(logits, labels)  # reduction="mean"'),
        ("losses.sum()", "losses.mean()"),
    ),
    "adam-epsilon": Fix(
        ("torch.optim.Adam(parameters, eps=1e-4)", "torch.optim.Adam(parameters, eps=1e-8)"),
        ("optax.adam(1e-3, eps=0.0, eps_root=1e-8)", "optax.adam(1e-3, eps=1e-8)"),
    ),
    "bias-correction": Fix(
        ("update = m / (v.sqrt() + eps)", "update = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)"),
        ("update = m / (jnp.sqrt(v) + eps)", "update = m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + eps)"),
    ),
    "weight-decay-coupling": Fix(
        ("torch.optim.Adam(parameters, weight_decay=0.1)", "torch.optim.AdamW(parameters, weight_decay=0.1)"),
        ("optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-3))", "optax.adamw(1e-3, weight_decay=0.1)"),
    ),
    "momentum-dampening": Fix(
        (
            "torch.optim.SGD(parameters, 0.1, momentum=0.9, dampening=0.9)",
            "torch.optim.SGD(parameters, 0.1, momentum=0.9)",
        ),
        ("optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.1))", "optax.sgd(0.1, momentum=0.9)"),
    ),
    "nesterov": Fix(
        (
            "torch.optim.SGD(parameters, 0.1, momentum=0.9)",
            "torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True)",
        ),
        ("optax.sgd(0.1, momentum=0.9)", "optax.sgd(0.1, momentum=0.9, nesterov=True)"),
    ),
    "gradient-clipping": Fix(
        ("optimizer.step()", "nn.utils.clip_grad_norm_(parameters, 1.0)"),
        ("optax.sgd(0.1)", "optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))"),
    ),
    "learning-rate": Fix(
        ("torch.optim.SGD(parameters, 0.01)", "torch.optim.SGD(parameters, 0.1)"),
        ("optax.sgd(0.01)", "optax.sgd(0.1)"),
    ),
    "initialisation": Fix(
        ("nn.Linear(n, m)  # uniform, variance 1/(3n)", "nn.init.xavier_uniform_(linear.weight)"),
        (
            "nnx.Linear(n, m, rngs=rngs)  # truncated normal, 1/n",
            "nnx.Linear(n, m, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)",
        ),
    ),
}
