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
    """The tokens that a draft can say.

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
        """The token ids of the logits; `None` stands for the target's whole vocabulary in order."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many tokens; 0 stands for the target's whole vocabulary."""

    @abstractmethod
    def check(self, target: AbstractLanguageModel) -> None:
        """Raises `DraftError` if there are tokens which the target does not have. Called before any tracing."""

    @abstractmethod
    def unembed(
        self, target: AbstractLanguageModel, hidden: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch vocab_or_size"]:
        """Logits of these tokens, float32."""

    @abstractmethod
    def remember(self, rollouts: Rollouts) -> "AbstractDraftVocabulary":
        """The vocabulary after these completions. On the host, between decodings; shapes stay as they are."""


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
    """Some of the target's tokens.

    Not trained: an array of integers. It is kept up to date as the policy moves: `remember` puts the tokens of the
    newest completions first, those used most at the head, and drops the tokens that have gone unused for longest. So a
    token stays for many steps after its last use, what is new enters at once, and neither counts nor a compilation are
    needed.

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
    """All tokens of all completions, padding left out."""
    tokens = np.asarray(rollouts.tokens)
    return tokens[np.arange(tokens.shape[1])[None] < np.asarray(rollouts.lengths)[:, None]]


def most_used_tokens(
    tokens: Int[np.ndarray, " tokens"], size: int, vocab_size: int, always: Sequence[int] = ()
) -> Int[np.ndarray, " size"]:
    """The tokens that are used most, the most used first; where too few are used, unused ones from id 0 on.

    Tokens of most tokenizers are numbered in the order in which they were found useful.

    **Arguments:**

    - `tokens`: of the policy's own completions, see `completion_tokens`. May be empty.
    - `size`: how many.
    - `vocab_size`: the target's.
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
    """The share of tokens that a draft of this vocabulary could have said; 1 where there are none.

    What is missing to 1 is lost acceptance at least: such a token is never accepted, only corrected.
    """
    if vocabulary.support is None or len(tokens) == 0:
        return 1.0
    return float(np.isin(tokens, np.asarray(vocabulary.support)).mean())


def with_vocabulary(draft: Draft, vocabulary: AbstractDraftVocabulary) -> Draft:
    """The draft with another vocabulary; one that is deep inside it, as in a `FallbackDraft`, is found.

    Another of the same size is no other program: nothing is compiled anew.

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
    """The vocabulary of a draft or of the one inside it; the full one for drafts that have none of their own."""
    found = _vocabularies(draft)
    if len(found) > 1:
        raise DraftError(
            f"this {type(draft).__name__} holds {len(found)} vocabularies: its training logits can be over only one"
        )
    return found[0] if found else FullVocabulary()


def has_vocabulary(draft: AbstractDraft) -> bool:
    """Whether the draft, or one inside it, has a vocabulary of its own to exchange."""
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
