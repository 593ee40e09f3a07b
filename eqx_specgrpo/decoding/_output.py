"""Host buffers that collect the rows as they leave the device."""

import jax
import numpy as np
from jaxtyping import Bool, Int

from .._types import DecodeStatistics, Prompts, Rollouts, StopReason, Support
from ..layout import AbstractDeviceMesh
from ._state import DecodeState


class Output:
    """All rows of a decoding, as far as they have been seen.

    **Arguments:**

    - `rows`, `new`: how many, and the most tokens of each.
    - `max_draft`: of the statistics.
    - `mesh`: where rows come from.
    """

    def __init__(self, rows: int, new: int, max_draft: int, mesh: AbstractDeviceMesh):
        self._mesh = mesh
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
        of_tokens = (state.tokens, state.logprobs, state.support)
        of_rows = (state.stop, state.target_forwards, state.emitted, state.drafted, state.accepted)
        lengths, (tokens, logprobs, support), of_rows = self._mesh.fetch((state.num_new, of_tokens, of_rows))
        there = min(self.new, tokens.shape[1])
        counts = np.arange(there)[None] < lengths[:, None]

        def collect(into: np.ndarray, values: np.ndarray) -> None:
            into[row_ids, :there] = np.where(
                counts.reshape(*counts.shape, *[1] * (into.ndim - 2)), values[:, :there], 0
            )

        collect(self.tokens, tokens)
        collect(self.logprobs, logprobs)
        if support is not None:
            if self.support is None:
                shape = self.tokens.shape
                self.support = Support(np.zeros((*shape, support.ids.shape[-1]), np.int32), np.zeros(shape, np.int32))
            collect(np.asarray(self.support.ids), support.ids)
            collect(np.asarray(self.support.counts), support.counts)
        self.lengths[row_ids] = lengths
        buffers = (self.stop, self.target_forwards, self.emitted, self.drafted, self.accepted)
        for buffer, values in zip(buffers, of_rows, strict=True):
            buffer[row_ids] = values

    @property
    def ended(self) -> Bool[np.ndarray, " rows"]:
        return self.stop != StopReason.RUNNING

    def tokens_of_others(self, row_ids: Int[np.ndarray, " rows"]) -> int:
        return int(np.delete(self.lengths, row_ids).sum())

    def rollouts(self, prompts: Prompts, samples: int) -> Rollouts:
        """The rows of these prompts, which come first; fillers are left out."""
        group = np.repeat(np.arange(len(prompts.lengths), dtype=np.int32), samples)
        rows = slice(len(group))
        counts = (self.target_forwards, self.drafted, self.accepted, self.emitted)
        statistics = DecodeStatistics(*(count[rows] for count in counts))
        support = jax.tree.map(lambda x: x[rows], self.support)
        values = (self.tokens[rows], self.lengths[rows], self.logprobs[rows], self.stop[rows])
        return Rollouts(prompts, group, *values, statistics, support)
