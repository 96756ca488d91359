"""The pairs: networks that Hugging Face publishes in both frameworks, tiny and random.

Nothing here imports a framework: a pair is data, and `built` alone needs transformers.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, Any]


class Pair(NamedTuple):
    """A PyTorch class and its Flax class.

    Attributes:
      classes: of the configuration, PyTorch's and Flax's, by their names in transformers.
      config: what makes it tiny; the rest is as published.
      inputs: makes PyTorch's keywords.
      mistake: what the Flax side's configuration has otherwise.
      code: the bridge's name of that mistake.
      flax_inputs: makes Flax's keywords of PyTorch's, where they are others.
      differs: the codes of what is truly otherwise in the two as they are published, in training.
    """

    classes: tuple[str, str, str]
    config: Mapping[str, Any]
    inputs: Callable[[], Arrays]
    mistake: Mapping[str, Any]
    code: str
    flax_inputs: Callable[[Arrays], Arrays] | None = None
    differs: tuple[str, ...] = ()


def _tokens(length: int = 7, *, name: str = "", low: int = 3, high: int = 50) -> Arrays:
    """Two sentences, of which the second is padded at its end."""
    ids = np.random.default_rng(0).integers(low, high, (2, length))
    mask = np.ones_like(ids)
    mask[1, -2:] = 0
    return {f"{name}input_ids": ids, f"{name}attention_mask": mask}


def _images(size: int = 16) -> Arrays:
    return {"pixel_values": np.random.default_rng(0).normal(size=(2, 3, size, size)).astype(np.float32)}


def _two_texts() -> Arrays:
    return _tokens() | _tokens(6, name="decoder_")


def _speech() -> Arrays:
    features = np.random.default_rng(0).normal(size=(2, 8, 32)).astype(np.float32)
    return {"input_features": features, "decoder_input_ids": _tokens(6)["input_ids"]}


def _counted(rows: int, length: int) -> NDArray[Any]:
    return np.broadcast_to(np.arange(length), (rows, length))


def _with_positions(inputs: Arrays, *, padding: int | None = None) -> Arrays:
    """What Flax's outer class counts and its module takes; RoBERTa counts from behind the number of padding."""
    ids = inputs["input_ids"]
    counted = _counted(*ids.shape)
    if padding is not None:
        seen = (ids != padding).astype(int)
        counted = seen.cumsum(1) * seen + padding
    return inputs | {"position_ids": counted}


def _seen(mask: NDArray[Any]) -> NDArray[Any]:
    """The number of each place among those that are seen, from 0; -1 of the others."""
    return mask.cumsum(1) * mask - 1


def _channels_last(inputs: Arrays) -> Arrays:
    return inputs | {"pixel_values": inputs["pixel_values"].transpose(0, 2, 3, 1)}


_BERT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
_VIT = {k: v for k, v in _BERT.items() if k not in ("vocab_size", "max_position_embeddings")} | {"image_size": 16}

_ENCODER_DECODER = {
    "vocab_size": 60,
    "d_model": 24,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 40 for side in ("encoder", "decoder")},
    "use_cache": False,
}

