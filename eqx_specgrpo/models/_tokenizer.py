"""Text to token ids and back, with the chat template and the ids at which a completion ends."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from .._types import Message
from ..errors import CheckpointError, UserError, did_you_mean
from ._base import AbstractLanguageModel
from ._chat_template import render_chat, template_variables
from ._safetensors import listing, read_json

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer with its checkpoint's conventions. Obtain one from `load_tokenizer`.

    **Arguments:**

    - `backend`: from the `tokenizers` library.
    - `settings`: the contents of `tokenizer_config.json`, of which the special tokens are used; kept for `save`.
    - `chat_template`: Jinja source, or `None`.
    - `eos_ids`: the ids that end a completion.
    - `chat_template_kwargs`: further variables of the chat template.

    **Attributes:**

    - `pad_id`: of the padding token; where there is none, the first EOS id, and else 0. Padding never carries meaning
        in this library (lengths do), so any valid id will do.
    - `bos_token`: or `None`.
    """

    backend: tokenizers.Tokenizer
    settings: dict[str, Any]
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    eos_ids: tuple[int, ...]
    pad_id: int
    bos_token: str | None

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: dict[str, Any],
        chat_template: str | None,
        eos_ids: Sequence[int],
        chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ):
        # tokenizer.json may carry the padding and truncation of whoever trained it.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.settings = settings
        self.chat_template = chat_template
        self.chat_template_kwargs = dict(chat_template_kwargs)
        self._special_tokens = special_tokens(settings)
        eos_ids = list(eos_ids)
        if "eos_token" in self._special_tokens:
            eos_ids.append(self._id("eos_token"))
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.pad_id = self._id("pad_token") if "pad_token" in self._special_tokens else (*self.eos_ids, 0)[0]
        self.bos_token = self._special_tokens.get("bos_token")

    def _id(self, name: str) -> int:
        token = self._special_tokens[name]
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise CheckpointError(
                f"the tokenizer's {name} is {token!r}, which is not in its vocabulary: tokenizer_config.json and "
                "tokenizer.json belong to different tokenizers"
            )
        return token_id

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        **Arguments:**

        - `add_special_tokens`: put a BOS token in front, if this tokenizer's post-processor does so.

        **Raises:**

        `UserError` if the text holds half of a character, which has no UTF-8 and so no tokens.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text can't be encoded: its character {error.start + 1} is {ascii(text[error.start])}, half of a "
                "character or a byte that is no UTF-8. Give the text in UTF-8, whole"
            ) from error
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        **Arguments:**

        - `messages`: `{"role": ..., "content": ...}` objects.
        - `add_generation_prompt`: end with the opening of the assistant's turn.

        **Raises:**

        `UserError` if there is no template, or if it fails on these messages.
        """
        if self.chat_template is None:
            raise UserError(
                "the prompt is a list of messages, but this tokenizer has no chat template: use an instruction-tuned "
                "model, put a chat_template.jinja in its folder, or give the prompt as plain text"
            )
        return render_chat(
            self.chat_template,
            messages,
            self._special_tokens | self.chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
        )

    def with_chat_template_kwargs(self, variables: Mapping[str, Any]) -> "Tokenizer":
        """The same tokenizer, whose chat template is told these variables as well: `{"enable_thinking": False}`, say.

        **Raises:**

        `UserError` if there is no template, or it does not ask for one of them.
        """
        if not variables:
            return self
        if self.chat_template is None:
            raise UserError("chat_template_kwargs are for a chat template, but this tokenizer has none: leave them out")
        known = template_variables(self.chat_template)
        for name in variables:
            if name not in known:
                raise UserError(
                    f"chat_template_kwargs has {name!r}, but this tokenizer's chat template asks for "
                    f"{', '.join(sorted(known)) or 'nothing'}.{did_you_mean(name, known)}"
                )
        merged = self.chat_template_kwargs | dict(variables)
        return Tokenizer(self.backend, self.settings, self.chat_template, self.eos_ids, merged)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of plain text, or of messages up to the opening of the assistant's turn."""
        if isinstance(prompt, str):
            return self.encode(prompt)
        # Templates write the BOS token themselves.
        return self.encode(self.apply_chat_template(prompt), add_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and, for `eos_ids`,
        `generation_config.json` (other keys of an existing one are kept)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self.settings}
        settings.pop("chat_template", None)
        _write_json(folder / "tokenizer_config.json", settings)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        path = folder / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        _write_json(path, {**generation, **self.generation_ids()})

    def generation_ids(self) -> dict[str, Any]:
        """The ids as `generation_config.json` and `config.json` state them."""
        eos: list[int] | int | None = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None
        bos = self._id("bos_token") if "bos_token" in self._special_tokens else None
        return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": self.pad_id}


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Those that `tokenizer_config.json` states, as templates name them."""
    stated = {name: settings.get(name) for name in SPECIAL_TOKENS} | further_special_tokens(settings)
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in stated.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def further_special_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """A model's own special tokens by name (`image_token`, ...), from the three places where transformers finds them.

    Every key that ends in `_token` and is a string counts.
    """
    tokens = {
        name: value
        for name, value in settings.items()
        if name.endswith("_token") and name not in SPECIAL_TOKENS and isinstance(value, str)
    }
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        value = settings.get(key)
        tokens |= value if isinstance(value, dict) else {}
    return tokens


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_tokenizer(model: AbstractLanguageModel, tokenizer: Tokenizer) -> None:
    """Raises a `UserError` if the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > model.vocab_size:
        vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
        beyond = sorted(token for token, index in vocabulary.items() if index >= model.vocab_size)
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary has "
            f"{model.vocab_size} entries, none for {listing([repr(token) for token in beyond])}: they do not belong "
            "together; use the model's own tokenizer"
        )
    ends = [i for i in tokenizer.eos_ids if i >= model.vocab_size]
    if ends:
        raise UserError(
            f"end-of-sequence id {ends[0]} lies outside the model's vocabulary of {model.vocab_size} entries: mend "
            "eos_token_id in generation_config.json or config.json"
        )
