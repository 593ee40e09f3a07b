"""How the rows of an update are divided into micro-batches."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ._batch import num_prompts, padded_width


class PlannedMicroBatch(NamedTuple):
    """A part of a step's rows.

    **Arguments:**

    - `rows`: indices of its rows.
    - `width`: number of completion positions to keep.
    - `has_gradient`: whether a row has a gradient. If none has, a forward pass is enough.
    """

    rows: Int[np.ndarray, " part"]
    width: int
    has_gradient: bool


_WITH_BACKWARD = 3  # what a forward and its backward cost, over the forward alone
# What a division has to save of the cost of the coarsest: its programs have to be compiled.
_WORTH_DIVIDING = 0.1


def plan_micro_batches(
    lengths: Int[np.ndarray, " rows"],
    width: int,
    *,
    num_parts: int = 1,
    max_tokens: int | None = None,
    sort: bool = True,
    overhead: int = 128,
    prompt_of_row: Int[np.ndarray, " rows"] | None = None,
    prompt_width: int = 0,
    rows_with_gradient: Bool[np.ndarray, " rows"] | None = None,
    one_shape: bool = False,
    shards: int = 1,
) -> list[PlannedMicroBatch]:
    """Divides rows into micro-batches of equal size, so that short rows are not padded to the length of long ones, and
    no backward is computed where no row has a gradient.

    Rows are sorted by length, or those with a gradient first and then by length, cut into `num_parts` or a power of two
    times as many parts, and each part is padded to its own longest row. Of the divisions that keep to `max_tokens` the
    cheapest is taken, if it saves a tenth of what the coarsest costs. What counts are positions, the prompts' included,
    of which a part computes each once, and `overhead` more for each part; those of a part without a gradient count a
    third. All parts have as many rows, and widths come from a ladder, so that shapes are few; each may have to be
    compiled with its backward and without.

    **Arguments:**

    - `lengths`: of the completions.
    - `width`: of the array that the completions are in, which no part exceeds.
    - `num_parts`: divides the number of rows.
    - `max_tokens`: the most positions of a micro-batch, padding included; a single row may exceed it. `None`: no limit.
    - `sort`: whether rows may change places, and be divided further than `num_parts`.
    - `prompt_of_row`, `prompt_width`: which prompt a row has, and as how many positions a prompt is computed.
    - `overhead`: of a part, in positions; measured on a CPU, where its gradients have to be added.
    - `one_shape`: leave rows in their order, pad all parts to the longest row of all, and divide only as `max_tokens`
        asks for: one program.
    - `shards`: over how many shards of a mesh the rows of each part are divided. Positions are those of one shard; no
        part has fewer rows than shards, unless `num_parts` asks for it.
    - `rows_with_gradient`: see [`eqx_specgrpo.grpo.UpdateBatch.rows_with_gradient`][]; by default all.

    **Returns:**

    The parts; the rows of each with a gradient first or longest first.
    """
    rows = len(lengths)
    with_gradient = np.ones(rows, bool) if rows_with_gradient is None else rows_with_gradient
    if num_parts < 1 or rows % num_parts:
        raise ValueError(f"num_parts is {num_parts}, which does not divide {rows} rows: give a divisor")

    def divide(order: Int[np.ndarray, " rows"], num: int) -> list[PlannedMicroBatch]:
        longest = [int((lengths if one_shape else lengths[part]).max()) for part in np.split(order, num)]
        return [
            PlannedMicroBatch(part, min(padded_width(most), width), bool(with_gradient[part].any()))
            for part, most in zip(np.split(order, num), longest, strict=True)
        ]

    if not sort:
        return divide(np.arange(rows), num_parts)

    def positions(part: PlannedMicroBatch) -> int:
        prompts, own_rows = 0, -(-len(part.rows) // shards)
        if prompt_of_row is not None:
            distinct = min(len(np.unique(prompt_of_row[part.rows])), own_rows)
            prompts = num_prompts(distinct, len(np.unique(prompt_of_row)))
        return own_rows * part.width + prompts * prompt_width

    def cost(plan: list[PlannedMicroBatch]) -> int:
        return sum((_WITH_BACKWARD if p.has_gradient else 1) * (positions(p) + overhead) for p in plan)

    numbers = [num_parts]
    while rows % (2 * numbers[-1]) == 0:
        numbers.append(2 * numbers[-1])
    if numbers[-1] != rows:
        numbers.append(rows)
    numbers = [num for num in numbers if num == num_parts or rows // num >= shards]
    orders = [np.argsort(-lengths, kind="stable"), np.lexsort((-lengths, ~with_gradient))]
    if one_shape:  # in which the rows of a prompt stay together, so that parts have as many prompts
        orders = [np.arange(rows)]
    plans = [divide(order, num) for num in numbers for order in orders]
    if max_tokens is not None:
        # The last ones have a row a part: nothing can be smaller.
        plans = [p for p in plans if max(map(positions, p)) <= max_tokens] or plans[-len(orders) :]
    if one_shape:
        return plans[0]
    best = min(plans, key=cost)
    return best if cost(best) <= (1 - _WORTH_DIVIDING) * cost(plans[0]) else plans[0]
