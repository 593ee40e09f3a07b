"""From rollouts to the arrays of one policy update."""

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._types import Rollouts, StopReason, Support


class UpdateBatch(eqx.Module):
    """A batch for the policy's update: whole sequences, prompt and completion without a gap, right-padded.

    **Arguments:**

    - `tokens`: token ids of the sequences.
    - `prompt_lengths`: lengths of the prompts, which is where the completions begin.
    - `completion_tokens`: the completions again, from their first token on.
    - `completion_mask`: `True` where a completion token counts in the policy's loss.
    - `old_logprobs`: log-probabilities of the completion tokens under the policy that sampled them.
    - `advantages`: one per row.
    - `prompt_rows`: for each prompt, a row that begins with it, so that a prompt is not computed for each of its rows.
    - `prompt_of_row`: for each row, the index of its prompt among these.
    - `reference_logprobs`: log-probabilities under the reference model, or `None` without one.
    - `sampling_logprobs`: log-probabilities under the sampler, if `old_logprobs` are the trainer's own; else `None`.
    - `importance_weights`: probability ratios of the old policy and the sampler; `None` if the two are taken as equal.
    - `entropy_mask`: `True` where a token counts because of its entropy; `None`: all tokens.
    - `completion_lengths`: positions beyond these are padding, which attention skips; `None` if unknown.
    - `support`: the tokens that truncated sampling kept at each completion token. Log-probabilities under any weights
        are normalised over them. `None`: over the whole vocabulary.
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
    sampling_logprobs: Float[Array | np.ndarray, "rows new"] | None = None
    importance_weights: Float[Array | np.ndarray, "rows new"] | None = None
    entropy_mask: Bool[Array | np.ndarray, "rows new"] | None = None
    completion_lengths: Int[Array | np.ndarray, " rows"] | None = None
    support: Support | None = None

    def rows_with_gradient(self, *, with_kl: bool) -> Bool[np.ndarray, " rows"]:
        """Returns which rows have a gradient: those with a token that counts and an advantage other than 0.

        The loss of the other rows is 0 under any weights, in every `loss_type`, unless there is a KL or an entropy
        bonus. (This holds for models in which rows do not influence one another.)

        **Arguments:**

        - `with_kl`: whether the loss has a KL or an entropy bonus, so that every token that counts has a gradient.
        """
        counts = np.asarray(self.completion_mask).any(axis=1)
        return np.asarray(counts if with_kl else counts & (np.asarray(self.advantages) != 0))

    def rows(self, rows: slice | Int[np.ndarray, " chosen"], new: int | None = None) -> "UpdateBatch":
        """Returns a micro-batch of some rows.

        **Arguments:**

        - `rows`: indices of the rows.
        - `new`: number of completion positions to keep, by default all. The completions must end within them.
        """
        prompt_width = self.tokens.shape[1] - self.completion_tokens.shape[1]
        width = self.completion_tokens.shape[1] if new is None else new

        def part(x: Array | np.ndarray | None) -> Array | np.ndarray | None:
            return None if x is None else x[rows, :width]

        return UpdateBatch(
            self.tokens[rows, : prompt_width + width],
            self.prompt_lengths[rows],
            self.completion_tokens[rows, :width],
            self.completion_mask[rows, :width],
            self.old_logprobs[rows, :width],
            self.advantages[rows],
            *_shared_prompts(np.asarray(self.prompt_of_row)[rows], len(self.prompt_rows)),
            part(self.reference_logprobs),
            part(self.sampling_logprobs),
            part(self.importance_weights),
            part(self.entropy_mask),
            None if self.completion_lengths is None else self.completion_lengths[rows],
            jax.tree.map(lambda x: x[rows, :width], self.support),
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
    """Makes the batch for the policy's update of rollouts.

    **Arguments:**

    - `rollouts`: from the decoder.
    - `advantages`: one per row.
    - `mask_truncated_completions`: leave completions that were cut off at the length limit out of the loss (DAPO's
        overlong filtering).
    - `multiple_of`: the width of completions is rounded up to a multiple of this, and to a width of `padded_width`, so
        that few shapes are compiled.
    """
    rows, limit = rollouts.tokens.shape
    new = min(padded_width(-(-int(rollouts.lengths.max()) // multiple_of) * multiple_of), limit)
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
        support=jax.tree.map(lambda x: x[:, :new], rollouts.support),
    )


def padded_width(length: int) -> int:
    """The next width on the ladder on which sequences are padded: 16, 32, multiples of 64, then four widths an
    octave."""
    if length <= 32:
        return 16 if length <= 16 else 32
    step = max(64, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step
