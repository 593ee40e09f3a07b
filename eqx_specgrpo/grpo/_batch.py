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

    def rows(self, start: int, stop: int) -> "UpdateBatch":
        """A micro-batch."""
        reference = None if self.reference_logprobs is None else self.reference_logprobs[start:stop]
        return UpdateBatch(
            self.tokens[start:stop],
            self.prompt_lengths[start:stop],
            self.completion_tokens[start:stop],
            self.completion_mask[start:stop],
            self.old_logprobs[start:stop],
            self.advantages[start:stop],
            reference,
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
