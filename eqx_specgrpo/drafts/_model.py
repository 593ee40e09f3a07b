"""Another language model as the draft (Leviathan et al. 2023; Chen et al. 2023)."""

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..models import (
    AbstractLanguageModel,
    DynamicRope,
    Features,
    LinearRope,
    Llama3Rope,
    LongRope,
    Tokenizer,
    Transformer,
    TransformerConfig,
    YarnRope,
    caches_can_grow,
    load_pretrained,
    sequence_features,
)
from ._autoregressive import AutoregressiveState, check_max_length, draft_chain, make_room, start, take_in
from ._base import AbstractDraft, DraftError
from ._kind import DraftKind
from ._sampler import AbstractSampler
from ._vocabulary import AbstractDraftVocabulary, FullVocabulary


class ModelDraft(AbstractDraft[AutoregressiveState]):
    """A language model of the target's vocabulary, usually a much smaller one, which drafts token by token.

    It has a key/value cache of its own and uses nothing of the target. Every draft begins with the tokens that it has
    not seen yet, mostly in the pass that also gives the first guess.

    Trained: all of `model`, its embedding and unembedding included. Frozen: nothing.

    **Arguments:**

    - `model`: the drafting model.
    - `max_length`: the most tokens drafted, 1 to 8.
    - `vocabulary`: the tokens that it can say; see [`eqx_specgrpo.drafts.ReducedVocabulary`][].
    """

    model: AbstractLanguageModel
    vocabulary: AbstractDraftVocabulary
    max_length: int = eqx.field(static=True)

    def __init__(
        self, model: AbstractLanguageModel, max_length: int, vocabulary: AbstractDraftVocabulary | None = None
    ):
        check_max_length("ModelDraft", max_length)
        self.model = model
        self.vocabulary = FullVocabulary() if vocabulary is None else vocabulary
        self.max_length = max_length

    @property
    def train_length(self) -> int:
        return 1

    @property
    def layers(self) -> tuple[int, ...]:
        return ()

    def check(self, target: AbstractLanguageModel) -> None:
        if self.model.vocab_size != target.vocab_size:
            raise DraftError(
                f"the drafting model's vocabulary has {self.model.vocab_size} entries, but the target's has "
                f"{target.vocab_size}: token ids must mean the same to both; draft with a model of the target's own "
                "family"
            )
        self.vocabulary.check(target)

    def init(self, target, features, tokens, lengths, capacity) -> AutoregressiveState:
        return self.begin(target, features, tokens, lengths, capacity, capacity)

    def begin(self, target, features, tokens, lengths, capacity, first) -> AutoregressiveState:
        del features
        # Of the capacity, the last block is for drafted tokens that are not kept.
        longest = min(capacity - self.max_length - 1, target.max_length)
        if self.model.max_length < longest:
            raise DraftError(
                f"the drafting model's context holds {self.model.max_length} tokens, but the target's rows may reach "
                f"{longest} (prompts, padded, and completions): draft with a model of a longer context, or ask for "
                "shorter completions"
            )
        return start(self.model, tokens, lengths, first if caches_can_grow(self.model) else capacity)

    def grow(self, state: AutoregressiveState, capacity: int) -> AutoregressiveState:
        return make_room(state, capacity) if caches_can_grow(self.model) else state

    @jax.named_scope("ModelDraft.propose")
    def propose(self, target, state: AutoregressiveState, last_token, sampler: AbstractSampler, length: int):
        del target
        return draft_chain(self.model, self.vocabulary, state, last_token, sampler, length)

    def commit(self, target, state: AutoregressiveState, features, block, num_accepted) -> AutoregressiveState:
        del target, features
        return take_in(state, block, num_accepted)

    def train_hidden(
        self, target, features: Features, tokens: Int[Array, "rows seq"]
    ) -> Float[Array, "rows seq 1 draft_hidden"]:
        """The model's own hidden states: at position `i` those of `i + 1`, which predict token `i + 2`."""
        del target, features
        return next_positions(sequence_features(self.model, tokens).last)

    def train_logits(self, target, hidden):
        del target
        return self.vocabulary.unembed(self.model, hidden)

    def provenance(self) -> dict[str, Any]:
        if not isinstance(self.model, Transformer):
            raise DraftError(
                f"a ModelDraft around a {type(self.model).__name__} can't be saved: only a Transformer can be built "
                "again from its settings; save the model yourself, and wrap it again after loading it"
            )
        return {"max_length": self.max_length, "config": _config_to_settings(self.model.config)}


