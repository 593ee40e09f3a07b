"""What a draft proposes depends on what is committed, not on how it came about."""

from typing import Any

import equinox as eqx
import numpy as np

from ..drafts import FallbackDraft
from ..errors import UserError
from ._drive import check_block, commit, fill, propose, script, start
from ._errors import require
from ._pair import Pair


def _script(most: int, rows: int) -> list[tuple[str, int, list[int], bool]]:
    """Rounds: what the last of them did, tokens drafted, how many of them each row keeps, and whose they were."""
    none, ragged = [0] * rows, [row % (most + 1) for row in range(rows)]
    rounds = [
        ("all were accepted", most, [most] * rows, False),
        ("all were accepted, once more", most, [most] * rows, False),
        ("none was accepted", most, none, False),
        ("nothing was drafted", 0, none, False),
        ("some were accepted, in each row another number", most, ragged, False),
        ("nothing was drafted, after a ragged round", 0, none, False),
        ("nothing was drafted, twice", 0, none, False),
        ("all were accepted in some rows and none in others", most, [most * (row % 2) for row in range(rows)], False),
        ("nothing was drafted, after a full acceptance", 0, none, False),
    ]
    if most > 1:
        rounds += [
            ("one was drafted and accepted", 1, [1] * rows, False),
            ("one was drafted, and accepted in some rows", 1, [row % 2 for row in range(rows)], False),
        ]
    rounds.append(("tokens that another draft had drafted were accepted", most, ragged[::-1], True))
    return rounds


def padded_prompts(pair: Pair) -> np.ndarray:
    """The prompts, with room for all rounds."""
    longest, width = int(pair.prompts.lengths.max()), pair.prompts.tokens.shape[1]
    needed = longest + sum(length + 1 for _, length, _, _ in _script(pair.draft.max_length, pair.rows)) + 1
    if needed > pair.target.max_length:
        raise UserError(
            f"the rewind check needs {needed} positions, but the target's context holds {pair.target.max_length}: give "
            "shorter prompts"
        )
    sequences = np.zeros((pair.rows, max(needed, width)), np.int32)
    sequences[:, :width] = pair.prompts.tokens
    return sequences


def capacity_of(pair: Pair) -> int:
    """Room for the longest row and one block more, as the decoder has it."""
    return padded_prompts(pair).shape[1] + pair.draft.max_length + 1


class _Rows(eqx.Module):
    """Rows that go from round to round: the draft's state and the target's cache."""

    draft_state: Any
    cache: Any

    def round(self, pair: Pair, last, lengths, scripted, num_accepted, length: int, foreign: bool):
        """Proposes, passes the block through the target and commits: a round of the decoder whose verdict is given."""
        state, guesses = self.draft_state, scripted[:, :length]
        if length > 0:
            tokens, _, _, state = propose(pair.draft, pair.target, state, last, script(scripted), length)
            guesses = guesses if foreign else np.asarray(tokens)
        block = np.concatenate([last[:, None], guesses], axis=1).astype(np.int32)
        features, cache = check_block(pair.target, block, lengths, self.cache, pair.draft.layers)
        return block, _Rows(commit(pair.draft, pair.target, state, features, block, num_accepted), cache)


def check_rewind(pair: Pair, *, same_after_restart: bool = True, tolerance: float = 1e-4) -> float:
    """After rounds of every kind, the next proposal is that of a fresh `init` on what is committed.

    **Arguments:**

    - `same_after_restart`: `False` for a draft that by design remembers more than the committed tokens, or less after a
        restart: its proposals are then compared with those after the same rounds with other rejected tokens. A
        `FallbackDraft` remembers verdicts, and is always compared in this way.
    - `tolerance`: of probabilities.

    **Returns:**

    The largest difference between two probabilities.
    """
    draft, target, rows, most = pair.draft, pair.target, pair.rows, pair.draft.max_length
    if most == 0:
        return 0.0
    same_after_restart = same_after_restart and not isinstance(draft, FallbackDraft)
    rounds, sequences, capacity = _script(most, rows), padded_prompts(pair), capacity_of(pair)
    width, rng = sequences.shape[1], np.random.default_rng(1)

    def random(*shape: int) -> np.ndarray:
        return rng.integers(0, target.vocab_size, shape).astype(np.int32)

    # Tokens fed to the target; the one after them is committed and has not been fed.
    lengths, every_row, worst = np.asarray(pair.prompts.lengths).copy(), np.arange(rows), 0.0

    def restarted():
        # What is not committed must not matter: it is no longer there.
        committed = np.where(np.arange(width)[None] < lengths[:, None], sequences, 0)
        return start(draft, target, committed, lengths, capacity)

    state = twin = _Rows(restarted(), fill(target, sequences, capacity, draft.layers))
    sequences[every_row, lengths] = random(rows)
    for index, (what, length, accepted, foreign) in enumerate(rounds):
        num_accepted, last, scripted = np.array(accepted, np.int32), sequences[every_row, lengths], random(rows, most)
        block, state = state.round(pair, last, lengths, scripted, num_accepted, length, foreign)
        if not same_after_restart:
            others = np.where(np.arange(most)[None] < num_accepted[:, None], scripted, random(rows, most))
            _, twin = twin.round(pair, last, lengths, others, num_accepted, length, foreign)
        for row, kept in enumerate(num_accepted):
            sequences[row, lengths[row] : lengths[row] + kept + 1] = block[row, : kept + 1]
        lengths = lengths + num_accepted + 1
        sequences[every_row, lengths] = last = random(rows)

        sampler = script(random(rows, most))
        tokens, _, probs, _ = propose(draft, target, state.draft_state, last, sampler, most)
        other = restarted() if same_after_restart else twin.draft_state
        expected, _, expected_probs, _ = propose(draft, target, other, last, sampler, most)
        tokens, expected = np.asarray(tokens), np.asarray(expected)
        gaps = (
            np.zeros(tokens.shape) if probs is None else np.abs(np.asarray(probs) - np.asarray(expected_probs)).max(-1)
        )
        gaps = np.where(np.isnan(gaps) | (tokens != expected), np.inf, gaps)
        row, offset = np.unravel_index(int(gaps.argmax()), gaps.shape)
        than = "a fresh init on the committed tokens" if same_after_restart else "after other rejected tokens"
        require(
            bool(gaps[row, offset] <= tolerance),
            f"{pair.name}, round {index + 1}, in which {what}: row {row} then proposes otherwise than {than}, at draft "
            f"position {offset} by {gaps[row, offset]:.1e} (tokens {tokens[row].tolist()}, expected "
            f"{expected[row].tolist()})",
        )
        worst = max(worst, float(gaps.max()))
    return worst
