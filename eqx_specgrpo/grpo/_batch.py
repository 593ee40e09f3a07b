"""From rollouts to the arrays of one policy update."""

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
    - `reference_logprobs`: under the frozen reference, or `None` without one.
    """

    tokens: Int[Array | np.ndarray, "rows seq"]
    prompt_lengths: Int[Array | np.ndarray, " rows"]
    completion_tokens: Int[Array | np.ndarray, "rows new"]
    completion_mask: Bool[Array | np.ndarray, "rows new"]
    old_logprobs: Float[Array | np.ndarray, "rows new"]
    advantages: Float[Array | np.ndarray, " rows"]
    reference_logprobs: Float[Array | np.ndarray, "rows new"] | None = None

    def rows(self, rows: slice | Int[np.ndarray, " chosen"], width: int | None = None) -> "UpdateBatch":
        """A micro-batch.

        **Arguments:**

        - `rows`: which rows.
        - `width`: the positions to keep; all by default. The rows' sequences must end within them.
        """
        new = self.completion_tokens.shape[1] if width is None else min(width, self.completion_tokens.shape[1])
        return UpdateBatch(
            self.tokens[rows, :width],
            self.prompt_lengths[rows],
            self.completion_tokens[rows, :new],
            self.completion_mask[rows, :new],
            self.old_logprobs[rows, :new],
            self.advantages[rows],
            None if self.reference_logprobs is None else self.reference_logprobs[rows, :new],
        )


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
    return UpdateBatch(
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        completion_tokens=rollouts.tokens[:, :new],
        completion_mask=mask,
        old_logprobs=rollouts.logprobs[:, :new],
        advantages=np.asarray(advantages, np.float32),
    )


def padded_width(length: int) -> int:
    """The next width on the ladder on which sequences are padded: multiples of 64, then four widths an octave."""
    step = max(64, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def plan_micro_batches(
    lengths: Int[np.ndarray, " rows"],
    width: int,
    *,
    num_parts: int = 1,
    max_tokens: int | None = None,
    sort: bool = True,
    overhead: int = 128,
) -> list[tuple[Int[np.ndarray, " part"], int]]:
    """Divides rows into micro-batches of equal size, so that short rows are not padded to the length of long ones.

    Rows are sorted by length, cut into `num_parts` or a power of two times as many parts, and each part is padded to
    its own longest row. Of the divisions that keep to `max_tokens` the one with the fewest positions is taken. Each
    further part counts as `overhead` more positions; measured on a CPU, where its gradients have to be added. All
    parts have as many rows, and widths come from a ladder: so few shapes are ever compiled.

    **Arguments:**

    - `lengths`: of the rows' sequences, prompt and completion.
    - `width`: of the array that the sequences are in, which no part exceeds.
    - `num_parts`: divides the number of rows.
    - `max_tokens`: the most positions of a micro-batch, padding included; a single row may exceed it. `None`: no limit.
    - `sort`: whether rows may change places, and be divided further than `num_parts`.

    **Returns:**

    For each part its rows, longest first, and the width to cut them to.
    """
    rows = len(lengths)
    if num_parts < 1 or rows % num_parts:
        raise ValueError(f"num_parts is {num_parts}, which does not divide {rows} rows: give a divisor")
    order = np.argsort(-lengths, kind="stable") if sort else np.arange(rows)

    def divide(num: int) -> list[tuple[Int[np.ndarray, " part"], int]]:
        return [(part, min(padded_width(int(lengths[part].max())), width)) for part in np.split(order, num)]

    if not sort:
        return divide(num_parts)
    numbers = [num_parts]
    while rows % (2 * numbers[-1]) == 0:
        numbers.append(2 * numbers[-1])
    if numbers[-1] != rows:
        numbers.append(rows)
    plans = [divide(num) for num in numbers]
    if max_tokens is not None:
        # The last one has a row a part: nothing can be smaller.
        plans = [p for p in plans if max(len(part) * cut for part, cut in p) <= max_tokens] or plans[-1:]
    return min(plans, key=lambda plan: sum(len(part) * cut + overhead for part, cut in plan))
