"""From rollouts to the arrays of one policy update."""

from typing import NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._types import Rollouts, StopReason


class UpdateBatch(eqx.Module):
    """Whole sequences, prompt and completion without a gap, right-padded.

    **Arguments:**

    - `tokens`: the sequences.
    - `prompt_lengths`: where the completions begin.
    - `completion_tokens`: the completions again, from their first token on.
    - `completion_mask`: `True` where a completion token counts in the policy's loss.
    - `old_logprobs`: of the completion tokens under the policy that sampled them.
    - `advantages`: one a row.
    - `prompt_rows`: for each prompt, a row that begins with it: a prompt need not be computed for each of its rows.
    - `prompt_of_row`: which of those prompts a row begins with.
    - `reference_logprobs`: under the frozen reference, or `None` without one.
    - `completion_lengths`: what is right of them is padding, which attention leaves out; `None` if that is not known.
    """

    tokens: Int[Array | np.ndarray, "rows seq"]
    prompt_lengths: Int[Array | np.ndarray, " rows"]
    completion_tokens: Int[Array | np.ndarray, "rows new"]
    completion_mask: Bool[Array | np.ndarray, "rows new"]
    old_logprobs: Float[Array | np.ndarray, "rows new"]
    advantages: Float[Array | np.ndarray, " rows"]
    prompt_rows: Int[Array | np.ndarray, " prompts"]
    prompt_of_row: Int[Array | np.ndarray, " rows"]
    reference_logprobs: Float[Array | np.ndarray, "rows new"] | None = None
    completion_lengths: Int[Array | np.ndarray, " rows"] | None = None

    def rows_with_gradient(self, *, with_kl: bool) -> Bool[np.ndarray, " rows"]:
        """Which rows move the policy: those with a token that counts and an advantage. The loss of the others is 0
        whatever the weights are, in every `loss_type`, unless they are held to a reference. (Of a model in which rows
        do not see each other.)

        **Arguments:**

        - `with_kl`: whether the loss has a KL term, which every token that counts takes part in.
        """
        counts = np.asarray(self.completion_mask).any(axis=1)
        return np.asarray(counts if with_kl else counts & (np.asarray(self.advantages) != 0))

    def rows(self, rows: slice | Int[np.ndarray, " chosen"], new: int | None = None) -> "UpdateBatch":
        """A micro-batch.

        **Arguments:**

        - `rows`: which rows.
        - `new`: the completions' positions to keep; all by default. They must end within them.
        """
        prompt_width = self.tokens.shape[1] - self.completion_tokens.shape[1]
        width = self.completion_tokens.shape[1] if new is None else new
        return UpdateBatch(
            self.tokens[rows, : prompt_width + width],
            self.prompt_lengths[rows],
            self.completion_tokens[rows, :width],
            self.completion_mask[rows, :width],
            self.old_logprobs[rows, :width],
            self.advantages[rows],
            *_shared_prompts(np.asarray(self.prompt_of_row)[rows], len(self.prompt_rows)),
            None if self.reference_logprobs is None else self.reference_logprobs[rows, :width],
            None if self.completion_lengths is None else self.completion_lengths[rows],
        )


def _shared_prompts(
    group: Int[np.ndarray, " rows"], most: int
) -> tuple[Int[np.ndarray, " prompts"], Int[np.ndarray, " rows"]]:
    """`prompt_rows` and `prompt_of_row` of rows in groups."""
    distinct, first, prompt_of_row = np.unique(group, return_index=True, return_inverse=True)
    prompt_rows = np.resize(first, num_prompts(len(distinct), most))
    return prompt_rows.astype(np.int32), prompt_of_row.astype(np.int32)


def num_prompts(distinct: int, most: int) -> int:
    """As how many prompts a micro-batch with so many different ones is computed: a power of two, so that few shapes are
    compiled, or all."""
    return min(1 << (distinct - 1).bit_length(), most)


