"""What a draft is to the decoder and to distillation."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..errors import UserError
from ..models import AbstractLanguageModel, Features
from ..sampling import Categorical
from ._sampler import AbstractSampler

State = TypeVar("State")


class DraftError(UserError):
    """Raised where a draft does not fit its target. The message names both sides."""


def check_heads(kind: str, hidden_size: int, target: AbstractLanguageModel) -> None:
    """Raises `DraftError` if heads of this kind were made for hidden states of another size than the target's."""
    if hidden_size != target.hidden_size:
        raise DraftError(
            f"these {kind} heads take hidden states of size {hidden_size}, but the target's have size "
            f"{target.hidden_size}: use heads that were trained for this target, or fresh ones"
        )


class Proposal(eqx.Module):
    """Drafted tokens, and the distribution that each of them was drawn from.

    **Arguments:**

    - `tokens`: the drafted chain.
    - `distribution`: the distribution of each token, given the tokens before it; `None` means a point mass: the token
        was chosen without chance (an n-gram match, an argmax).
    """

    tokens: Int[Array, "*rows draft"]
    distribution: Categorical | None

    @staticmethod
    def stack(steps: Sequence[tuple[Int[Array, " rows"], Categorical]]) -> "Proposal":
        """Makes a chain of the pairs that a sampler returned for its positions, in order."""
        tokens, distributions = zip(*steps, strict=True)
        return Proposal(jnp.stack(tokens, axis=1), jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *distributions))

    def token_logprobs(self) -> Float[Array, "*rows draft"]:
        """Returns the log-probability with which each token was drafted; 0 for point masses."""
        if self.distribution is None:
            return jnp.zeros(self.tokens.shape)
        return self.distribution.logprob(self.tokens)

    def finite(self) -> Bool[Array, "*rows"]:
        """Whether the tokens of a row were drawn from distributions; logits that are not finite numbers are none."""
        if self.distribution is None:
            return jnp.ones(self.tokens.shape[:-1], bool)
        return jnp.isfinite(self.distribution.log_normalizer).all(-1)

    def probs_at(self, index: Int[Array, ""], vocab: int) -> Float[Array, " vocab"]:
        """Returns the draft's probabilities over the vocabulary at one position of one row; zero beyond the chain.

        Takes a single row; use `vmap` for a batch.
        """
        length = self.tokens.shape[0]
        if length == 0:
            return jnp.zeros(vocab)
        safe = jnp.minimum(index, length - 1)
        if self.distribution is None:
            probs = jax.nn.one_hot(self.tokens[safe], vocab)
        else:
            probs = self.distribution[safe].probs(vocab)
        return jnp.where(index < length, probs, 0.0)


