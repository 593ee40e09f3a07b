"""The rotary embedding that a `config.json` describes, in the styles of transformers 4 and 5."""

import math
from typing import Any

from ._config import DynamicRope, LinearRope, Llama3Rope, LongRope, RopeScaling, YarnRope
from ._config_keys import ROPE_KEYS
from ._hf_families import Reader
from ._keys import check_keys

_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope_parameters(read: Reader, family: str) -> tuple[Reader, float | None]:
    """One flat object, and the base of layers with a window if that is another.

    By the precedence of transformers: `rope_scaling` as a whole goes before `rope_parameters`. What is missing there
    comes from the top level, but for `original_max_position_embeddings`, where the top level wins.
    """
    if family == "gemma3_text":
        return _gemma3(read)
    values = read.values
    for key in ("rope_parameters", "rope_scaling"):
        nested = values.get(key)
        if nested is not None and (not isinstance(nested, dict) or _is_nested(nested)):
            raise read.fail(f"{key} is {nested!r}; only one flat object for all layers is supported")
    stated = values.get("rope_scaling") or values.get("rope_parameters") or {}
    outer = {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if values.get(key) is not None}
    merged = {**outer, **_without_null(stated)}
    if values.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    return Reader(merged, read.origin), None


def _gemma3(read: Reader) -> tuple[Reader, float | None]:
    """Gemma 3's two: that of layers with a window is not scaled, the other may be."""
    values = read.values
    nested = values.get("rope_parameters") or {}
    older = values.get("rope_scaling") or {}
    if not isinstance(nested, dict) or (nested and not _is_nested(nested)) or _is_nested(older):
        raise read.fail(
            f"rope_parameters is {nested!r} and rope_scaling {older!r}; Gemma 3 has objects for full_attention and for "
            "sliding_attention in rope_parameters, or rope_scaling for the former"
        )
    start = {"rope_type": "default", "rope_theta": values["rope_theta"]}
    full = {**start, **_without_null(nested.get("full_attention")), **_without_null(older)}
    local = {"rope_theta": values["rope_local_base_freq"], **_without_null(nested.get("sliding_attention"))}
    if local.get("rope_type", "default") != "default":
        raise read.fail(f"layers with a window have rope type {local['rope_type']!r}; supported is default")
    check_keys(local, ROPE_KEYS, f"{read.origin}, rotary embedding", "default")
    return Reader(full, read.origin), Reader(local, read.origin).number("rope_theta")


def _is_nested(values: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in values.values())


def _without_null(values: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (values or {}).items() if value is not None}


def rotary_dim(rope: Reader, family: str, head_dim: int) -> int | None:
    """How many dimensions of a head turn, `None` for all."""
    share = rope.number("partial_rotary_factor", 1.0)
    if share == 1:
        return None
    if family != "phi3" or share > 1:
        raise rope.fail(f"partial_rotary_factor {share:g} is not supported for {family}, only for phi3")
    return int(head_dim * share)


def rope_scaling(rope: Reader, family: str, max_positions: int) -> RopeScaling:
    """The scaling, with what transformers infers where the file does not say it."""
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # Older names for the same in Phi-3's files.
    if kind not in _TYPES:
        raise rope.fail(f"rope type {kind!r} is not supported; supported are {', '.join(_TYPES)}")
    check_keys(rope.values, ROPE_KEYS, f"{rope.origin}, rotary embedding", kind)
    match kind:
        case "linear":
            return LinearRope(rope.number("factor"))
        case "dynamic":
            return DynamicRope(rope.number("factor"))
        case "llama3":
            return Llama3Rope(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_position_embeddings=rope.integer("original_max_position_embeddings", max_positions),
            )
        case "yarn":
            return _yarn(rope, max_positions)
        case "longrope":
            return _longrope(rope, max_positions)
        case _:
            return None


def _yarn(rope: Reader, max_positions: int) -> YarnRope:
    original = rope.integer("original_max_position_embeddings", max_positions)
    factor = rope.number("factor", max_positions / original)
    attention = rope.optional_number("attention_factor")
    if attention is None:

        def scale(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        weights = rope.values.get("mscale"), rope.values.get("mscale_all_dim")
        attention = scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim")) if all(weights) else scale(1.0)
    return YarnRope(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=attention,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )


def _longrope(rope: Reader, max_positions: int) -> LongRope:
    original = rope.integer("original_max_position_embeddings", max_positions)
    factor = rope.number("factor", max_positions / original)
    attention = rope.optional_number("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRope(rope.numbers("short_factor"), rope.numbers("long_factor"), original, attention)
