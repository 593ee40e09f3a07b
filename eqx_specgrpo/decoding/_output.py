"""Host buffers that collect the rows as they leave the device."""

import numpy as np
from jaxtyping import Array, Bool, Int

from .._types import DecodeStatistics, Prompts, Rollouts, StopReason, Support
from ._state import DecodeState


class Output:
    """All rows of a decoding, as far as they have been seen.

    **Arguments:**

    - `rows`, `new`: how many, and the most tokens of each.
    - `max_draft`: of the statistics.
    """

    def __init__(self, rows: int, new: int, max_draft: int):
        self.new = new
        self.tokens = np.zeros((rows, new), np.int32)
        self.logprobs = np.zeros((rows, new), np.float32)
        self.lengths = np.zeros(rows, np.int32)
        self.stop = np.zeros(rows, np.int32)
        self.target_forwards = np.zeros(rows, np.int32)
        self.emitted = np.zeros(rows, np.int32)
        self.drafted = np.zeros((rows, max_draft), np.int32)
        self.accepted = np.zeros((rows, max_draft), np.int32)
        self.support: Support | None = None

    def take(self, row_ids: Int[np.ndarray, " rows"], state: DecodeState) -> None:
        lengths = np.asarray(state.num_new)
        there = min(self.new, state.tokens.shape[1])
        counts = np.arange(there)[None] < lengths[:, None]

        def collect(into: np.ndarray, values: Array | np.ndarray) -> None:
            of_tokens = np.asarray(values)[:, :there]
            into[row_ids, :there] = np.where(counts.reshape(*counts.shape, *[1] * (into.ndim - 2)), of_tokens, 0)

        collect(self.tokens, state.tokens)
        collect(self.logprobs, state.logprobs)
        if state.support is not None:
            if self.support is None:
                shape = self.tokens.shape
                ids = np.zeros((*shape, state.support.ids.shape[-1]), np.int32)
                self.support = Support(ids, np.zeros(shape, np.int32))
            collect(np.asarray(self.support.ids), state.support.ids)
            collect(np.asarray(self.support.counts), state.support.counts)
        self.lengths[row_ids] = lengths
        self.stop[row_ids] = np.asarray(state.stop)
        self.target_forwards[row_ids] = np.asarray(state.target_forwards)
        self.emitted[row_ids] = np.asarray(state.emitted)
        self.drafted[row_ids] = np.asarray(state.drafted)
        self.accepted[row_ids] = np.asarray(state.accepted)

    @property
    def ended(self) -> Bool[np.ndarray, " rows"]:
        return self.stop != StopReason.RUNNING

    def tokens_of_others(self, row_ids: Int[np.ndarray, " rows"]) -> int:
        return int(np.delete(self.lengths, row_ids).sum())

    def rollouts(self, prompts: Prompts, samples: int) -> Rollouts:
        group = np.repeat(np.arange(len(prompts.lengths), dtype=np.int32), samples)
        statistics = DecodeStatistics(self.target_forwards, self.drafted, self.accepted, self.emitted)
        return Rollouts(prompts, group, self.tokens, self.lengths, self.logprobs, self.stop, statistics, self.support)
