"""Which tokens a draft can say: all of the target's, or the few thousand that its own completions use.

A draft's logits are a product with the target's unembedding: the larger the vocabulary, the more of a draft's time goes
into that product and into the softmax after it. Most of a vocabulary is never used on a given task. A draft that is
limited to the tokens that are (Zhao et al. 2025, FR-Spec) stays lossless: what it can't say has draft probability zero,
and is left to the target.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._types import Rollouts
from ..models import AbstractLanguageModel
from ._base import AbstractDraft, DraftError

Draft = TypeVar("Draft", bound=AbstractDraft)


class AbstractDraftVocabulary(eqx.Module):
    """The vocabulary of a draft: the tokens that it can guess.

    A draft holds at most one, gives its logits through it, and hands `support` to the sampler beside them:

    ```python
    logits = self.vocabulary.unembed(target, hidden)
    token, distribution = sampler(logits, offset, self.vocabulary.support)
    ```

    Its `train_logits` are over the same tokens.
    """

    @property
    @abstractmethod
    def support(self) -> Int[Array, " size"] | None:
        """Token ids of the logits, in order; `None` stands for the target's whole vocabulary."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of tokens; 0 stands for the target's whole vocabulary."""

    @abstractmethod
    def check(self, target: AbstractLanguageModel) -> None:
        """Raises `DraftError` if the target lacks one of the tokens. Called before any tracing."""

    @abstractmethod
    def unembed(
        self, target: AbstractLanguageModel, hidden: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch vocab_or_size"]:
        """Computes the logits of these tokens, in float32."""

    @abstractmethod
    def remember(self, rollouts: Rollouts) -> "AbstractDraftVocabulary":
        """Returns the vocabulary after these completions. It runs on the host, between decodings. Shapes do not
        change."""


class FullVocabulary(AbstractDraftVocabulary):
    """The target's whole vocabulary."""

    @property
    def support(self) -> None:
        return None

    @property
    def size(self) -> int:
        return 0

    def check(self, target) -> None:
        del target

    def unembed(self, target, hidden):
        return target.unembed(hidden)

    def remember(self, rollouts):
        del rollouts
        return self


class ReducedVocabulary(AbstractDraftVocabulary):
    """A vocabulary of some of the target's tokens.

    It is an array of integers, and is not trained. It follows the policy: `remember` puts the tokens of the newest
    completions first, the most used of them at the head, and drops the tokens that were unused for longest. So a new
    token enters at once, a token stays for many steps after its last use, no counts are kept and nothing is compiled.

    **Arguments:**

    - `ids`: token ids, all different, those to keep longest first.
    """

    ids: Int[Array, " size"]

    def __init__(self, ids: Int[Array, " size"] | np.ndarray | Sequence[int]):
        values = np.asarray(ids)
        if values.ndim != 1 or len(values) < 1 or not np.issubdtype(values.dtype, np.integer):
            raise ValueError(
                f"ids is an array of {values.dtype}{list(values.shape)}: give a list of at least one token id"
            )
        if values.min() < 0:
            raise ValueError(f"ids has {values.min()} in it: token ids are 0 or more")
        found, counts = np.unique(values, return_counts=True)
        if len(found) < len(values):
            raise ValueError(
                f"ids has {found[np.argmax(counts)]} in it {counts.max()} times: a token may be there only once, else "
                "the draft would count its probability twice; see most_used_tokens"
            )
        self.ids = jnp.asarray(values, jnp.int32)

    @property
    def support(self) -> Int[Array, " size"]:
        return self.ids

    @property
    def size(self) -> int:
        return len(self.ids)

    def check(self, target: AbstractLanguageModel) -> None:
        highest = int(np.max(self.ids))
        if highest >= target.vocab_size:
            raise DraftError(
                f"this draft's vocabulary has token {highest}, but the target's has only {target.vocab_size} tokens: "
                "choose the ids from the target's own completions, see most_used_tokens"
            )

    def unembed(self, target, hidden):
        return target.unembed(hidden, self.ids)

    def remember(self, rollouts: Rollouts) -> "ReducedVocabulary":
        return ReducedVocabulary(_first_of(self.size, _by_use(completion_tokens(rollouts)), np.asarray(self.ids)))


