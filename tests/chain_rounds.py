"""Rounds by hand for drafts with a cache: what they draft from is compared with a forward that has no cache."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from helpers import normalized

from eqx_specgrpo.decoding import AbstractLengthController, SegmentPlan
from eqx_specgrpo.drafts import AbstractDraft, IndependentSampler
from eqx_specgrpo.models import AbstractLanguageModel, Features, sequence_features
from eqx_specgrpo.sampling import Sampling


class LengthsInTurn(AbstractLengthController[int]):
    """Each length for one segment of so many rounds, then the first again."""

    lengths: tuple[int, ...] = eqx.field(static=True)
    max_rounds: int = eqx.field(static=True)

    def init(self, max_length):
        return 0

    def choose(self, state, rows, context):
        return SegmentPlan(self.lengths[state % len(self.lengths)], self.max_rounds)

    def update(self, state, observation):
        return state + 1

    def after_training(self, state, expected_acceptance):
        return state

    def with_future(self, state, left):
        return state

    def round_seconds(self, state, rows, length, context):
        return None

    def metrics(self, state):
        return {}


@eqx.filter_jit
def full_logits(model: AbstractLanguageModel, tokens: Any) -> Any:
    """Logits of whole sequences, without a cache."""
    return model.unembed(sequence_features(model, tokens).last)


@eqx.filter_jit
def _init(draft, target, tokens, lengths, capacity):
    features = Features(jnp.zeros((*tokens.shape, target.hidden_size)))
    return draft.init(target, features, tokens, lengths, capacity)


@eqx.filter_jit
def _propose(draft, target, state, last_token, keys, length):
    return draft.propose(target, state, last_token, IndependentSampler(Sampling(1.0), keys), length)


@eqx.filter_jit
def _commit(draft, target, state, block, num_accepted):
    return draft.commit(target, state, Features(jnp.zeros((*block.shape, target.hidden_size))), block, num_accepted)


PROMPT_LENGTHS, CAPACITY, LENGTH = (1, 2, 5, 8), 72, 3
ROWS = len(PROMPT_LENGTHS)


class Rounds:
    """Drives a draft by hand, and keeps what was committed. One shape for all of them, so that there are few programs.

    **Arguments:**

    - `draft`, `target`: the pair.
    - `model`: what the draft's logits must be those of.
    """

    def __init__(self, draft: AbstractDraft, target: AbstractLanguageModel, model: AbstractLanguageModel):
        self.draft, self.target, self.model = draft, target, model
        self.rng = np.random.default_rng(0)
        prompts = self._random((ROWS, max(PROMPT_LENGTHS)))
        self.sequences = [prompts[row, :length].tolist() for row, length in enumerate(PROMPT_LENGTHS)]
        self.state = _init(draft, target, jnp.asarray(prompts), jnp.array(PROMPT_LENGTHS), CAPACITY)
        self._append(self._random((ROWS, 1)), [0] * ROWS)
        self.gaps: list[float] = []

    def _random(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.rng.integers(0, self.target.vocab_size, shape, np.int32)

    def _append(self, block: np.ndarray, num_accepted: Sequence[int]) -> None:
        for row, kept in enumerate(num_accepted):
            self.sequences[row] += block[row, :kept].tolist() + self._random((1,)).tolist()

    def round(self, num_accepted: Sequence[int] | None, *, foreign: bool = False) -> int:
        """One round, in which the logits of every drafted token are compared with a forward without a cache.

        **Arguments:**

        - `num_accepted`: kept drafted tokens a row; what follows them is random. `None`: a round without drafting, in
            which the draft is only told of the outcome.
        - `foreign`: the drafted tokens are thrown away, and others verified in their place.

        **Returns:**

        How many rows were compared: those that have not outgrown the capacity.
        """
        last = np.array([sequence[-1] for sequence in self.sequences], np.int32)
        guesses, unfinished = np.zeros((ROWS, 0), np.int32), []
        if num_accepted is not None:
            keys = jr.split(jr.key(int(self.rng.integers(1 << 30))), ROWS)
            proposal, self.state = _propose(self.draft, self.target, self.state, jnp.asarray(last), keys, LENGTH)
            guesses = np.asarray(proposal.tokens)
            unfinished = [row for row in range(ROWS) if len(self.sequences[row]) + LENGTH <= CAPACITY]
            self._compare(guesses, np.asarray(proposal.distribution.logits), unfinished)
        if foreign:
            guesses = self._random(guesses.shape)
        block = np.concatenate([last[:, None], guesses], axis=1)
        accepted = [0] * ROWS if num_accepted is None else list(num_accepted)
        self.state = _commit(self.draft, self.target, self.state, jnp.asarray(block), jnp.array(accepted))
        self._append(guesses, accepted)
        return len(unfinished)

    def _compare(self, guesses: np.ndarray, drafted: np.ndarray, rows: Sequence[int]) -> None:
        whole = np.zeros((ROWS, CAPACITY), np.int32)
        for row in rows:
            known = [*self.sequences[row], *guesses[row, :-1].tolist()]
            whole[row, : len(known)] = known
        expected = np.asarray(full_logits(self.model, jnp.asarray(whole)))
        for row in rows:
            ahead = len(self.sequences[row]) - 1 + np.arange(LENGTH)
            self.gaps.append(float(np.abs(normalized(drafted[row]) - normalized(expected[row, ahead])).max()))
            assert self.gaps[-1] < 1e-4, f"row {row} drafts from other logits than a fresh forward, by {self.gaps[-1]}"


# Kept tokens a round for four rows, when three are drafted. `None`: a round without drafting.
EVERY_KIND_OF_ROUND = [
    [0, 1, 2, 3],  # unequal
    [3, 3, 3, 3],  # all of them: the last drafted token was never fed to the draft
    [3, 3, 3, 3],
    None,
    [3, 0, 1, 3],
    None,  # after a full acceptance and without drafting, the backlog is longer than a pass is wide
    [0, 3, 0, 2],
    *[None] * 20,  # a backlog of several passes
    [2, 3, 3, 0],
    None,
    None,
    [3, 1, 0, 2],
    [3, 1, 0, 0],
]


def check_every_kind_of_round(
    draft: AbstractDraft, target: AbstractLanguageModel, model: AbstractLanguageModel
) -> None:
    """What is drafted is what a fresh forward of `model` says, whatever rounds went before."""
    rounds = Rounds(draft, target, model)
    for accepted in EVERY_KIND_OF_ROUND:
        rounds.round(accepted)
    # Another draft's guesses are verified in place of its own, and kept.
    rounds.round([3, 2, 0, 3], foreign=True)
    rounds.round([0, 3, 3, 0])
    rounds.round([3, 2, 3, 0], foreign=True)
    rounds.round(None)
    rounds.round([0, 0, 0, 0])
    assert max(rounds.gaps) > 0


def check_training_logits(draft: AbstractDraft, target: AbstractLanguageModel, draft_hidden: int) -> None:
    """At position `i` token `i + 1` is the last committed one, and the first drafted token is `i + 2`."""
    tokens, i = jr.randint(jr.key(3), (4, 8), 0, target.vocab_size, jnp.int32), 5

    @eqx.filter_jit
    def trained_and_drafted(draft, target, tokens):
        features = sequence_features(target, tokens, layers=draft.layers)
        hidden = draft.train_hidden(target, features, tokens)
        state = draft.init(target, features, tokens[:, : i + 1], jnp.full(4, i + 1), 20)
        sampler = IndependentSampler(Sampling(1.0), jr.split(jr.key(4), 4))
        proposal, _ = draft.propose(target, state, tokens[:, i + 1], sampler, 1)
        return hidden, draft.train_logits(target, hidden), proposal.distribution.logits

    hidden, trained, drafted = trained_and_drafted(draft, target, tokens)
    assert hidden.shape == (4, 8, draft.train_length, draft_hidden) and drafted.shape == (4, 1, target.vocab_size)
    np.testing.assert_allclose(normalized(trained[:, i, 0]), normalized(drafted[:, 0]), atol=1e-4)


def check_nothing_beyond_the_capacity(
    draft: AbstractDraft, target: AbstractLanguageModel, model: AbstractLanguageModel
) -> None:
    """The last round that fits is right; and rows that have finished are pushed on, round after round, beyond the end.

    The last row ends where the capacity does, in a round that begins with a backlog of several passes. The others
    follow one by one, and are right until they get there.
    """
    rounds = Rounds(draft, target, model)
    rounds.round([0] * ROWS)
    for _ in range(59):
        rounds.round(None)
    assert [len(sequence) for sequence in rounds.sequences] == [62, 63, 66, CAPACITY - LENGTH]
    assert rounds.round([0, 0, 0, 3]) == ROWS
    counts = [rounds.round([0, 0, 0, 3]) for _ in range(8)]
    assert counts == [3, 3, 3, 2, 2, 2, 1, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(rounds.state))
