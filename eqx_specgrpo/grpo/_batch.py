"""From rollouts to the arrays of one policy update."""

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._types import Rollouts, StopReason, Support


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
    - `reference_logprobs`: under the reference, or `None` without one.
    - `sampling_logprobs`: under the sampler, where `old_logprobs` are the trainer's own; else `None`.
    - `importance_weights`: of the old policy over the sampler, or `None` where the two are taken for equal.
    - `entropy_mask`: the tokens that teach the policy, of those that count; `None`: all of them.
    - `completion_lengths`: what is right of them is padding, which attention leaves out; `None` if that is not known.
    - `support`: what truncated sampling kept at each completion token: log-probabilities, of whatever weights, are
        normalised over it. `None`: over the whole vocabulary.
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
        """Which rows move the policy: those with a token that counts and an advantage. The loss of the others is 0
        whatever the weights are, in every `loss_type`, unless they are held to a reference. (Of a model in which rows
        do not see each other.)

        **Arguments:**

        - `with_kl`: whether the loss has a term besides, a KL or an entropy bonus, which every token that counts takes
            part in.
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
        support=jax.tree.map(lambda x: x[:, :new], rollouts.support),
    )


def padded_width(length: int) -> int:
    """The next width on the ladder on which sequences are padded: 16, 32, multiples of 64, then four widths an
    octave."""
    if length <= 32:
        return 16 if length <= 16 else 32
    step = max(64, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step