class AbstractDraft(eqx.Module, Generic[State]):
    """A draft, which guesses the next few tokens of every row cheaply.

    The module holds configuration and weights. What a draft remembers of the rows is a separate PyTree, the state.
    `init` makes it, and `propose` and `commit` take and return it. Every array of the state has the row as its leading
    axis, so that the decoder can select rows. The target is an argument of every method and never a field, so that its
    unembedding cannot be trained or saved twice.

    At the start of a round, the last committed token of a row has been emitted, but the target has not read it yet. The
    newest features are those of the position before it, which predicted it.

    Subclasses have:

    - `max_length`: the most tokens that `propose` can guess.
    - `train_length`: how many draft positions `train_hidden` returns: `max_length` where each has weights of its own, 1
        where all share them and one is enough to learn from, 0 where nothing can be trained.
    - `layers`: the target's layers whose outputs are needed in `Features.layers`, besides `Features.last`.
    """

    max_length: eqx.AbstractVar[int]
    train_length: eqx.AbstractVar[int]
    layers: eqx.AbstractVar[tuple[int, ...]]

    @abstractmethod
    def check(self, target: AbstractLanguageModel) -> None:
        """Raises `DraftError`, naming both sides, if the draft does not fit the target. Called before any tracing."""

    @abstractmethod
    def init(
        self,
        target: AbstractLanguageModel,
        features: Features,
        tokens: Int[Array, "rows seq"],
        lengths: Int[Array, " rows"],
        capacity: int,
    ) -> State:
        """Returns the state after the target's pass over the prompts.

        **Arguments:**

        - `features`: the target's features of the prompts, `[rows, seq, hidden]`.
        - `tokens`, `lengths`: the prompts, right-padded.
        - `capacity`: the most positions a row will ever have, the draft's own included.
        """

    def begin(
        self,
        target: AbstractLanguageModel,
        features: Features,
        tokens: Int[Array, "rows seq"],
        lengths: Int[Array, " rows"],
        capacity: int,
        first: int,
    ) -> State:
        """Makes the state with room for the first positions only; `grow` adds more. It is for drafts whose state has
        the size of its capacity. By default it calls `init`, which makes all the room at once.

        **Arguments:**

        - `features`, `tokens`, `lengths`, `capacity`: as for `init`.
        - `first`: number of positions that fit at first. What is drafted must not depend on it.
        """
        del first
        return self.init(target, features, tokens, lengths, capacity)

    def grow(self, state: State, capacity: int) -> State:
        """Returns the state with room for more positions.

        **Arguments:**

        - `capacity`: number of positions that must fit from here on.
        """
        del capacity
        return state

    @abstractmethod
    def propose(
        self,
        target: AbstractLanguageModel,
        state: State,
        last_token: Int[Array, " rows"],
        sampler: AbstractSampler,
        length: int,
    ) -> tuple[Proposal, State]:
        """Guesses `length` tokens for each row, where `1 <= length <= max_length`.

        **Arguments:**

        - `last_token`: the last committed token.
        - `sampler`: draws tokens from draft logits; see [`eqx_specgrpo.drafts.AbstractSampler`][]. Any logits are
            lossless, as long as the tokens are those that it drew; the target's own are accepted most. A draft that
            chooses its tokens without chance does not need it.
        """

    def expected_acceptance(
        self, target: AbstractLanguageModel, state: State, last_token: Int[Array, " rows"], length: int
    ) -> Float[Array, "rows draft"] | None:
        """Says how likely each of the next guesses is to be accepted if those before it are, before any is drawn. By
        default it returns `None`: the draft does not know.

        **Arguments:**

        - `target`, `state`, `last_token`, `length`: as for `propose`. There is no sampler: nothing may depend on what
            is drawn.
        """
        del target, state, last_token, length

    @abstractmethod
    def commit(
        self,
        target: AbstractLanguageModel,
        state: State,
        features: Features,
        block: Int[Array, "rows block"],
        num_accepted: Int[Array, " rows"],
    ) -> State:
        """Updates the state with the outcome of a round.

        **Arguments:**

        - `features`: of the target's pass over the block, `[rows, block, hidden]`; row `num_accepted` of them predicted
            the round's last committed token. Also called after rounds without drafting, with a block of one.
        - `block`: the last committed token of the round before, then the drafted tokens; those need not be of this
            draft's own last proposal, where it is one part of a `FallbackDraft`.
        - `num_accepted`: how many drafted tokens were kept; 0 in rows that have finished, whose state nobody will see,
            but which must not write beyond the capacity.
        """

    def commit_active(
        self,
        target: AbstractLanguageModel,
        state: State,
        features: Features,
        block: Int[Array, "rows block"],
        num_accepted: Int[Array, " rows"],
        active: Bool[Array, " rows"],
    ) -> State:
        """Calls `commit`, and says which rows have not finished. This is what the decoder calls.

        Finished rows stay in the batch until it shrinks. By default they move on by one token per round, so that they
        are never ahead of an active row: how much of a draft's cache is read depends on the longest row.

        **Arguments:**

        - `active`: which rows have not finished. `num_accepted` is arbitrary in the others.
        """
        return self.commit(target, state, features, block, jnp.where(active, num_accepted, 0))

    @abstractmethod
    def train_hidden(
        self, target: AbstractLanguageModel, features: Features, tokens: Int[Array, "rows seq"]
    ) -> Float[Array, "rows seq draft draft_hidden"]:
        """Computes the draft's hidden states for training, at every position and draft offset of whole sequences.

        At position `i`, where the features predict token `i + 1`, offset `k` (from 0, below `train_length`) stands for
        the draft's prediction of token `i + 2 + k`, which the target predicts from its own features at position
        `i + 1 + k`.

        **Arguments:**

        - `features`: the target's features of the sequences, behind a stop-gradient.
        - `tokens`: the sequences; the features at `i` were computed from token `i`.
        """

    @abstractmethod
    def train_logits(
        self, target: AbstractLanguageModel, hidden: Float[Array, "*batch draft_hidden"]
    ) -> Float[Array, "*batch vocab"]:
        """Computes logits from the output of `train_hidden`. It is separate so that the loss can go in chunks of
        positions."""

    def train_confidence(
        self, hidden: Float[Array, "positions draft draft_hidden"]
    ) -> Float[Array, "positions draft"] | None:
        """Computes the logits of `expected_acceptance` from the output of `train_hidden`; `None` by default. They are
        trained on the acceptance that the loss expects."""
        del hidden

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Returns JSON-able settings, from which an equal module is built before its weights are loaded."""


def check_fit(draft: AbstractDraft, target: AbstractLanguageModel) -> None:
    """Raises `DraftError`, naming both sides, if a draft asks for layers that the target lacks, or fails its `check`.

    It is for drafts from outside the library, whose `check` may be incomplete.
    """
    draft.check(target)
    num_layers = len(target.no_cache())
    if any(not 0 <= layer < num_layers for layer in draft.layers):
        raise DraftError(
            f"this {type(draft).__name__} reads the target's layers {draft.layers}, counted from 0, but the target has "
            f"{num_layers}: use a draft that was trained for this target, or a fresh one"
        )


def pick_positions(values: Float[Array, "rows seq size"], index: Int[Array, " rows"]) -> Float[Array, "rows size"]:
    """Selects one position of each row, for instance the newest features, which are at another position in every
    row."""
    return jnp.take_along_axis(values, index[:, None, None], axis=1)[:, 0]
