"""What to write instead of a mistake in a layer of this kind, where the lines of `fixes.py` are of another kind."""

from __future__ import annotations

from parity.diagnosis.fixes import FIXES, Fix

BETWEEN = "between"
"""Of what lies between two layers, as a pool."""

_ROWS = {
    "wrong-reduction-axes": Fix(
        ("x.mean((1, 2), keepdim=True)", "x.mean(-1, keepdim=True)"),
        ("x.mean((1, 2), keepdims=True)", "x.mean(-1, keepdims=True)"),
    ),
    "variance-ddof": Fix(
        ("x.var(-1, keepdim=True)  # correction=1", "x.var(-1, correction=0, keepdim=True)"),
        ("x.var(-1, ddof=1, keepdims=True)", "x.var(-1, keepdims=True)  # ddof=0"),
    ),
    "stopped-statistics-gradient": Fix(
        ("mu = x.mean(-1, keepdim=True).detach()", "mu = x.mean(-1, keepdim=True)"),
        ("mu = jax.lax.stop_gradient(x.mean(-1, keepdims=True))", "mu = x.mean(-1, keepdims=True)"),
    ),
}
"""Of norms that take each example by itself."""

_CONV = "nnx.Conv(i, o, (3, 3), padding={}rngs=rngs)"

BY_KIND = {
    "no-partner": {
        "batch_norm": Fix(
            ("self.norm = nn.Identity()", "self.norm = nn.BatchNorm2d(c)"),
            ("self.norm = lambda x: x", "self.norm = nnx.BatchNorm(c, momentum=0.9, rngs=rngs)"),
        ),
        "linear": Fix(
            ("self.fc = nn.Identity()", "self.fc = nn.Linear(n, m)"),
            ("self.fc = lambda x: x", "self.fc = nnx.Linear(n, m, rngs=rngs)"),
        ),
        "conv": Fix(
            ("self.conv = nn.Identity()", "self.conv = nn.Conv2d(i, o, 3, padding=1)"),
            ("self.conv = lambda x: x", "self.conv = nnx.Conv(i, o, (3, 3), padding=1, rngs=rngs)"),
        ),
        "embedding": Fix(
            ("self.positions = nn.Identity()", "self.positions = nn.Embedding(n, c)"),
            ("self.positions = lambda x: x", "self.positions = nnx.Embed(n, c, rngs=rngs)"),
        ),
    },
    **{code: dict.fromkeys(("layer_norm", "group_norm", "rms_norm"), fix) for code, fix in _ROWS.items()},
    "affine-missing": {
        "batch_norm": Fix(
            ("nn.BatchNorm2d(c, affine=False)", "nn.BatchNorm2d(c)"),
            (
                "nnx.BatchNorm(c, use_scale=False, use_bias=False, rngs=rngs)",
                "nnx.BatchNorm(c, rngs=rngs)",
            ),
        ),
        "group_norm": Fix(
            ("nn.GroupNorm(n, c, affine=False)", "nn.GroupNorm(n, c)"),
            (
                "nnx.GroupNorm(c, num_groups=n, use_scale=False, use_bias=False, rngs=rngs)",
                "nnx.GroupNorm(c, num_groups=n, epsilon=1e-5, rngs=rngs)",
            ),
        ),
        "rms_norm": Fix(
            ("nn.RMSNorm(c, eps=1e-6, elementwise_affine=False)", "nn.RMSNorm(c, eps=1e-6)"),
            ("nnx.RMSNorm(c, use_scale=False, rngs=rngs)", "nnx.RMSNorm(c, rngs=rngs)"),
        ),
    },
    "bias-missing": {
        "conv": Fix(
            ("nn.Conv2d(i, o, 3, padding=1, bias=False)", "nn.Conv2d(i, o, 3, padding=1)"),
            (_CONV.format("1, use_bias=False, "), _CONV.format("1, ")),
        ),
        "layer_norm": Fix(
            ("nn.LayerNorm(c, bias=False)", "nn.LayerNorm(c)"),
            (
                "nnx.LayerNorm(c, epsilon=1e-5, use_bias=False, rngs=rngs)",
                "nnx.LayerNorm(c, epsilon=1e-5, rngs=rngs)",
            ),
        ),
    },
    "epsilon": {
        "batch_norm": Fix(
            ("nn.BatchNorm2d(c, eps=1e-3)", "nn.BatchNorm2d(c)  # eps=1e-5"),
            (
                "nnx.BatchNorm(c, momentum=0.9, epsilon=1e-3, rngs=rngs)",
                "nnx.BatchNorm(c, momentum=0.9, rngs=rngs)  # epsilon=1e-5",
            ),
        ),
        "group_norm": Fix(
            ("nn.GroupNorm(n, c, eps=1e-6)", "nn.GroupNorm(n, c)  # eps=1e-5"),
            (
                "nnx.GroupNorm(c, num_groups=n, rngs=rngs)  # epsilon=1e-6",
                "nnx.GroupNorm(c, num_groups=n, epsilon=1e-5, rngs=rngs)",
            ),
        ),
        "rms_norm": Fix(
            ("nn.RMSNorm(c)  # eps: the dtype's own", "nn.RMSNorm(c, eps=1e-6)"),
            ("nnx.RMSNorm(c, epsilon=1e-5, rngs=rngs)", "nnx.RMSNorm(c, rngs=rngs)  # epsilon=1e-6"),
        ),
    },
    "stride": {
        "conv": Fix(
            ("nn.Conv2d(i, o, 3, padding=1)  # stride=1", "nn.Conv2d(i, o, 3, stride=2, padding=1)"),
            (_CONV.format("1, ") + "  # strides=1", _CONV.format("1, strides=2, ")),
        ),
    },
    "padding": {
        BETWEEN: Fix(
            ("nn.MaxPool2d(3, 2, ceil_mode=True)", "nn.MaxPool2d(3, 2, padding=1)"),
            (
                'nnx.max_pool(x, (3, 3), (2, 2), padding="SAME")',
                "nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))",
            ),
        ),
    },
}
"""Code -> kind of layer (`records.kinds`) or `BETWEEN` -> what to write there, where `FIXES` is of another kind."""


def fix_of(code: str, kind: str = "") -> Fix | None:
    """What to write instead, of a layer of this kind; None of a code that is no mistake's."""
    return BY_KIND.get(code, {}).get(kind) or FIXES.get(code)
