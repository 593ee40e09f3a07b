"""One draft where it has a match and has been right, another elsewhere."""

from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..models import AbstractLanguageModel, Features
from ..sampling import Categorical
from ._base import AbstractDraft, Proposal
from ._history import AbstractHistoryDraft
from ._kind import DraftWrapper
from ._sampler import AbstractSampler
from ._track_record import TrackRecord

FallbackState = tuple[Any, Any, TrackRecord]
First = TypeVar("First", bound=AbstractHistoryDraft)
Then = TypeVar("Then", bound=AbstractDraft)


class FallbackDraft(AbstractDraft[FallbackState], Generic[First, Then]):
    """Two drafts: the first one guesses in rows where it has a match and has been right with such matches, the second
    one in the other rows.

    Each row keeps a record of how many offered tokens were accepted: of each draft, for each class of match. Where the
    first draft has a match, the draft with the larger share guesses. Both begin as if they were always right, so that
    each is tried in every row, the first draft first; old rounds are forgotten. Where the second draft says itself what
    it expects to be accepted (`expected_acceptance`), that takes the place of its share.

    Which draft guesses in a row depends on committed tokens and past verdicts only, and is known before the second
    draft draws anything. If it depended on a token just drawn, the verified tokens would not be distributed as the
    draft claims, and the output would be biased. (So `AbstractHistoryDraft.propose_matches` has no sampler.) The
    proposal of a row in which the first draft guesses is a point mass among the distributions of the other rows.

    Both drafts learn the outcome of every round. So the second one has to take in tokens that it has not drafted.

    Trained and frozen parts are those of the second draft. The first one has nothing to train, but a memory, which
    `remember` fills.

    **Arguments:**

    - `first`: for instance [`eqx_specgrpo.drafts.NGramDraft`][] with a `min_ngram` of 3 or more, because its short
        matches are often worse than the guesses of a trained draft.
    - `then`: any draft.
    """

    first: First
    then: Then

    def __init__(self, first: First, then: Then):
        self.first = first
        self.then = then

    @property
    def max_length(self) -> int:
        return min(self.first.max_length, self.then.max_length)

    @property
    def train_length(self) -> int:
        return self.then.train_length

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({*self.first.layers, *self.then.layers}))

    def check(self, target: AbstractLanguageModel) -> None:
        self.first.check(target)
        self.then.check(target)

    def init(self, target, features: Features, tokens, lengths, capacity) -> FallbackState:
        return self.begin(target, features, tokens, lengths, capacity, capacity)

    def begin(self, target, features: Features, tokens, lengths, capacity, first) -> FallbackState:
        # A draft of more tokens than the two together counts on room for as many.
        own, other = (
            draft.begin(target, self._features_for(draft, features), tokens, lengths, capacity + spare, first + spare)
            for draft, spare in self._with_spare()
        )
        return own, other, TrackRecord.empty(tokens.shape[0], self.first.match_classes)

    def grow(self, state: FallbackState, capacity: int) -> FallbackState:
        *parts, record = state
        own, other = (
            draft.grow(part, capacity + spare) for (draft, spare), part in zip(self._with_spare(), parts, strict=True)
        )
        return own, other, record

    @jax.named_scope("FallbackDraft.propose")
    def propose(self, target, state: FallbackState, last_token, sampler: AbstractSampler, length: int):
        matches, match, first_state = self.first.propose_matches(target, state[0], last_token, length)
        expected = self.then.expected_acceptance(target, state[1], last_token, length)
        record = state[2].choose(match, expected)  # before anything is drawn
        others, then_state = self.then.propose(target, state[1], last_token, sampler, length)
        proposal = prefer_matches(matches.tokens, record.prefers_first, others)
        return proposal, (first_state, then_state, record)

    def commit(self, target, state: FallbackState, features: Features, block, num_accepted) -> FallbackState:
        *parts, record = state
        own, other = (
            draft.commit(target, part, self._features_for(draft, features), block, num_accepted)
            for draft, part in zip((self.first, self.then), parts, strict=True)
        )
        return own, other, record.judge(num_accepted, block.shape[1] - 1)

    def commit_active(
        self, target, state: FallbackState, features: Features, block, num_accepted, active
    ) -> FallbackState:
        *parts, record = state
        own, other = (
            draft.commit_active(target, part, self._features_for(draft, features), block, num_accepted, active)
            for draft, part in zip((self.first, self.then), parts, strict=True)
        )
        return own, other, record.judge(num_accepted, block.shape[1] - 1)

    def train_hidden(self, target, features: Features, tokens):
        return self.then.train_hidden(target, self._features_for(self.then, features), tokens)

    def train_logits(self, target, hidden):
        return self.then.train_logits(target, hidden)

    def train_confidence(self, hidden):
        return self.then.train_confidence(hidden)

    def provenance(self) -> dict[str, Any]:
        return {"first": self.first.provenance(), "then": self.then.provenance()}

    def _with_spare(self) -> list[tuple[AbstractDraft, int]]:
        return [(draft, draft.max_length - self.max_length) for draft in (self.first, self.then)]

    def _features_for(self, draft: AbstractDraft, features: Features) -> Features:
        """With the layers that this draft asked for, in its own order."""
        return Features(features.last, tuple(features.layers[self.layers.index(layer)] for layer in draft.layers))


def prefer_matches(matches: Int[Array, "rows draft"], is_matched: Bool[Array, " rows"], others: Proposal) -> Proposal:
    """The proposal with the chains of some rows replaced by point masses.

    **Arguments:**

    - `matches`: these rows' chains, chosen without chance and without a look at `others`.
    - `is_matched`: which rows; as little may depend on `others`.
    - `others`: what stays in the other rows.
    """
    tokens = jnp.where(is_matched[:, None], matches, others.tokens)
    if others.distribution is None:
        return Proposal(tokens, None)
    masses = _point_masses(matches, others.distribution)

    def choose(mass: Array, other: Array) -> Array:
        return jnp.where(is_matched.reshape(-1, *[1] * (other.ndim - 1)), mass, other)

    return Proposal(tokens, jax.tree.map(choose, masses, others.distribution))


def _point_masses(tokens: Int[Array, "rows draft"], like: Categorical) -> Categorical:
    """Each of the tokens with probability one, as a distribution of the form of another."""
    place = jnp.broadcast_to(jnp.arange(like.logits.shape[-1]), like.logits.shape)
    support = like.support
    if support is None:
        here = place == tokens[..., None]
    else:
        # Where the token is not among the ids it takes the place of the first of them: they stay all different.
        is_there = support == tokens[..., None]
        here = jnp.where(is_there.any(-1, keepdims=True), is_there, place == 0)
        support = jnp.where(here, tokens[..., None], support)
    logits = jnp.where(here, 0.0, -jnp.inf).astype(like.logits.dtype)
    return Categorical(logits, jnp.zeros_like(like.log_normalizer), support)


def _rebuild(first: AbstractDraft, then: AbstractDraft) -> FallbackDraft:
    if not isinstance(first, AbstractHistoryDraft):
        raise ValueError(f"the first of a fallback is a {type(first).__name__}, which has no matches")
    return FallbackDraft(first, then)


WRAPPER = DraftWrapper(FallbackDraft, lambda draft: {"first": draft.first, "then": draft.then}, _rebuild)
