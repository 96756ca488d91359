"""Run folders as the training programs leave them, with weights off their initial values, and without the training."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch
from flax.traverse_util import flatten_dict

import image_data
import jax_bn
import torch_bn
from bn_common.config import Config
from bn_common.record import CONFIG, WEIGHTS, identity_of, record_of


def moved(weights, seed):
    """Moving variances off 0, all else off its initial value: in prediction no sigmoid is saturated."""
    rng = np.random.default_rng(seed)
    return {
        name: (v + rng.uniform(0.2, 0.5, v.shape) * (v.ndim == 1)).astype(np.float32) for name, v in weights.items()
    }


def trained_run(folder, framework="jax", **options):
    """The folder of a run on the sample."""
    if framework == "jax":
        init = jax.jit(functools.partial(jax_bn.BLeNet().init, train=False))
        weights = flatten_dict(init(jax.random.key(0), jnp.zeros((1, 28, 28, 1))), sep="/")
    else:
        torch.manual_seed(0)
        weights = {name: v.numpy() for name, v in torch_bn.BLeNet().state_dict().items()}
    folder.mkdir()
    config = Config(**({"data": "sample"} | options)).resolved()
    record = record_of(config, framework) | identity_of(image_data.load_sample())
    (folder / CONFIG).write_text(json.dumps(record))
    safetensors.numpy.save_file(moved({name: np.asarray(v) for name, v in weights.items()}, 1), folder / WEIGHTS)
    return folder


def standardised(images):
    """As training does it, [N, H, W, 1]."""
    mean, std = map(np.float32, image_data.pixel_mean_and_std(image_data.load_sample().train_images))
    return ((images.astype(np.float32) - mean) / std)[..., None]
