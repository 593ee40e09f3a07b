"""Metrics of the policy's loss, kept as sums so that micro-batches can be accumulated."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float


class PolicyLossMetrics(eqx.Module):
    """Sums over the counted tokens of a micro-batch. Add those of all micro-batches, then take `means`.

    **Arguments:**

    - `num_tokens`: tokens that count.
    - `clip_count`: what the clip sums are divided by: tokens, or completions if importance sampling is by sequence.
    - `clip_low_sum`, `clip_high_sum`: how many of them have lost their gradient to the lower and upper clip. For
        `cispo` the latter counts capped ratios with a positive advantage.
    - `log_ratio_abs_sum`, `log_ratio_abs_max`: of `|logprobs - old_logprobs|` by token. On the first inner step this is
        the gap between decoder and trainer, and nothing but rounding if decoding is lossless.
    - `kl_sum`: of the k3 estimates, `None` without a reference.
    """

    num_tokens: Float[Array, ""]
    clip_count: Float[Array, ""]
    clip_low_sum: Float[Array, ""]
    clip_high_sum: Float[Array, ""]
    log_ratio_abs_sum: Float[Array, ""]
    log_ratio_abs_max: Float[Array, ""]
    kl_sum: Float[Array, ""] | None

    @staticmethod
    def zeros(with_kl: bool) -> "PolicyLossMetrics":
        """Where an accumulation starts; `with_kl` says whether there is a reference."""
        zero = jnp.zeros((), jnp.float32)
        return PolicyLossMetrics(zero, zero, zero, zero, zero, zero, zero if with_kl else None)

    def __add__(self, other: "PolicyLossMetrics") -> "PolicyLossMetrics":
        if (self.kl_sum is None) != (other.kl_sum is None):
            raise ValueError("one of the two metrics has a KL and the other has none: give both or neither a reference")
        return PolicyLossMetrics(
            self.num_tokens + other.num_tokens,
            self.clip_count + other.clip_count,
            self.clip_low_sum + other.clip_low_sum,
            self.clip_high_sum + other.clip_high_sum,
            self.log_ratio_abs_sum + other.log_ratio_abs_sum,
            jnp.maximum(self.log_ratio_abs_max, other.log_ratio_abs_max),
            None if self.kl_sum is None or other.kl_sum is None else self.kl_sum + other.kl_sum,
        )

    def means(self) -> dict[str, Float[Array, ""]]:
        """The metrics by name: TRL's where it has one. All zero if no token counts.

        `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean` (either), `log_ratio/abs_mean`,
        `log_ratio/abs_max`, and `kl` if there is a reference.
        """
        tokens = jnp.maximum(self.num_tokens, 1.0)
        clips = jnp.maximum(self.clip_count, 1.0)
        means = {
            "clip_ratio/low_mean": self.clip_low_sum / clips,
            "clip_ratio/high_mean": self.clip_high_sum / clips,
            # No token is both: the lower clip needs a negative advantage and the upper one a positive.
            "clip_ratio/region_mean": (self.clip_low_sum + self.clip_high_sum) / clips,
            "log_ratio/abs_mean": self.log_ratio_abs_sum / tokens,
            "log_ratio/abs_max": self.log_ratio_abs_max,
        }
        if self.kl_sum is not None:
            means["kl"] = self.kl_sum / tokens
        return means