def make_update_batch(
    rollouts: Rollouts,
    advantages: Float[np.ndarray, " rows"],
    *,
    mask_truncated_completions: bool = False,
    multiple_of: int = 64,
) -> UpdateBatch:
    """Lays the rollouts out for the update.

    **Arguments:**

    - `rollouts`: from the decoder.
    - `advantages`: one a row.
    - `mask_truncated_completions`: leave completions that were cut off at the length limit out of the loss (DAPO's
        overlong filtering).
    - `multiple_of`: the completion width is rounded up to this, so that few shapes are compiled.
    """
    rows, limit = rollouts.tokens.shape
    new = min(-(-int(rollouts.lengths.max()) // multiple_of) * multiple_of, limit)
    prompts = rollouts.prompts
    width = prompts.tokens.shape[1]
    tokens = np.zeros((rows, width + new), np.int32)
    prompt_lengths = np.asarray(prompts.lengths)[rollouts.group].astype(np.int32)
    for row, prompt in enumerate(rollouts.group):
        start, length = int(prompt_lengths[row]), int(rollouts.lengths[row])
        tokens[row, :start] = prompts.tokens[prompt, :start]
        tokens[row, start : start + length] = rollouts.tokens[row, :length]
    mask = np.arange(new)[None] < rollouts.lengths[:, None]
    if mask_truncated_completions:
        mask = mask & (rollouts.stop_reasons != StopReason.LENGTH)[:, None]
    prompt_rows, prompt_of_row = _shared_prompts(rollouts.group, len(prompts.lengths))
    return UpdateBatch(
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        completion_tokens=rollouts.tokens[:, :new],
        completion_mask=mask,
        old_logprobs=rollouts.logprobs[:, :new],
        advantages=np.asarray(advantages, np.float32),
        prompt_rows=prompt_rows,
        prompt_of_row=prompt_of_row,
        completion_lengths=rollouts.lengths.astype(np.int32),
    )


def padded_width(length: int) -> int:
    """The next width on the ladder on which sequences are padded: 16, 32, multiples of 64, then four widths an
    octave."""
    if length <= 32:
        return 16 if length <= 16 else 32
    step = max(64, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


class PlannedMicroBatch(NamedTuple):
    """A part of a step's rows.

    **Arguments:**

    - `rows`: which.
    - `width`: the completions' positions to keep.
    - `has_gradient`: whether any of them has one. If not, a forward is all that is needed.
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
    - `rows_with_gradient`: see [`eqx_specgrpo.grpo.UpdateBatch.rows_with_gradient`][]; by default all.

    **Returns:**

    The parts; the rows of each with a gradient first or longest first.
    """
    rows = len(lengths)
    with_gradient = np.ones(rows, bool) if rows_with_gradient is None else rows_with_gradient
    if num_parts < 1 or rows % num_parts:
        raise ValueError(f"num_parts is {num_parts}, which does not divide {rows} rows: give a divisor")

    def divide(order: Int[np.ndarray, " rows"], num: int) -> list[PlannedMicroBatch]:
        return [
            PlannedMicroBatch(part, min(padded_width(int(lengths[part].max())), width), bool(with_gradient[part].any()))
            for part in np.split(order, num)
        ]

    if not sort:
        return divide(np.arange(rows), num_parts)

    def positions(part: PlannedMicroBatch) -> int:
        prompts = 0
        if prompt_of_row is not None:
            prompts = num_prompts(len(np.unique(prompt_of_row[part.rows])), len(np.unique(prompt_of_row)))
        return len(part.rows) * part.width + prompts * prompt_width

    def cost(plan: list[PlannedMicroBatch]) -> int:
        return sum((_WITH_BACKWARD if p.has_gradient else 1) * (positions(p) + overhead) for p in plan)

    numbers = [num_parts]
    while rows % (2 * numbers[-1]) == 0:
        numbers.append(2 * numbers[-1])
    if numbers[-1] != rows:
        numbers.append(rows)
    orders = np.argsort(-lengths, kind="stable"), np.lexsort((-lengths, ~with_gradient))
    plans = [divide(order, num) for num in numbers for order in orders]
    if max_tokens is not None:
        # The last ones have a row a part: nothing can be smaller.
        plans = [p for p in plans if max(map(positions, p)) <= max_tokens] or plans[-len(orders) :]
    best = min(plans, key=cost)
    return best if cost(best) <= (1 - _WORTH_DIVIDING) * cost(plans[0]) else plans[0]
