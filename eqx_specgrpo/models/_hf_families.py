"""The supported families of transformers: their classes, and what they take for keys that a `config.json` lacks."""

from pathlib import Path
from typing import Any

from ..errors import CheckpointError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}

_GEMMA = dict(
    num_key_value_heads=4,
    head_dim=256,
    tie_word_embeddings=True,
    sliding_window=4096,
    query_pre_attn_scalar=256,
    hidden_activation="gelu_pytorch_tanh",
)
_QWEN = dict(num_key_value_heads=32, sliding_window=4096, max_window_layers=28)

# Of the keys whose absence no missing or misshapen tensor would show. A key that is there and null is not absent.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(max_position_embeddings=2048),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096),
    "qwen2": _QWEN,
    "qwen3": dict(_QWEN, head_dim=128),
    "smollm3": dict(num_key_value_heads=4, rope_theta=2e6, tie_word_embeddings=True, no_rope_layer_interval=4),
    "phi3": dict(rms_norm_eps=1e-5, original_max_position_embeddings=4096),
    "olmo2": dict(rms_norm_eps=1e-5),
    "granite": dict(embedding_multiplier=1.0, residual_multiplier=1.0, attention_multiplier=1.0, logits_scaling=1.0),
    "gemma2": dict(_GEMMA, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3_text": dict(_GEMMA, rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=6),
}
GEMMA = ("gemma2", "gemma3_text")
FUSED = ("phi3",)  # Queries, keys and values are one tensor there, and so are gate and up.


class Reader:
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

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(f"{key!r} is {value!r}, but must be true or false")
        return default if value is None else value

    def numbers(self, key: str) -> tuple[float, ...]:
        values = self.values.get(key)
        if not isinstance(values, list) or not all(isinstance(x, int | float) and x > 0 for x in values):
            raise self.fail(f"{key!r} is {values!r}, but must be a list of positive numbers")
        return tuple(float(x) for x in values)
