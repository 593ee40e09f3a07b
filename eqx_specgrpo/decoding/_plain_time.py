"""What plain decoding would have taken for completions that are there."""

import heapq
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from ._buckets import bucket_for


def plain_seconds(
    lengths: Int[np.ndarray, " rows"],
    smallest: int,
    round_seconds: Callable[[int], float],
    max_rows: int | None = None,
) -> float:
    """Seconds of the rounds of a plain decoding whose completions have these lengths.

    Every row emits one token a round (its first one came with the prompt), and the batch shrinks to powers of two as
    rows end: so the rounds with each size of the batch follow from the lengths alone.

    **Arguments:**

    - `lengths`: tokens of each completion, in the order in which rows start.
    - `smallest`: the smallest batch.
    - `round_seconds`: of a round with so many rows.
    - `max_rows`: how many rows are decoded at a time; those that wait start when one has ended.
    """
    rounds = [int(length) - 1 for length in lengths if length > 1]
    at_once = len(rounds) if max_rows is None else min(max_rows, len(rounds))
    ends, seconds, now = rounds[:at_once], 0.0, 0
    heapq.heapify(ends)
    for waiting in rounds[at_once:]:
        end = heapq.heappop(ends)
        seconds += (end - now) * round_seconds(at_once)
        now = end
        heapq.heappush(ends, end + waiting)
    whole = len(lengths) if max_rows is None else min(max_rows, len(lengths))
    while ends:
        size = min(bucket_for(len(ends), smallest), max(whole, 1))
        end = heapq.heappop(ends)
        seconds += (end - now) * round_seconds(size)
        now = end
    return seconds