def completion_tokens(rollouts: Rollouts) -> Int[np.ndarray, " tokens"]:
    """Returns all tokens of all completions, without padding."""
    tokens = np.asarray(rollouts.tokens)
    return tokens[np.arange(tokens.shape[1])[None] < np.asarray(rollouts.lengths)[:, None]]


def most_used_tokens(
    tokens: Int[np.ndarray, " tokens"], size: int, vocab_size: int, always: Sequence[int] = ()
) -> Int[np.ndarray, " size"]:
    """Returns the tokens that are used most, the most used first. If too few are used, unused tokens follow, from id 0
    on.

    Most tokenizers number their tokens in the order in which they were learned, useful ones first.

    **Arguments:**

    - `tokens`: of the policy's own completions, see `completion_tokens`. May be empty.
    - `size`: number of tokens to return.
    - `vocab_size`: size of the target's vocabulary.
    - `always`: ids that come first however often they are used, as that of the end of a sequence.
    """
    if not 1 <= size <= vocab_size:
        raise ValueError(
            f"a vocabulary of {size} tokens was asked for, but the target's has {vocab_size}: ask for 1 to {vocab_size}"
        )
    if len(set(always)) > size:
        raise ValueError(
            f"a vocabulary of {size} tokens was asked for, but {len(set(always))} are to be in it always: ask for more"
        )
    used = _by_use(np.asarray(tokens))
    for name, ids in (("tokens", used), ("always", np.asarray(always, int))):
        if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
            raise ValueError(f"{name} has ids from {ids.min()} to {ids.max()}, but the target has {vocab_size} tokens")
    return _first_of(size, np.asarray(always, int), used, np.arange(vocab_size))


def coverage(vocabulary: AbstractDraftVocabulary, tokens: Int[np.ndarray, " tokens"]) -> float:
    """Returns the share of tokens that are in the vocabulary; 1 if there are no tokens.

    What is missing to 1 is lost acceptance, because such a token can only come from a correction.
    """
    if vocabulary.support is None or len(tokens) == 0:
        return 1.0
    return float(np.isin(tokens, np.asarray(vocabulary.support)).mean())


def with_vocabulary(draft: Draft, vocabulary: AbstractDraftVocabulary) -> Draft:
    """Returns the draft with another vocabulary, also where it is inside another draft, such as a `FallbackDraft`.

    A vocabulary of the same size needs no new compilation.

    **Raises:**

    `DraftError` if this kind of draft has no vocabulary of its own.
    """
    if not _vocabularies(draft):
        raise DraftError(
            f"a {type(draft).__name__} has no vocabulary of its own to exchange: leave it, or take a draft that "
            "unembeds hidden states, as MedusaHeads"
        )
    return jax.tree.map(lambda part: vocabulary if _is_vocabulary(part) else part, draft, is_leaf=_is_vocabulary)


def draft_vocabulary(draft: AbstractDraft) -> AbstractDraftVocabulary:
    """Returns the vocabulary of a draft or of the draft inside it; a `FullVocabulary` for drafts without one."""
    found = _vocabularies(draft)
    if len(found) > 1:
        raise DraftError(
            f"this {type(draft).__name__} holds {len(found)} vocabularies: its training logits can be over only one"
        )
    return found[0] if found else FullVocabulary()


def has_vocabulary(draft: AbstractDraft) -> bool:
    """Whether the draft, or a draft inside it, has a vocabulary that can be exchanged."""
    return bool(_vocabularies(draft))


def _vocabularies(draft: AbstractDraft) -> list[AbstractDraftVocabulary]:
    return [part for part in jax.tree.leaves(draft, is_leaf=_is_vocabulary) if _is_vocabulary(part)]


def _is_vocabulary(part) -> bool:
    return isinstance(part, AbstractDraftVocabulary)


def _by_use(tokens: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " distinct"]:
    found, counts = np.unique(tokens, return_counts=True)
    return found[np.argsort(-counts, kind="stable")]


def _first_of(size: int, *candidates: Int[np.ndarray, " _"]) -> Int[np.ndarray, " size"]:
    """The first `size` different ids of several lists in turn."""
    ids = np.concatenate(candidates)
    _, first = np.unique(ids, return_index=True)
    return ids[np.sort(first)][:size].astype(np.int32)
