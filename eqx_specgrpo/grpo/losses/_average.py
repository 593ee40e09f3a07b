"""How token losses become one number: each function gives a micro-batch's share, and the shares of a step add up.

All divide by counts of the *whole* optimizer step. So the losses and gradients of micro-batches are added, never
averaged, and their sum equals what one large batch gives (`micro_batch_mean` excepted, by its definition).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._normalizer import LossNormalizer


def token_mean(
    token_losses: Float[Array, "rows new"], completion_mask: Bool[Array, "rows new"], normalizer: LossNormalizer
) -> Float[Array, ""]:
    """Sum over tokens / tokens of the step: every token weighs the same.

    ??? cite

        DAPO, [arXiv:2503.14476](https://arxiv.org/abs/2503.14476), section 3.3.
    """
    return _counted(token_losses, completion_mask).sum() / jnp.maximum(normalizer.num_tokens, 1.0)


def sequence_mean(
    token_losses: Float[Array, "rows new"], completion_mask: Bool[Array, "rows new"], normalizer: LossNormalizer
) -> Float[Array, ""]:
    """Mean over each completion's tokens, sum over completions / completions of the step.

    ??? cite

        DeepSeekMath (GRPO), [arXiv:2402.03300](https://arxiv.org/abs/2402.03300), equation 3.
    """
    lengths = completion_mask.astype(jnp.float32).sum(1)
    sequence_losses = _counted(token_losses, completion_mask).sum(1) / jnp.maximum(lengths, 1.0)
    return sequence_losses.sum() / jnp.maximum(normalizer.num_rows, 1.0)


def sequence_sum(
    token_losses: Float[Array, "rows new"], completion_mask: Bool[Array, "rows new"], normalizer: LossNormalizer
) -> Float[Array, ""]:
    """Sum over tokens / completions of the step: a completion weighs by its length.

    ??? cite

        LUSPO, [arXiv:2602.05261](https://arxiv.org/abs/2602.05261).
    """
    return _counted(token_losses, completion_mask).sum() / jnp.maximum(normalizer.num_rows, 1.0)


def constant_mean(
    token_losses: Float[Array, "rows new"], completion_mask: Bool[Array, "rows new"], normalizer: LossNormalizer
) -> Float[Array, ""]:
    """Sum over tokens / (completions of the step x `max_completion_length`), a constant.

    ??? cite

        Dr. GRPO, [arXiv:2503.20783](https://arxiv.org/abs/2503.20783).
    """
    total = _counted(token_losses, completion_mask).sum()
    return total / jnp.maximum(normalizer.num_rows * normalizer.max_completion_length, 1.0)


def micro_batch_mean(
    token_losses: Float[Array, "rows new"], completion_mask: Bool[Array, "rows new"], normalizer: LossNormalizer
) -> Float[Array, ""]:
    """Mean over the tokens of *this micro-batch* / number of micro-batches.

    The one average that depends on how a step is divided, for a token weighs more in a micro-batch with fewer of them.
    Undivided, it equals `token_mean`.
    """
    total, count = _counted(token_losses, completion_mask).sum(), completion_mask.astype(jnp.float32).sum()
    return total / jnp.maximum(count, 1.0) / normalizer.num_micro_batches


def _counted(
    token_losses: Float[Array, "rows new"], completion_mask: Bool[Array, "rows new"]
) -> Float[Array, "rows new"]:
    # `where` rather than a product: what lies in the padding may be infinite or NaN.
    return jnp.where(completion_mask, token_losses.astype(jnp.float32), 0.0)
