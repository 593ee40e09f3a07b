"""The tokenizer that the files of a folder describe.

`tokenizer.json` is what splits text. What the other files add to it is added as transformers 5 does: special and added
tokens that it lacks, in the same order, so that they get the same ids. Where a file states an id, it is compared.
"""

import warnings
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ..errors import CheckpointError
from ._config_keys import GENERATION_KEYS
from ._keys import CheckpointWarning, check_keys
from ._safetensors import listing, read_json
from ._tokenizer import SPECIAL_TOKENS, Tokenizer, further_special_tokens
from ._tokenizer_keys import TOKENIZER_KEYS

_SPACES = ("\N{LOWER ONE EIGHTH BLOCK}", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}")  # Metaspace's and ByteLevel's.
_TOKEN_OPTIONS = {"content", "single_word", "lstrip", "rstrip", "normalized", "special"}


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """See `load_tokenizer`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [p.name for p in folder.iterdir() if p.name in ("tokenizer.model", "vocab.json", "spiece.model")]
        hint = (
            f"it has only {others[0]}: load it once with transformers' AutoTokenizer and save_pretrained it"
            if others
            else "copy tokenizer.json and tokenizer_config.json of the model next to its weights"
        )
        raise CheckpointError(f"{folder} has no tokenizer (tokenizer.json); {hint}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exception for every fault in the file.
        raise CheckpointError(f"{path} can't be read as a tokenizer ({error}); download or copy it again") from error
    if isinstance(backend.model, tokenizers.models.BPE) and backend.model.dropout:
        raise CheckpointError(
            f"{path}: model.dropout is {backend.model.dropout:g}, so that the same text would have other ids each time "
            "(BPE dropout, for training a tokenizer); set it to null"
        )

    settings = _settings(folder)
    own = further_special_tokens(settings)
    others = {key: value for key, value in settings.items() if key not in own}
    check_keys(others, TOKENIZER_KEYS, folder / "tokenizer_config.json")
    _add_tokens(backend, settings, folder)
    _check_prefix(backend, settings, folder)
    backend.encode_special_tokens = settings.get("split_special_tokens") is True

    eos_ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            if name == "generation_config.json":
                check_keys(values, GENERATION_KEYS, folder / name)
            eos_ids.extend(_eos_ids(values.get("eos_token_id"), folder / name))
    return Tokenizer(backend, settings, _chat_template(folder, settings), eos_ids)


def _settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with the special tokens of `special_tokens_map.json` where that file counts."""

    def stated(name: str) -> dict[str, Any]:
        values = read_json(folder / name) if (folder / name).is_file() else {}
        return {key: value for key, value in values.items() if value is not None}

    settings = stated("tokenizer_config.json")
    return settings if "added_tokens_decoder" in settings else {**settings, **stated("special_tokens_map.json")}


def _add_tokens(backend: tokenizers.Tokenizer, settings: dict[str, Any], folder: Path) -> None:
    """Adds what `tokenizer.json` lacks, and compares the ids with those that are stated."""
    origin = folder / "tokenizer_config.json"
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    own = further_special_tokens(settings)
    named = [_token(settings[name], name, origin, special=True) for name in SPECIAL_TOKENS if name in settings]
    named += [_token(value, name, origin, special=True) for name, value in own.items()]
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if not isinstance(listed, list | dict):
        raise CheckpointError(f"{origin}: extra_special_tokens is {listed!r}, but must be a list or object of tokens")
    if isinstance(listed, list):
        named += [_token(value, "extra_special_tokens", origin, special=True) for value in listed]

    stated: dict[int, AddedToken] = {}
    beside = _added_tokens_file(folder)
    if "added_tokens_decoder" in settings:
        stated = _decoder(settings["added_tokens_decoder"], origin)
    else:
        special = {token.content for token in named}
        for content, index in beside.items():
            if content not in present:
                stated[index] = AddedToken(content, normalized=content not in special, special=content in special)

    adding = [stated[index] for index in sorted(stated)]
    known = present | {token.content for token in adding}
    for token in named:
        if token.content not in known:
            adding.append(token)
            known.add(token.content)
    special = {token.content for token in named}
    for token in adding:
        token.special = token.special or token.content in special
    _check_ends(backend, settings, {token.content for token in stated.values()}, origin)
    backend.add_tokens(adding)

    decoder = stated if "added_tokens_decoder" in settings else {}
    ids = {token.content: index for index, token in decoder.items()}
    for file, expected in ((origin, ids), (folder / "added_tokens.json", beside)):
        for content, index in expected.items():
            if backend.token_to_id(content) != index:
                raise CheckpointError(
                    f"{file} gives token {content!r} the id {index}, but with this tokenizer.json it is "
                    f"{backend.token_to_id(content)}: the files are of different tokenizers; download them again, or "
                    "save the tokenizer once more with the program that made it"
                )


