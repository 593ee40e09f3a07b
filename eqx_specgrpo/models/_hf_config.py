"""From `config.json` of Hugging Face checkpoints to `TransformerConfig`; `_hf_write` goes the other way.

Keys that are absent mean what they mean in transformers, both in files that its version 5 writes (`rope_parameters`,
`dtype`, `layer_types`) and in older ones (`rope_theta` and `rope_scaling` at the top level).
"""

import math
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError
from ._config import TransformerConfig
from ._config_keys import CONFIG_KEYS
from ._hf_families import DEFAULTS, FAMILIES, GEMMA, Reader
from ._hf_layers import no_rope_layers, windows
from ._hf_rope import rope_parameters, rope_scaling, rotary_dim
from ._keys import check_keys

_ACTIVATIONS: dict[Any, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def config_from_hf(values: dict[str, Any], origin: Path) -> TransformerConfig:
    """Translates a parsed `config.json`.

    **Arguments:**

    - `values`: the JSON object.
    - `origin`: its path, for messages.

    **Raises:**

    `CheckpointError` for whatever `Transformer` cannot represent: no model is better than a wrong one.
    """
    family = values.get("model_type")
    read = Reader({**DEFAULTS.get(str(family), {}), **values}, origin)
    if family not in FAMILIES:
        raise read.fail(f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    if values.get("quantization_config"):
        raise read.fail(
            "the weights are quantized (quantization_config); only float32, float16 and bfloat16 safetensors are "
            "supported: use the unquantized checkpoint, or a .gguf file"
        )
    if values.get("rope_interleaved"):
        raise read.fail("rope_interleaved is true; only the half-split rotary layout of transformers is supported")
    check_keys(values, CONFIG_KEYS, origin, family)
    try:
        config = _translate(read, family)
    except CheckpointError:
        raise
    except ValueError as error:  # What TransformerConfig itself rejects.
        raise read.fail(str(error)) from error
    _check_architecture(read, family)
    return config


def _translate(read: Reader, family: str) -> TransformerConfig:
    num_heads = read.integer("num_attention_heads")
    hidden_size = read.integer("hidden_size")
    num_layers = read.integer("num_hidden_layers")
    max_positions = read.integer("max_position_embeddings")
    head_dim = read.integer("head_dim", hidden_size // num_heads)
    if family == "qwen2":
        qkv_bias, output_bias = True, False
    else:
        qkv_bias = output_bias = family not in ("mistral", "phi3") and read.flag("attention_bias")
    rope, sliding_theta = rope_parameters(read, family)
    no_rope = no_rope_layers(read, family, num_layers)
    window, full = windows(read, family, num_layers, no_rope)
    if window is None or (window >= max_positions and sliding_theta is None):
        window, full, sliding_theta = None, (), None  # It never cuts anything off.
    return TransformerConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=read.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope_theta=rope.number("rope_theta", 10000.0),
        rope_scaling=rope_scaling(rope, family, max_positions),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=family in ("llama", "granite", "smollm3") and read.flag("mlp_bias"),
        qk_norm=family in ("qwen3", "olmo2", "gemma3_text"),
        tie_embeddings=read.flag("tie_word_embeddings"),
        sliding_window=window,
        full_attention_layers=full,
        sliding_rope_theta=sliding_theta,
        no_rope_layers=no_rope,
        rotary_dim=rotary_dim(rope, family, head_dim),
        qk_norm_across_heads=family == "olmo2",
        norm_placement="around" if family in GEMMA else "after" if family == "olmo2" else "before",
        norm_offset=1.0 if family in GEMMA else 0.0,
        activation=_activation(read, family),
        embedding_multiplier=math.sqrt(hidden_size) if family in GEMMA else read.number("embedding_multiplier", 1.0),
        residual_multiplier=read.number("residual_multiplier", 1.0),
        attention_multiplier=_attention_multiplier(read, family, head_dim),
        logits_scaling=read.number("logits_scaling", 1.0),
        attn_logit_softcapping=read.optional_number("attn_logit_softcapping"),
        final_logit_softcapping=read.optional_number("final_logit_softcapping"),
    )


def _activation(read: Reader, family: str) -> Literal["silu", "gelu_tanh"]:
    key = "hidden_activation" if family in GEMMA else "hidden_act"
    stated = read.values.get(key, "silu")
    if stated not in _ACTIVATIONS:
        raise read.fail(f"{key} {stated!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[stated]


def _attention_multiplier(read: Reader, family: str, head_dim: int) -> float | None:
    if family in GEMMA:
        scalar = read.number("query_pre_attn_scalar")
        return None if scalar == head_dim else scalar**-0.5
    return read.optional_number("attention_multiplier")


def _check_architecture(read: Reader, family: str) -> None:
    """A file for a classifier, or for somebody's own code, may use the family's keys and mean another model."""
    stated = read.values.get("architectures")
    if stated and not (isinstance(stated, list) and FAMILIES[family].lower() in [str(name).lower() for name in stated]):
        raise read.fail(f"architectures is {stated!r}, but a {family} model that can be trained is {FAMILIES[family]}")