def load_model_draft(path: str | Path, max_length: int) -> tuple[ModelDraft, Tokenizer]:
    """A pretrained model as a draft, in float32.

    **Arguments:**

    - `path`: a folder, a `.gguf` file or `org/name`, as for [`eqx_specgrpo.models.load_pretrained`][].
    - `max_length`: the most tokens drafted.

    **Returns:**

    The draft, and its model's tokenizer for [`eqx_specgrpo.drafts.check_same_vocabulary`][].

    **Raises:**

    `CheckpointError`, as `load_pretrained`.
    """
    model, tokenizer = load_pretrained(path)
    return ModelDraft(model, max_length), tokenizer


def check_same_vocabulary(draft_tokenizer: Tokenizer, target_tokenizer: Tokenizer) -> None:
    """Checks that token ids mean the same to a drafting model and to its target.

    How a text is split does not matter, because the draft is never shown any text. An id that only one of them uses
    does not either, nor do the names of special tokens: there the draft is merely no help.

    **Raises:**

    `DraftError`, naming a token of each, if they differ.
    """
    draft, target = _tokens_by_id(draft_tokenizer), _tokens_by_id(target_tokenizer)
    different = [i for i in sorted(draft.keys() & target.keys()) if draft[i] != target[i]]
    if different:
        first = different[0]
        raise DraftError(
            f"the drafting model's tokenizer and the target's disagree about {len(different)} token ids, among them "
            f"{first}: {draft[first]!r} here, {target[first]!r} there; token ids must mean the same to both: draft "
            "with a model of the target's own family"
        )


def next_positions(hidden: Float[Array, "rows seq hidden"]) -> Float[Array, "rows seq 1 hidden"]:
    """At position `i` what stands at `i + 1`, as the only draft offset; the last position has no successor."""
    return jnp.roll(hidden, -1, axis=1)[:, :, None]


def _tokens_by_id(tokenizer: Tokenizer) -> dict[int, str]:
    special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return {i: token for token, i in vocabulary.items() if i not in special}


# By the names that transformers gives them.
_ROPES = {"linear": LinearRope, "dynamic": DynamicRope, "llama3": Llama3Rope, "yarn": YarnRope, "longrope": LongRope}


def _config_to_settings(config: TransformerConfig) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    for name, kind in _ROPES.items():
        if isinstance(config.rope_scaling, kind):
            settings["rope_scaling"]["type"] = name
    return settings


def _config_from_settings(settings: dict[str, Any]) -> TransformerConfig:
    """The inverse, also of what JSON has made of it: its lists were tuples."""
    rope = None
    if settings["rope_scaling"] is not None:
        values = {**settings["rope_scaling"]}
        kind = values.pop("type", None)
        if kind not in _ROPES:
            raise ValueError(f"rope_scaling {settings['rope_scaling']!r} is of no known type")
        rope = _ROPES[kind](**_tuples(values))
    return TransformerConfig(**{**_tuples(settings), "rope_scaling": rope})


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _fresh(
    target: AbstractLanguageModel,
    max_length: int,
    *,
    model: Path | str,
    tokenizer: Tokenizer | None = None,
    key: PRNGKeyArray,
) -> ModelDraft:
    """**Arguments:**

    - `model`: the drafting model's folder, .gguf file or org/name
    """
    del target, key
    draft, its_tokenizer = load_model_draft(model, max_length)
    if tokenizer is not None:
        check_same_vocabulary(its_tokenizer, tokenizer)
    return draft


def _rebuild(settings: dict[str, Any]) -> ModelDraft:
    config = _config_from_settings(dict(settings["config"]))
    shapes = eqx.filter_eval_shape(Transformer, config, key=jr.key(0))
    model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, shapes)
    return ModelDraft(model, int(settings["max_length"]))


DRAFT = DraftKind(ModelDraft, fresh=_fresh, rebuild=_rebuild)
