"""What plain decoding would have taken for completions that are there."""

import heapq
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from ._buckets import bucket_for


def plain_seconds(
    lengths: Int[np.ndarray, " rows"],
    smallest: int,
    round_seconds: Callable[[int, float], float],
    max_rows: int | None = None,
) -> float:
    """Seconds of the rounds of a plain decoding whose completions have these lengths.

    Every row emits one token a round (its first one came with the prompt), and the batch shrinks to powers of two as
    rows end: so the rounds with each size of the batch follow from the lengths alone.

    **Arguments:**

    - `lengths`: tokens of each completion, in the order in which rows start.
    - `smallest`: the smallest batch.
    - `round_seconds`: of a round with so many rows, the longest of which has emitted so many tokens. It is asked for
        the middle of each stretch of rounds.
    - `max_rows`: how many rows are decoded at a time; those that wait start when one has ended.
    """
    rounds = [int(length) - 1 for length in lengths if length > 1]
    at_once = len(rounds) if max_rows is None else min(max_rows, len(rounds))
    rows = [(end, 0) for end in rounds[:at_once]]  # when they end and when they began, the first to end on top
    heapq.heapify(rows)
    seconds, now = 0.0, 0

    def until(end: int, size: int) -> float:
        if end == now:
            return 0.0
        first = min(begin for _, begin in rows)
        return (end - now) * round_seconds(size, 1 + (now + end) / 2 - first)

    for waiting in rounds[at_once:]:
        end = rows[0][0]
        seconds += until(end, at_once)
        now = end
        heapq.heapreplace(rows, (end + waiting, end))
    whole = len(lengths) if max_rows is None else min(max_rows, len(lengths))
    while rows:
        size = min(bucket_for(len(rows), smallest), max(whole, 1))
        end = rows[0][0]
        seconds += until(end, size)
        now = end
        heapq.heappop(rows)
    return seconds
