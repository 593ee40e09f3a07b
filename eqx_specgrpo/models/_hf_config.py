"""`config.json` of Hugging Face checkpoints <-> `TransformerConfig`.

Keys that are absent mean what they mean in transformers, both in files that its version 5 writes (`rope_parameters`,
`dtype`, `layer_types`) and in older ones (`rope_theta` and `rope_scaling` at the top level).
"""

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ._config import LinearRope, Llama3Rope, RopeScaling, TransformerConfig
from ._config_keys import CONFIG_KEYS, ROPE_KEYS
from ._keys import check_keys

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ROPE_TYPES = ("default", "linear", "llama3")
# What transformers' classes take where the key is absent; null means as many as there are query heads.
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}


class _Reader:
    """Typed access to a parsed JSON object, with the file's name in every complaint."""

    def __init__(self, values: dict[str, Any], origin: Path):
        self.values = values
        self.origin = origin

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.origin}: {message}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.fail(f"no {key!r}; a config.json of a causal language model states it")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(f"{key!r} is {value!r}, but must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.fail(f"{key!r} is {value!r}, but must be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(f"{key!r} is {value!r}, but must be true or false")
        return bool(value)


def config_from_hf(values: dict[str, Any], origin: Path) -> TransformerConfig:
    """Translates a parsed `config.json`.

    **Arguments:**

    - `values`: the JSON object.
    - `origin`: its path, for messages.

    **Raises:**

    `CheckpointError` for whatever `Transformer` cannot represent: no model is better than a wrong one.
    """
    read = _Reader(values, origin)
    family = values.get("model_type")
    if family not in FAMILIES:
        raise read.fail(f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    if values.get("quantization_config"):
        raise read.fail(
            "the weights are quantized (quantization_config); only float32, float16 and bfloat16 safetensors are "
            "supported: use the unquantized checkpoint, or a .gguf file"
        )
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise read.fail(f"hidden_act {values['hidden_act']!r} is not supported; supported is silu")
    if values.get("rope_interleaved"):
        raise read.fail("rope_interleaved is true; only the half-split rotary layout of transformers is supported")
    check_keys(values, CONFIG_KEYS, origin, family)

    num_heads = read.integer("num_attention_heads")
    hidden_size = read.integer("hidden_size")
    num_layers = read.integer("num_hidden_layers")
    max_positions = read.integer("max_position_embeddings", 2048 if family == "llama" else None)
    if "head_dim" not in values and family == "qwen3":
        head_dim = 128  # Qwen3's default is a number, not hidden_size / num_attention_heads.
    else:
        head_dim = read.integer("head_dim", hidden_size // num_heads)
    if family == "qwen2":
        qkv_bias, output_bias = True, False
    else:
        qkv_bias = output_bias = family != "mistral" and read.flag("attention_bias")
    rope = _rope_parameters(read)
    try:
        config = TransformerConfig(
            vocab_size=read.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=read.integer(
                "num_key_value_heads",
                num_heads if "num_key_value_heads" in values else _KV_HEADS.get(family, num_heads),
            ),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rope_theta=rope.number("rope_theta", 10000.0),
            rope_scaling=_rope_scaling(rope, max_positions),
            norm_eps=read.number("rms_norm_eps", 1e-6),
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            mlp_bias=family == "llama" and read.flag("mlp_bias"),
            qk_norm=family == "qwen3",
            tie_embeddings=read.flag("tie_word_embeddings"),
            sliding_window=_sliding_window(read, family, num_layers, max_positions),
        )
    except CheckpointError:
        raise
    except ValueError as error:  # What TransformerConfig itself rejects.
        raise read.fail(str(error)) from error
    _check_architecture(read, family)
    return config


def _check_architecture(read: _Reader, family: str) -> None:
    """A file for a classifier, or for somebody's own code, may use the family's keys and mean another model."""
    stated = read.values.get("architectures")
    if stated and not (isinstance(stated, list) and FAMILIES[family].lower() in [str(name).lower() for name in stated]):
        raise read.fail(f"architectures is {stated!r}, but a {family} model that can be trained is {FAMILIES[family]}")


def _rope_parameters(read: _Reader) -> _Reader:
    """One flat object from either style, by the precedence of transformers.

    `rope_scaling` as a whole goes before `rope_parameters`. What is missing there comes from the top level, but for
    `original_max_position_embeddings`, where the top level wins.
    """
    values = read.values
    for key in ("rope_parameters", "rope_scaling"):
        nested = values.get(key)
        if nested is not None and (
            not isinstance(nested, dict) or any(isinstance(value, dict) for value in nested.values())
        ):
            raise read.fail(f"{key} is {nested!r}; only one flat object for all layers is supported")
    stated = values.get("rope_scaling") or values.get("rope_parameters") or {}
    outer = {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if values.get(key) is not None}
    merged = {**outer, **{key: value for key, value in stated.items() if value is not None}}
    if values.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    return _Reader(merged, read.origin)


def _rope_scaling(rope: _Reader, max_positions: int) -> RopeScaling:
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if rope.values.get("partial_rotary_factor", 1.0) != 1.0:
        raise rope.fail(f"partial_rotary_factor {rope.values['partial_rotary_factor']!r} is not supported; only 1 is")
    if kind not in _ROPE_TYPES:
        raise rope.fail(f"rope type {kind!r} is not supported; supported are {', '.join(_ROPE_TYPES)}")
    check_keys(rope.values, ROPE_KEYS, f"{rope.origin}, rotary embedding", kind)
    match kind:
        case "linear":
            return LinearRope(rope.number("factor"))
        case "llama3":
            return Llama3Rope(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_position_embeddings=rope.integer("original_max_position_embeddings", max_positions),
            )
        case _:
            return None


def _sliding_window(read: _Reader, family: str, num_layers: int, max_positions: int) -> int | None:
    """The window, where every layer has the same one; `None` where it never cuts anything off."""
    if family == "mistral":
        # The class default holds only where the key is absent; Mistral 7B v0.2 and later write null.
        window = read.values.get("sliding_window", 4096)
        default_kinds = ["full_attention" if window is None else "sliding_attention"] * num_layers
    elif family in ("qwen2", "qwen3"):
        used = read.flag("use_sliding_window")
        window = read.values.get("sliding_window", 4096) if used else None
        first = read.values.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise read.fail(f"max_window_layers is {first!r}, but must be an integer")
        default_kinds = [
            "sliding_attention" if window is not None and layer >= first else "full_attention"
            for layer in range(num_layers)
        ]
    else:
        window, default_kinds = None, ["full_attention"] * num_layers
    kinds = read.values.get("layer_types") or default_kinds
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise read.fail(f"layer_types is {kinds!r}, but must be a list of names")
    kinds = ["full_attention" if kind == "attention" else kind for kind in kinds]
    if len(kinds) != num_layers:
        raise read.fail(f"layer_types names {len(kinds)} layers, but num_hidden_layers is {num_layers}")
    if family == "mistral" and kinds != default_kinds:
        raise read.fail(
            f"layer_types says {sorted(set(kinds))}, but with sliding_window {window!r} transformers computes "
            f"{default_kinds[0]} in every layer of a mistral model: delete the one that is wrong"
        )
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"} or window is None:
        raise read.fail(
            f"attention differs between layers (layer_types or max_window_layers give {sorted(set(kinds))} with "
            f"sliding_window {window!r}); supported is one kind for all: full, or sliding with one window"
        )
    window = _Reader({"sliding_window": window}, read.origin).integer("sliding_window")
    return None if window >= max_positions else window


def family_of(config: TransformerConfig) -> str:
    """The transformers family that represents `config`.

    The configuration does not remember where it came from, and need not: families differ in options only. So a Mistral
    without a window is written as the Llama that it computes.
    """
    if config.qk_norm:
        supported, family = config.qkv_bias == config.output_bias and not config.mlp_bias, "qwen3"
    elif config.qkv_bias and not config.output_bias:
        supported, family = not config.mlp_bias, "qwen2"
    elif config.sliding_window is not None or config.hidden_size % config.num_heads != 0:
        supported, family = not (config.qkv_bias or config.output_bias or config.mlp_bias), "mistral"
    else:
        supported, family = config.qkv_bias == config.output_bias, "llama"
    if not supported:
        raise CheckpointError(
            f"transformers has no family with qkv_bias={config.qkv_bias}, output_bias={config.output_bias}, "
            f"mlp_bias={config.mlp_bias}, qk_norm={config.qk_norm} and sliding_window={config.sliding_window}, so this "
            f"model can't be written as a Hugging Face folder; the families are {', '.join(FAMILIES)}"
        )
    return family


def config_to_hf(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` from which transformers builds the same function.

    **Arguments:**

    - `dtype`: of the stored matrices, `"float32"` or `"bfloat16"`.
    """
    family = family_of(config)
    # Both styles at once: version 5 of transformers reads rope_parameters, older ones rope_theta and rope_scaling.
    rope: dict[str, Any] = {"rope_type": "default"}
    match config.rope_scaling:
        case LinearRope(factor):
            rope = {"rope_type": "linear", "factor": factor}
        case Llama3Rope(factor, low, high, original):
            rope = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
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
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if family in ("llama", "qwen3"):
        values["attention_bias"] = config.qkv_bias
    if family == "llama":
        values["mlp_bias"] = config.mlp_bias
    if family == "mistral":
        values["sliding_window"] = config.sliding_window
    if family in ("qwen2", "qwen3"):
        windowed = config.sliding_window is not None
        values["use_sliding_window"] = windowed
        values["sliding_window"] = config.sliding_window
        values["max_window_layers"] = 0 if windowed else config.num_layers
        values["layer_types"] = ["sliding_attention" if windowed else "full_attention"] * config.num_layers
    return values
