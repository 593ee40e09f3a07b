"""What differs between the layers that a `config.json` describes: windows of attention, and whether anything turns."""

from ._hf_families import Reader

_FULL, _SLIDING = "full_attention", "sliding_attention"


def windows(read: Reader, family: str, num_layers: int, no_rope: tuple[int, ...]) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers that have none."""
    window, default = _defaults(read, family, num_layers, no_rope)
    kinds = read.values.get("layer_types") or default
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise read.fail(f"layer_types is {kinds!r}, but must be a list of names")
    kinds = [_FULL if kind == "attention" else kind for kind in kinds]
    if len(kinds) != num_layers:
        raise read.fail(f"layer_types names {len(kinds)} layers, but num_hidden_layers is {num_layers}")
    if family in ("mistral", "phi3", "llama", "olmo2", "granite") and kinds != default:
        raise read.fail(
            f"layer_types says {sorted(set(kinds))}, but with sliding_window {window!r} transformers computes "
            f"{default[0]} in every layer of a {family} model: delete the one that is wrong"
        )
    unknown = set(kinds) - {_FULL, _SLIDING}
    if unknown or (window is None and _SLIDING in kinds):
        raise read.fail(
            f"layer_types has {sorted(set(kinds))} with sliding_window {window!r}; supported are {_FULL}, and "
            f"{_SLIDING} with a window"
        )
    if set(kinds) == {_FULL}:
        return None, ()
    full = tuple(layer for layer, kind in enumerate(kinds) if kind == _FULL)
    return Reader({"sliding_window": window}, read.origin).integer("sliding_window"), full


def _defaults(read: Reader, family: str, num_layers: int, no_rope: tuple[int, ...]) -> tuple[int | None, list[str]]:
    """The window, and the kinds of the layers where `layer_types` does not say them."""
    layers, window = range(num_layers), read.values.get("sliding_window")
    if family in ("qwen2", "qwen3", "smollm3") and not read.flag("use_sliding_window"):
        window = None
    match family:
        case "mistral" | "phi3":
            sliding = [True] * num_layers
        case "qwen2" | "qwen3":
            first = read.values["max_window_layers"]
            if not isinstance(first, int):
                raise read.fail(f"max_window_layers is {first!r}, but must be an integer")
            sliding = [layer >= first for layer in layers]
        case "smollm3":
            sliding = [layer in no_rope for layer in layers]
        case "gemma2":
            sliding = [layer % 2 == 0 for layer in layers]
        case "gemma3_text":
            pattern = read.integer("sliding_window_pattern")
            sliding = [(layer + 1) % pattern != 0 for layer in layers]
        case _:
            sliding = [False] * num_layers
    return window, [_SLIDING if window is not None and chosen else _FULL for chosen in sliding]


def no_rope_layers(read: Reader, family: str, num_layers: int) -> tuple[int, ...]:
    """Layers in which nothing turns. (In the file, 1 stands for a layer that has a rotary embedding.)"""
    if family != "smollm3":
        return ()
    turns = read.values.get("no_rope_layers")
    if turns is None:
        interval = read.integer("no_rope_layer_interval")
        turns = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(turns, list) or len(turns) != num_layers or not set(turns) <= {0, 1}:
        raise read.fail(f"no_rope_layers is {turns!r}, but must be a list of {num_layers} times 0 or 1")
    return tuple(layer for layer, turn in enumerate(turns) if not turn)
