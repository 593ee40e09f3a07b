"""What the losses of one optimizer step are divided by."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int


def _as_float32(x: Float[ArrayLike, ""] | Int[ArrayLike, ""]) -> Float[Array, ""]:
    # An array, never a Python number: a number would be a compile-time constant, and each step a compilation.
    return jnp.asarray(x, jnp.float32)


class LossNormalizer(eqx.Module):
    """What the losses of one optimizer step are divided by, counted over *all* its micro-batches.

    **Arguments:**

    - `num_tokens`: completion tokens that count. Used by `token_mean`, and by the entropy bonus.
    - `num_rows`: completions, those with an empty mask included, rows that only pad the last micro-batch excluded.
        Used by `sequence_mean`, `sequence_sum` and `constant_mean`.
    - `max_completion_length`: the limit under which the completions were generated. Used by `constant_mean`.
    - `num_micro_batches`: how many micro-batches make up the step. Used by `micro_batch_mean`.
    - `num_entropy_tokens`: tokens whose entropy the bonus raises; `None`: `num_tokens`.
    """

    num_tokens: Float[Array, ""] = eqx.field(converter=_as_float32)
    num_rows: Float[Array, ""] = eqx.field(converter=_as_float32)
    max_completion_length: Float[Array, ""] = eqx.field(converter=_as_float32)
    num_micro_batches: Float[Array, ""] = eqx.field(converter=_as_float32, default=1)
    num_entropy_tokens: Float[Array, ""] | None = eqx.field(
        converter=lambda x: None if x is None else _as_float32(x), default=None
    )

    @staticmethod
    def from_mask(
        completion_mask: Bool[Array | np.ndarray, "rows new"],
        max_completion_length: int | None = None,
        *,
        num_rows: int | None = None,
        num_micro_batches: int = 1,
        entropy_mask: Bool[Array | np.ndarray, "rows new"] | None = None,
    ) -> "LossNormalizer":
        """Counts a whole step's mask. `max_completion_length` defaults to its width, `num_rows` to its height."""
        rows, new = completion_mask.shape
        return LossNormalizer(
            completion_mask.sum(),
            rows if num_rows is None else num_rows,
            new if max_completion_length is None else max_completion_length,
            num_micro_batches,
            None if entropy_mask is None else entropy_mask.sum(),
        )