PAIRS: dict[str, Pair] = {
    "BERT": Pair(
        ("BertConfig", "BertModel", "FlaxBertModel"),
        _BERT,
        _tokens,
        {"layer_norm_eps": 1e-3},
        "epsilon",
        flax_inputs=_with_positions,
    ),
    "RoBERTa": Pair(
        ("RobertaConfig", "RobertaModel", "FlaxRobertaModel"),
        _BERT,
        _tokens,
        {"hidden_act": "gelu_new"},
        "activation",
        flax_inputs=lambda inputs: _with_positions(inputs, padding=1),
    ),
    "ViT": Pair(
        ("ViTConfig", "ViTModel", "FlaxViTModel"),
        _VIT | {"patch_size": 4},
        _images,
        {"num_attention_heads": 3},
        "attention-heads",
    ),
    "ResNet": Pair(
        ("ResNetConfig", "ResNetModel", "FlaxResNetModel"),
        {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2]},
        _images,
        {"hidden_act": "silu"},
        "activation",
        differs=("unbiased-variance",),
    ),
    "RegNet": Pair(
        ("RegNetConfig", "RegNetModel", "FlaxRegNetModel"),
        {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "groups_width": 8},
        _images,
        {"hidden_act": "gelu"},
        "activation",
        differs=("train-uses-moving-statistics", "unbiased-variance"),
    ),
    "GPT-2": Pair(
        ("GPT2Config", "GPT2LMHeadModel", "FlaxGPT2LMHeadModel"),
        {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32, "use_cache": False},
        _tokens,
        {"activation_function": "gelu"},
        "activation",
        flax_inputs=_with_positions,
    ),
    "LLaMA": Pair(
        ("LlamaConfig", "LlamaForCausalLM", "FlaxLlamaForCausalLM"),
        _BERT | {"use_cache": False},
        _tokens,
        {"hidden_act": "gelu"},
        "gate",
        flax_inputs=_with_positions,
    ),
    "T5": Pair(
        ("T5Config", "T5ForConditionalGeneration", "FlaxT5ForConditionalGeneration"),
        {
            "vocab_size": 50,
            "d_model": 24,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 3,
            "decoder_start_token_id": 0,
            "use_cache": False,
        },
        _two_texts,
        {"feed_forward_proj": "gelu"},
        "activation",
    ),
    "CLIP": Pair(
        ("CLIPConfig", "CLIPModel", "FlaxCLIPModel"),
        {"projection_dim": 12, "text_config": _BERT, "vision_config": _VIT | {"patch_size": 8}},
        lambda: _tokens() | _images(),
        {"text_config": {"hidden_act": "gelu"}},
        "activation",
        flax_inputs=lambda inputs: _channels_last(_with_positions(inputs)),
    ),
    "Wav2Vec2": Pair(
        ("Wav2Vec2Config", "Wav2Vec2Model", "FlaxWav2Vec2Model"),
        {k: v for k, v in _BERT.items() if k != "max_position_embeddings"}
        | {
            "conv_dim": (8, 8),
            "conv_stride": (4, 2),
            "conv_kernel": (8, 4),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "do_stable_layer_norm": True,
            "feat_extract_norm": "layer",
            "mask_time_prob": 0.05,  # else PyTorch has no vector for what is masked, as Flax has
            "apply_spec_augment": False,
            "layerdrop": 0.0,
        },
        lambda: {"input_values": np.random.default_rng(0).normal(size=(2, 160)).astype(np.float32)},
        {"feat_extract_activation": "gelu_new"},
        "activation",
    ),
    "Whisper": Pair(
        ("WhisperConfig", "WhisperForConditionalGeneration", "FlaxWhisperForConditionalGeneration"),
        _ENCODER_DECODER
        | {
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
        _speech,
        {"activation_function": "gelu_new"},
        "activation",
        flax_inputs=lambda inputs: (
            inputs | {"decoder_attention_mask": np.ones((2, 6), int), "decoder_position_ids": _counted(2, 6)}
        ),
    ),
    "BART": Pair(
        ("BartConfig", "BartModel", "FlaxBartModel"),
        _ENCODER_DECODER | {"max_position_embeddings": 32},
        _two_texts,
        {"activation_function": "gelu_new"},
        "activation",
        flax_inputs=lambda inputs: inputs | {"position_ids": _counted(2, 7), "decoder_position_ids": _counted(2, 6)},
    ),
    # A head whose weight is the embedding's, and whose bias is its own.
    "DistilBERT": Pair(
        ("DistilBertConfig", "DistilBertForMaskedLM", "FlaxDistilBertForMaskedLM"),
        {
            "vocab_size": 50,
            "dim": 24,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 40,
            "max_position_embeddings": 32,
        },
        _tokens,
        {"tie_word_embeddings": False},
        "tied-weights",
    ),
    # One layer, called three times.
    "ALBERT": Pair(
        ("AlbertConfig", "AlbertModel", "FlaxAlbertModel"),
        _BERT | {"embedding_size": 16, "num_hidden_layers": 3},
        _tokens,
        {"layer_norm_eps": 1e-3},
        "epsilon",
        flax_inputs=_with_positions,
    ),
    # Rotary positions of a table that PyTorch keeps in a parameter, and Flax in its code.
    "RoFormer": Pair(
        ("RoFormerConfig", "RoFormerModel", "FlaxRoFormerModel"),
        _BERT | {"embedding_size": 24, "rotary_value": False},
        _tokens,
        {"num_attention_heads": 3},
        "attention-heads",
        flax_inputs=lambda inputs: inputs | {"token_type_ids": np.zeros_like(inputs["input_ids"]), "head_mask": None},
    ),
    # Positions that count what is seen.
    "OPT": Pair(
        ("OPTConfig", "OPTForCausalLM", "FlaxOPTForCausalLM"),
        {
            "vocab_size": 50,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 40,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 24,
            "use_cache": False,
        },
        _tokens,
        {"num_attention_heads": 3},
        "attention-heads",
        flax_inputs=lambda inputs: inputs | {"position_ids": _seen(inputs["attention_mask"])},
    ),
    # Attention to the last few alone, in every second layer.
    "GPT-Neo": Pair(
        ("GPTNeoConfig", "GPTNeoForCausalLM", "FlaxGPTNeoForCausalLM"),
        {
            "vocab_size": 50,
            "hidden_size": 24,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 40,
            "max_position_embeddings": 32,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "use_cache": False,
        },
        _tokens,
        {"window_size": 3},
        "attention-mask",
        flax_inputs=_with_positions,
    ),
    # Distances in the place of positions (ALiBi), and query, key and value in one.
    "BLOOM": Pair(
        ("BloomConfig", "BloomForCausalLM", "FlaxBloomForCausalLM"),
        {"vocab_size": 50, "hidden_size": 24, "n_layer": 2, "n_head": 2, "use_cache": False},
        _tokens,
        {"layer_norm_epsilon": 1e-3},
        "epsilon",
    ),
    # A shared bias of relative positions, and paths that are dropped in training.
    "BEiT": Pair(
        ("BeitConfig", "BeitForImageClassification", "FlaxBeitForImageClassification"),
        _VIT | {"patch_size": 4, "use_shared_relative_position_bias": True, "drop_path_rate": 0.5},
        _images,
        {"hidden_act": "relu"},
        "activation",
    ),
    # Sinusoids in Flax's code, and a bias that is a buffer in PyTorch and a parameter in Flax.
    "Marian": Pair(
        ("MarianConfig", "MarianMTModel", "FlaxMarianMTModel"),
        _ENCODER_DECODER
        | {"max_position_embeddings": 32, "pad_token_id": 59, "decoder_start_token_id": 59, "eos_token_id": 0},
        _two_texts,
        {"activation_function": "relu"},
        "activation",
        flax_inputs=lambda inputs: inputs | {"position_ids": _counted(2, 7), "decoder_position_ids": _counted(2, 6)},
    ),
}


