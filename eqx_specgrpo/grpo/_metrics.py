"""Metrics of the policy's loss, kept as sums so that micro-batches can be accumulated."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class PolicyLossMetrics(eqx.Module):
    """Sums over the counted tokens of a micro-batch. Add the sums of all micro-batches, then take `means`.

    **Arguments:**

    - `num_tokens`: number of tokens that count.
    - `weight`: divisor of `sums`: the number of tokens, or of completions if importance sampling is by sequence.
    - `sums`: sums of the loss's own metrics over tokens, by name.
    - `log_ratio_abs_sum`, `log_ratio_abs_max`: of `|logprobs - old_logprobs|` by token. On the first inner step this is
        the gap between decoder and trainer, and nothing but rounding if decoding is lossless.
    - `kl_sum`: sum of the KL estimates, `None` without a reference.
    - `entropy_bonus`: the micro-batch's share of the mean entropy that the bonus is for, `None` without a bonus.
    """

    num_tokens: Float[Array, ""]
    weight: Float[Array, ""]
    sums: dict[str, Float[Array, ""]]
    log_ratio_abs_sum: Float[Array, ""]
    log_ratio_abs_max: Float[Array, ""]
    kl_sum: Float[Array, ""] | None = None
    entropy_bonus: Float[Array, ""] | None = None

    def __add__(self, other: "PolicyLossMetrics") -> "PolicyLossMetrics":
        if jax.tree.structure(self) != jax.tree.structure(other):
            raise ValueError(
                f"the two metrics are of different losses: {jax.tree.structure(self)} and "
                f"{jax.tree.structure(other)}. Give both or neither a KL and an entropy bonus, and the same loss"
            )
        added = jax.tree.map(jnp.add, self, other)
        highest = jnp.maximum(self.log_ratio_abs_max, other.log_ratio_abs_max)
        return eqx.tree_at(lambda metrics: metrics.log_ratio_abs_max, added, highest)

    def means(self) -> dict[str, Float[Array, ""]]:
        """Computes the metrics by name, TRL's where it has one. All are zero if no token counts.

        Those of the loss, `log_ratio/abs_mean`, `log_ratio/abs_max`, and `kl` if there is a reference.
        """
        tokens, weight = jnp.maximum(self.num_tokens, 1.0), jnp.maximum(self.weight, 1.0)
        means = {name: total / weight for name, total in self.sums.items()}
        means["log_ratio/abs_mean"] = self.log_ratio_abs_sum / tokens
        means["log_ratio/abs_max"] = self.log_ratio_abs_max
        if self.kl_sum is not None:
            means["kl"] = self.kl_sum / tokens
        return means