def _check_ends(backend: tokenizers.Tokenizer, settings: dict[str, Any], stated: set[str], origin: Path) -> None:
    """A token that begins or ends texts, or pads them, must have an id already: a new one the model never saw."""
    for name in ("bos_token", "eos_token", "pad_token"):
        if name in settings:
            content = _token(settings[name], name, origin, special=True).content
            if backend.token_to_id(content) is None and content not in stated:
                raise CheckpointError(
                    f"the tokenizer's {name} is {content!r}, which is not in its vocabulary: tokenizer_config.json and "
                    f"tokenizer.json in {origin.parent} belong to different tokenizers"
                )


def _token(value: Any, key: str, origin: Path, *, special: bool | None = None) -> AddedToken:
    """A token from text or from one of the two ways in which transformers writes one with its options."""
    if isinstance(value, str):
        return AddedToken(value, special=bool(special))
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        options = {name: option for name, option in value.items() if name != "__type"}
        if special is not None:
            options["special"] = special
        unknown = set(options) - _TOKEN_OPTIONS  # The library would only print a line.
        if not unknown:
            return AddedToken(**options)
        raise CheckpointError(f"{origin}: {key} has a token with unknown options ({listing(sorted(unknown))})")
    raise CheckpointError(f"{origin}: {key} has {value!r}, which is no token")


def _decoder(values: Any, origin: Path) -> dict[int, AddedToken]:
    if not isinstance(values, dict) or not all(key.isdecimal() for key in values):
        raise CheckpointError(f"{origin}: added_tokens_decoder must be an object from ids to tokens")
    return {int(key): _token(value, "added_tokens_decoder", origin) for key, value in values.items()}


def _added_tokens_file(folder: Path) -> dict[str, int]:
    path = folder / "added_tokens.json"
    values = read_json(path) if path.is_file() else {}
    if not all(isinstance(index, int) and index >= 0 for index in values.values()):
        raise CheckpointError(f"{path} must be an object from tokens to ids")
    return values


def _check_prefix(backend: tokenizers.Tokenizer, settings: dict[str, Any], folder: Path) -> None:
    """Warns where `add_prefix_space` says otherwise than `tokenizer.json` does."""
    stated = settings.get("add_prefix_space")
    text = "a" if backend.normalizer is None else backend.normalizer.normalize_str("a")
    pieces = [] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
    first = pieces[0][0] if pieces else text
    if isinstance(stated, bool) and stated != first.startswith(_SPACES):
        warnings.warn(
            f"{folder / 'tokenizer_config.json'}: add_prefix_space is {str(stated).lower()}, but tokenizer.json "
            f"{'puts no' if stated else 'puts a'} space in front of a text, and tokenizer.json is what is followed: "
            "compare with the program that wrote it",
            CheckpointWarning,
            stacklevel=2,
        )


def _eos_ids(value: Any, origin: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise CheckpointError(f"{origin}: eos_token_id is {value!r}, but must be a token id or a list of them")
    return ids


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # Several by name, an older style.
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
