"""What travels between the stations of the pipeline: prompts, rollouts and scored rollouts.

All of them are PyTrees of host (numpy) or device arrays with explicit lengths; a token id never says whether a
position counts, because padding ids and end-of-sequence ids coincide in many checkpoints.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int


class StopReason(IntEnum):
    """The reason why a row stopped. `RUNNING` occurs only while the row is being decoded."""

    RUNNING = 0
    EOS = 1
    LENGTH = 2
    STOP = 3  # a text, see `decoding.StopStrings`


def padding_step(longest: int) -> int:
    """What the longest prompt of a batch is padded to a multiple of: 32 up to 128 tokens, 64 up to 256, and so on.

    The padding is at most a third of the width, or 31 tokens, and each doubling has two widths only: every width is
    a set of programs to compile, and prompts of a task may differ in length by a decade.
    """
    return 32 << max(0, (longest - 1).bit_length() - 7)


class Prompts(eqx.Module):
    """Right-padded prompts, one per row.

    **Arguments:**

    - `tokens`: token ids, shape `[prompts, seq]`; positions from a row's length on are padding.
    - `lengths`: number of tokens of each prompt, at least 1.
    """

    tokens: Int[Array | np.ndarray, "prompts seq"]
    lengths: Int[Array | np.ndarray, " prompts"]

    @staticmethod
    def from_lists(rows: Sequence[Sequence[int]], multiple_of: int = 16) -> "Prompts":
        """Makes prompts of lists of token ids, padded to a multiple of `multiple_of`, so that there are few widths to
        compile."""
        if not rows:
            raise ValueError("no prompts: give at least one list of token ids")
        for index, row in enumerate(rows):
            if not isinstance(row, Sequence | np.ndarray):
                raise ValueError(f"prompt {index} is {row!r}: give a list of token ids for each prompt")
            if len(row) == 0:
                raise ValueError(f"prompt {index} is empty: every prompt needs at least one token")
        longest = max(len(row) for row in rows)
        width = -(-longest // multiple_of) * multiple_of
        tokens = np.zeros((len(rows), width), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        return Prompts(tokens, np.array([len(row) for row in rows], np.int32))

    def parts(self, count: int) -> tuple["Prompts", ...]:
        """Splits the prompts into parts of this size, all with the same padding; the last part may be smaller."""
        starts = range(0, len(self.lengths), count)
        return tuple(Prompts(self.tokens[i : i + count], self.lengths[i : i + count]) for i in starts)


class DecodeStatistics(eqx.Module):
    """Counts of one decoding, summed over rounds, for each row.

    **Arguments:**

    - `target_forwards`: target passes in which the row took part, the prompt's own pass not counted.
    - `drafted`: drafted tokens that were submitted to verification, by position in the draft.
    - `accepted`: drafted tokens that were accepted, by position in the draft.
    - `emitted`: tokens emitted by those target passes (so without the prompt pass's first token).
    """

    target_forwards: Int[np.ndarray, " rows"]
    drafted: Int[np.ndarray, "rows draft"]
    accepted: Int[np.ndarray, "rows draft"]
    emitted: Int[np.ndarray, " rows"]

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per target pass of a row, the corrected or bonus token included; 1 is plain decoding."""
        return float(self.emitted.sum() / max(self.target_forwards.sum(), 1))

    @property
    def acceptance_rate(self) -> float:
        """Number of accepted tokens divided by the number of drafted tokens."""
        return float(self.accepted.sum() / max(self.drafted.sum(), 1))

    @property
    def acceptance_rate_by_position(self) -> list[float]:
        """For each draft position, the share of the rounds that drafted it in which it was accepted."""
        drafted = self.drafted.sum(0)
        return [float(a / max(d, 1)) for a, d in zip(self.accepted.sum(0), drafted, strict=True)]


class Support(eqx.Module):
    """The tokens that truncated sampling kept at each position. The token was drawn from these, and its log-probability
    is normalised over them.

    **Arguments:**

    - `ids`: token ids, likeliest first; entries from a position's count on are unused.
    - `counts`: number of tokens kept; 0 where there is no token.
    """

    ids: Int[Array | np.ndarray, "*batch kept"]
    counts: Int[Array | np.ndarray, "*batch"]


class Rollouts(eqx.Module):
    """Completions of prompts, with the data that learning from them needs.

    **Arguments:**

    - `prompts`: one prompt per *group*, which is the completions of one prompt.
    - `group`: for each row, the index of its prompt.
    - `tokens`: completion tokens, an end-of-sequence token included if one was emitted; right-padded.
    - `lengths`: completion lengths.
    - `logprobs`: the **target's** log-probability of each token under the distribution it was sampled from (after
        temperature and truncation; at temperature 0, the untempered distribution).
    - `stop_reasons`: `StopReason` values.
    - `statistics`: of the decoder.
    - `support`: the tokens that truncated sampling kept at each token; `None`: all of them, or it was not recorded
        (see [`eqx_specgrpo.sampling.TruncatedSampling`][]).
    """

    prompts: Prompts
    group: Int[np.ndarray, " rows"]
    tokens: Int[np.ndarray, "rows new"]
    lengths: Int[np.ndarray, " rows"]
    logprobs: Float[np.ndarray, "rows new"]
    stop_reasons: Int[np.ndarray, " rows"]
    statistics: DecodeStatistics
    support: Support | None

    def completion(self, row: int) -> list[int]:
        """The token ids of one completion, without padding."""
        return self.tokens[row, : self.lengths[row]].tolist()


class ScoredRollouts(eqx.Module):
    """Rollouts with their rewards and advantages.

    **Arguments:**

    - `rollouts`: the completions.
    - `rewards_per_function`: one column per reward function; NaN where a function did not apply.
    - `rewards`: the weighted sum over the functions that applied.
    - `advantages`: one per row.
    """

    rollouts: Rollouts
    rewards_per_function: Float[np.ndarray, "rows functions"]
    rewards: Float[np.ndarray, " rows"]
    advantages: Float[np.ndarray, " rows"]


Message = dict[str, Any]  # {"role": "user", "content": "..."} as in chat templates
