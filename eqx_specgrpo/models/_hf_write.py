"""From `TransformerConfig` to the `config.json` from which transformers builds the same function."""

import dataclasses
import math
from typing import Any

from ..errors import CheckpointError
from ._config import DynamicRope, LinearRope, Llama3Rope, LongRope, RopeScaling, TransformerConfig, YarnRope
from ._hf_families import FAMILIES, GEMMA

_ALL = {"rope_theta", "rope_scaling", "norm_eps", "tie_embeddings", "activation"}
_BIASES = {"qkv_bias", "output_bias"}
_WINDOWS = {"sliding_window", "full_attention_layers"}
_GEMMA_ALL = {"norm_placement", "norm_offset", "embedding_multiplier", "attention_multiplier"} | {
    "attn_logit_softcapping",
    "final_logit_softcapping",
}
# Which options may differ from their defaults; `_fits` has what goes beyond.
_OPTIONS = {
    "llama": _ALL | _BIASES | {"mlp_bias"},
    "qwen2": _ALL | _WINDOWS | {"qkv_bias"},
    "qwen3": _ALL | _WINDOWS | _BIASES | {"qk_norm"},
    "mistral": _ALL | {"sliding_window"},
    "smollm3": _ALL | _WINDOWS | _BIASES | {"mlp_bias", "no_rope_layers"},
    "phi3": _ALL | {"sliding_window", "rotary_dim"},
    "olmo2": _ALL | _BIASES | {"norm_placement", "qk_norm", "qk_norm_across_heads"},
    "granite": _ALL
    | _BIASES
    | {"mlp_bias", "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"},
    "gemma2": _ALL | _BIASES | _WINDOWS | _GEMMA_ALL,
    "gemma3_text": _ALL | _BIASES | _WINDOWS | _GEMMA_ALL | {"qk_norm", "sliding_rope_theta"},
}


def family_of(config: TransformerConfig) -> str:
    """The transformers family that represents `config`.

    The configuration does not remember where it came from, and need not: families differ in options only. So a Mistral
    without a window is written as the Llama that it computes.
    """
    values = dataclasses.asdict(config)
    options = {
        field.name: values[field.name]
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING and values[field.name] != field.default
    }
    fitting = [family for family, allowed in _OPTIONS.items() if set(options) <= allowed and _fits(family, config)]
    if not fitting:
        stated = ", ".join(f"{name}={value}" for name, value in options.items())
        raise CheckpointError(
            f"transformers has no family with {stated} and head_dim={config.head_dim}, so this model can't be written "
            f"as a Hugging Face folder; the families are {', '.join(FAMILIES)}"
        )
    return fitting[0]


def _fits(family: str, config: TransformerConfig) -> bool:
    """What a family has whether one wants it or not, and what transformers asks of it."""
    if family == "qwen2":
        return config.qkv_bias
    if config.qkv_bias != config.output_bias or config.qk_norm != (family in ("qwen3", "olmo2", "gemma3_text")):
        return False
    whole = config.hidden_size % config.num_heads == 0
    match family:
        case "llama":
            return whole
        case "phi3":
            turning = int(config.head_dim * _rotary_share(config)) == (config.rotary_dim or config.head_dim)
            scaled = config.rope_scaling is None or isinstance(config.rope_scaling, LongRope)
            return turning and scaled and config.head_dim * config.num_heads == config.hidden_size
        case "olmo2":
            return config.qk_norm_across_heads and config.norm_placement == "after"
        case "granite":
            return config.attention_multiplier is not None
        case "gemma2" | "gemma3_text":
            around = config.norm_placement == "around" and config.norm_offset == 1
            scaled = config.embedding_multiplier == math.sqrt(config.hidden_size)
            return whole and around and scaled and _query_scalar(config) is not None
        case _:
            return True


def _rotary_share(config: TransformerConfig) -> float:
    return (config.rotary_dim or config.head_dim) / config.head_dim


