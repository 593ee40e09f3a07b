"""The tokenizer that the metadata of a `.gguf` file describe."""

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import CheckpointError
from ._gguf import GGUFFile
from ._tokenizer import Tokenizer

# llama.cpp names the pre-tokenizer and keeps its regular expression in its own source. These are the ones of the
# supported families, from the tokenizer.json of the models they are named after.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")  # A word that is in the vocabulary is not merged.
_SPLITS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_GPT2, _DIGITS = ("gpt-2", "default"), ("smollm", "starcoder")
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # Token types of llama.cpp.
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    """See `load_tokenizer`."""
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    types: list[int] = file.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    kind = file.require("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level(file, tokens)
        add_bos = file.get("tokenizer.ggml.pre") in _WHOLE_WORDS_FIRST
    elif kind == "llama":
        backend = _sentencepiece(file, tokens, types)
        add_bos = True
    else:
        raise CheckpointError(
            f"{file.path}: tokenizer type {kind!r} is not supported; supported are gpt2 and llama: use a safetensors "
            "folder with its tokenizer.json"
        )
    special = [token for token, token_type in zip(tokens, types, strict=False) if token_type in (_UNKNOWN, _CONTROL)]
    plain = [token for token, token_type in zip(tokens, types, strict=False) if token_type == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])

    settings: dict[str, Any] = {"model_max_length": file.get(f"{file.require('general.architecture')}.context_length")}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = file.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            if not 0 <= token_id < len(tokens):
                raise CheckpointError(f"{file.path}: {key}_token_id {token_id} lies outside of {len(tokens)} tokens")
            settings[f"{name}_token"] = tokens[token_id]
    front = (
        [settings["bos_token"]] if file.get("tokenizer.ggml.add_bos_token", add_bos) and "bos_token" in settings else []
    )
    behind = [settings["eos_token"]] if file.get("tokenizer.ggml.add_eos_token") and "eos_token" in settings else []
    if front or behind:
        backend.post_processor = processors.TemplateProcessing(
            single=[*front, "$A", *behind],
            pair=[*front, "$A", *behind, *front, "$B", *behind],
            special_tokens=[(token, tokens.index(token)) for token in {*front, *behind}],
        )
    # A chat model may end its turn with another token than a document.
    ends = [file.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    eos_ids = [int(token_id) for token_id in ends if token_id is not None]
    return Tokenizer(backend, settings, file.get("tokenizer.chat_template"), eos_ids)


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _byte_level(file: GGUFFile, tokens: list[str]) -> tokenizers.Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in file.require("tokenizer.ggml.merges")]
    pre = file.get("tokenizer.ggml.pre", "default")
    try:
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=_vocabulary(tokens), merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
        )
    except Exception as error:  # The library raises bare Exception for merges that the vocabulary lacks.
        raise CheckpointError(f"{file.path}: the tokenizer's merges do not fit its vocabulary ({error})") from error
    if pre in _SPLITS:
        steps = [
            pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    elif pre in _DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif pre in _GPT2:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        raise CheckpointError(
            f"{file.path}: pre-tokenizer {pre!r} is not supported; supported are "
            f"{', '.join([*_SPLITS, *_DIGITS, *_GPT2])}: use a safetensors folder with its tokenizer.json"
        )
    if pre in ("qwen2", "deepseek-r1-qwen"):
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """Byte-pair encoding over whole texts (Kudo and Richardson 2018), spaces turned into a letter.

    A space is put in front of a text, whether it begins with one or not, and in front of what follows a special token:
    SentencePiece encodes each stretch between special tokens by itself, and llama.cpp does the same.
    """
    vocabulary = _vocabulary(tokens)
    unknown = file.get("tokenizer.ggml.unknown_token_id")
    # Special tokens and bytes are never made of smaller pieces.
    made = {token for token, kind in zip(tokens, types, strict=False) if kind in (_NORMAL, _UNUSED)}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, made, file.require("tokenizer.ggml.scores")),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(vocabulary: dict[str, int], made: set[str], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece stores a score a piece instead of merges: the pair whose union scores highest goes first."""
    merges = []
    for piece in made:
        index = vocabulary[piece]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in made and right in made:
                merges.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