class Built(NamedTuple):
    """What `parity.check` is called with.

    Attributes:
      torch_module: PyTorch's.
      flax_module: Flax's: a FlaxPreTrainedModel.
      keywords: what PyTorch's is called with.
      flax_inputs: what Flax's is called with; None: the same.
    """

    torch_module: Any
    flax_module: Any
    keywords: Arrays
    flax_inputs: Arrays | None


def built(name: str, *, mistaken: bool = False) -> Built:
    """The pair, with random weights; with its mistake in the Flax side's configuration, or without."""
    import torch
    import transformers

    run_on_this_jax()
    pair = PAIRS[name]
    config, torch_class, flax_class = (getattr(transformers, class_) for class_ in pair.classes)
    torch.manual_seed(0)
    torch_module = randomised(torch_class(config(**copy.deepcopy(dict(pair.config)))))
    changed = merged(pair.config, pair.mistake if mistaken else {})
    flax_module = flax_class(config(**changed))
    keywords = pair.inputs()
    flax_inputs = None if pair.flax_inputs is None else pair.flax_inputs(keywords)
    return Built(torch_module, flax_module, keywords, flax_inputs)


def randomised(module: Any) -> Any:
    """Every parameter and moving statistic moved by noise, as published ones are: a fresh scale of 1 hides mistakes.

    What is not trained, as a table of sinusoids, is the same in all of them.
    """
    import torch

    with torch.no_grad():
        trained = [p for p in module.parameters() if p.requires_grad]
        for tensor in [*trained, *(b for name, b in module.named_buffers() if "running_" in name)]:
            tensor.add_(0.1 * torch.rand_like(tensor))
    return module


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the changes, in nested ones too; a copy."""
    out = copy.deepcopy(dict(config))
    for key, value in changes.items():
        out[key] = merged(out.get(key, {}), value) if isinstance(value, Mapping) else value
    return out


SHIMS = ("`jnp.clip(x, a_max=...)`, which JAX has no more, means `jnp.clip(x, max=...)` (T5's buckets of positions)",)
"""What is put right so that transformers runs with this JAX, in words."""


def run_on_this_jax() -> None:
    """Puts `SHIMS` in their places."""
    import jax.numpy as jnp

    if "a_max" in inspect.signature(jnp.clip).parameters:
        return
    clip = jnp.clip

    @functools.wraps(clip)
    def with_old_names(*args: Any, **kwargs: Any) -> Any:
        return clip(*args, **{{"a_min": "min", "a_max": "max"}.get(name, name): v for name, v in kwargs.items()})

    jnp.clip = with_old_names