def _query_scalar(config: TransformerConfig) -> int | None:
    """The whole number that Gemma's file states in place of the factor on scores."""
    if config.attention_multiplier is None:
        return config.head_dim
    scalar = round(config.attention_multiplier**-2)
    return scalar if scalar**-0.5 == config.attention_multiplier else None


def config_to_hf(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The `config.json`.

    **Arguments:**

    - `dtype`: of the stored matrices, `"float32"` or `"bfloat16"`.
    """
    family = family_of(config)
    values: dict[str, Any] = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        **_rope(config, family),
        "rms_norm_eps": config.norm_eps,
        "hidden_activation" if family in GEMMA else "hidden_act": (
            "silu" if config.activation == "silu" else "gelu_pytorch_tanh"
        ),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if family not in ("mistral", "phi3", "qwen2"):
        values["attention_bias"] = config.qkv_bias
    if family in ("llama", "granite", "smollm3"):
        values["mlp_bias"] = config.mlp_bias
    return {**values, **_layers(config, family), **_multipliers(config, family)}


def _layers(config: TransformerConfig, family: str) -> dict[str, Any]:
    if family in ("llama", "olmo2", "granite"):
        return {}
    if family in ("mistral", "phi3"):
        return {"sliding_window": config.sliding_window}
    layers, windowed = range(config.num_layers), config.sliding_window is not None
    kinds = ["full_attention" if config.window(layer) is None else "sliding_attention" for layer in layers]
    values: dict[str, Any] = {"sliding_window": config.sliding_window, "layer_types": kinds}
    if family in GEMMA:  # transformers wants a number, whether a layer uses it or not.
        values["sliding_window"] = config.sliding_window or config.max_position_embeddings
    else:
        values["use_sliding_window"] = windowed
    if family in ("qwen2", "qwen3"):
        values["max_window_layers"] = kinds.index("sliding_attention") if windowed else config.num_layers
    if family == "smollm3":
        values["no_rope_layers"] = [int(layer not in config.no_rope_layers) for layer in layers]
    return values


def _multipliers(config: TransformerConfig, family: str) -> dict[str, Any]:
    if family in GEMMA:
        return {
            "query_pre_attn_scalar": _query_scalar(config),
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    if family == "granite":
        return {
            "embedding_multiplier": config.embedding_multiplier,
            "residual_multiplier": config.residual_multiplier,
            "attention_multiplier": config.attention_multiplier,
            "logits_scaling": config.logits_scaling,
        }
    return {}


def _rope(config: TransformerConfig, family: str) -> dict[str, Any]:
    """Both styles at once: version 5 of transformers reads `rope_parameters`, older ones what is at the top level."""
    scaling = _scaling(config.rope_scaling)
    theta = {"rope_theta": config.rope_theta}
    older: dict[str, Any] = {**theta, "rope_scaling": None if config.rope_scaling is None else scaling}
    if family == "gemma3_text":
        local = config.sliding_rope_theta or 10000.0
        nested = {
            "full_attention": {**scaling, **theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
        return {"rope_parameters": nested, "rope_local_base_freq": local, **older}
    share = {} if config.rotary_dim is None else {"partial_rotary_factor": _rotary_share(config)}
    if family == "phi3":
        original = config.max_position_embeddings
        if isinstance(config.rope_scaling, LongRope):
            original = config.rope_scaling.original_max_position_embeddings
        older["original_max_position_embeddings"] = original
    return {"rope_parameters": {**scaling, **theta, **share}, **older, **share}


def _scaling(scaling: RopeScaling) -> dict[str, Any]:
    match scaling:
        case None:
            return {"rope_type": "default"}
        case LinearRope():
            kind = "linear"
        case DynamicRope():
            kind = "dynamic"
        case Llama3Rope():
            kind = "llama3"
        case YarnRope():
            kind = "yarn"
        case LongRope():
            kind = "longrope"
    values = dataclasses.asdict(scaling)
    return {"rope_type": kind, **{key: list(x) if isinstance(x, tuple) else x for key, x in values.items()}}
