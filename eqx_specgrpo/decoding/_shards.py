"""Which prompts, and so which rows, each shard of the mesh decodes. A row stays where it is, and a group together."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from .._types import Prompts
from ._order import StartOrder


class Division:
    """Prompts in equal parts, one a shard. Where they can't be divided evenly, some shards have fillers: prompts of one
    token, whose rows end before their first token.

    **Arguments:**

    - `shards`: how many parts.
    - `num_prompts`, `samples`: of the decoding; rows of a prompt are consecutive.
    """

    def __init__(self, shards: int, num_prompts: int, samples: int):
        self.shards = shards
        self.num_rows = num_prompts * samples
        self.prompts_a_shard = size = -(-num_prompts // shards)
        parts = np.array_split(np.arange(num_prompts), shards)
        prompts = np.stack([np.pad(part, (0, size - len(part)), constant_values=-1) for part in parts])
        self._prompts = prompts.reshape(-1)
        self._is_filler = self._prompts < 0
        # Fillers' rows come after all others, in the order of their places.
        fillers = num_prompts + np.cumsum(self._is_filler) - 1
        numbers = np.where(self._is_filler, fillers, self._prompts).reshape(shards, size)
        self.row_ids = (numbers[..., None] * samples + np.arange(samples)).reshape(shards, size * samples)
        self._place = np.empty(self.row_ids.size, np.int32)
        self._place[self.row_ids] = np.repeat(np.arange(size), samples)

    @property
    def with_fillers(self) -> int:
        """Rows in all, fillers included."""
        return self.row_ids.size

    def prompt_of(self, row_ids: Int[np.ndarray, "*rows"]) -> Int[np.ndarray, "*rows"]:
        """Which of its shard's prompts a row has, from 0."""
        return self._place[row_ids]

    def is_filler(self, row_ids: Int[np.ndarray, "*rows"]) -> Bool[np.ndarray, "*rows"]:
        """Whether a row is there only so that all shards have as many."""
        return row_ids >= self.num_rows

    def filled(
        self, prompts: Prompts, limits: Int[np.ndarray, " prompts"]
    ) -> tuple[Int[np.ndarray, "places seq"], Int[np.ndarray, " places"], Int[np.ndarray, " places"]]:
        """Tokens, lengths and limits of the prompts of all shards, one shard after the other, fillers included."""
        tokens, lengths = np.asarray(prompts.tokens)[self._prompts], np.asarray(prompts.lengths)[self._prompts]
        lengths, limits = np.where(self._is_filler, 1, lengths), np.where(self._is_filler, 0, limits[self._prompts])
        return tokens, lengths.astype(np.int32), limits.astype(np.int32)


class ShardQueues:
    """The rows that wait, by shard.

    **Arguments:**

    - `division`: which rows each shard has.
    - `expected`, `num_prompts`, `samples`: see [`StartOrder`][].
    """

    def __init__(self, division: Division, expected: Sequence[float] | None, num_prompts: int, samples: int):
        self._division = division
        self._orders = [
            StartOrder(expected, num_prompts, samples, rows[~division.is_filler(rows)]) for rows in division.row_ids
        ]

    @property
    def waiting(self) -> Int[np.ndarray, " shards"]:
        """How many rows wait in each shard."""
        return np.asarray([len(order) for order in self._orders])

    def first(
        self, most: int | None, lengths: Int[np.ndarray, " rows"], ended: Bool[np.ndarray, " rows"]
    ) -> Int[np.ndarray, "shards started"]:
        """The rows to start with, as many in each shard, fillers where a shard has fewer.

        **Arguments:**

        - `most`: in all, if not all rows are to start; but one in each shard.
        - `lengths`, `ended`: as for `take`.
        """
        count = int(self.waiting.max())
        if most is not None:
            count = min(count, max(1, most // self._division.shards))
        started = self.take(np.minimum(self.waiting, count), lengths, ended)
        ids = []
        for rows, own in zip(self._division.row_ids, started, strict=True):
            fillers = rows[self._division.is_filler(rows)][: count - len(own)]
            ids.append(np.concatenate([own, fillers]))
        return np.stack(ids)

    def take(
        self,
        counts: Int[np.ndarray, " shards"],
        lengths: Int[np.ndarray, " rows"],
        ended: Bool[np.ndarray, " rows"],
    ) -> list[Int[np.ndarray, " started"]]:
        """The rows to start next in each shard.

        **Arguments:**

        - `counts`: how many in each.
        - `lengths`, `ended`: of all rows, fillers included: which have ended, and with how many tokens.
        """
        rows = self._division.num_rows
        both = lengths[:rows], ended[:rows]
        return [order.take(count, *both) for order, count in zip(self._orders, counts.tolist(), strict=True)]


class Admission:
    """How many waiting rows are let in at once, when so many places of a shard are free: a power of two, so that few
    programs are compiled, and about a quarter of the shard's rows, so that the device is not stopped for each.

    **Arguments:**

    - `rows`: of each shard.
    - `waiting`: for each shard.
    """

    def __init__(self, rows: int, waiting: Int[np.ndarray, " shards"]):
        self._rows = rows
        self._counts = np.asarray([_power_of_two(min(max(1, rows // 4), count)) for count in waiting.tolist()])
        self._waiting = waiting
        self.size = int(self._counts.max())

    def is_due(self, active: Bool[np.ndarray, "shards rows"]) -> bool:
        """Whether one of the shards has places for its own."""
        return bool(((self._counts > 0) & ((~active).sum(1) >= self._counts)).any())

    def counts(self, active: Bool[np.ndarray, "shards rows"]) -> Int[np.ndarray, " shards"]:
        """How many each shard lets in: it has places for them, and one program for all shards."""
        return np.minimum(np.minimum((~active).sum(1), self._waiting), self.size)

    @property
    def stop_below(self) -> Int[np.ndarray, " shards"]:
        """The active rows of each shard at which it can let in its own; -1 where none wait."""
        return np.where(self._counts > 0, self._rows - self._counts, -1)


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1) if most else 0
