"""The interface of the policy's losses."""

import abc
from typing import Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from equinox import AbstractClassVar
from jaxtyping import Array, Bool, Float

from ._normalizer import LossNormalizer

Level = Literal["token", "sequence"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# exp(20) is 5e8: beyond any ratio that training survives, and far from float32's overflow, whose gradient is NaN even
# in the branch that the clip does not take.
MAX_LOG_RATIO = 20.0


def ratio_of(log_ratio: Float[Array, "rows new"]) -> Float[Array, "rows new"]:
    """`exp`, without overflow."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


class LossTraits(NamedTuple):
    """What a loss is made for; configurations that contradict it are refused.

    **Arguments:**

    - `levels`: the values of `importance_sampling_level` under which it is what its name says.
    - `correction_modes`: the values of `importance_sampling_mode` that it can be corrected by.
    - `corrects_itself`: it takes the correction's weights into its own; they are not multiplied with it.
    - `depends_on_micro_batches`: its value depends on which rows are together.
    """

    levels: tuple[Level, ...] = ("token", "sequence")
    correction_modes: tuple[CorrectionMode, ...] = (
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
    )
    corrects_itself: bool = False
    depends_on_micro_batches: bool = False


class TokenInputs(eqx.Module):
    """What token losses are computed from. Float32, and 0 (a ratio: 1) where `mask` is `False`.

    **Arguments:**

    - `logprobs`: under the policy being trained.
    - `old_logprobs`: under the one that the ratio compares it with; a constant.
    - `log_ratio`: `logprobs - old_logprobs`, or, at the level of sequences, its mean over the row.
    - `advantages`: a constant.
    - `mask`: `True` where a token counts.
    - `importance_weights`: old policy over sampler, truncated or masked; constants, or `None` where the two are taken
        for equal.
    """

    logprobs: Float[Array, "rows new"]
    old_logprobs: Float[Array, "rows new"]
    log_ratio: Float[Array, "rows new"]
    advantages: Float[Array, "rows new"]
    mask: Bool[Array, "rows new"]
    importance_weights: Float[Array, "rows new"] | None = None

    @property
    def ratio(self) -> Float[Array, "rows new"]:
        """Policy over old policy."""
        return ratio_of(self.log_ratio)


class TokenLosses(NamedTuple):
    """What a loss says of each token.

    **Arguments:**

    - `losses`: to be averaged and minimised; finite wherever the inputs are.
    - `metrics`: by name, what is averaged over the tokens that count (over completions, at the level of sequences):
        the share of clipped tokens, for instance.
    """

    losses: Float[Array, "rows new"]
    metrics: dict[str, Bool[Array, "rows new"] | Float[Array, "rows new"]]


class AbstractPolicyLoss(eqx.Module):
    """What the policy minimises, without the terms that any loss may have beside it (KL, entropy).

    A subclass is one file in `grpo/losses/`, named in `POLICY_LOSSES`. Its fields are its options, each made by
    [`eqx_specgrpo.grpo.losses.option`][].
    """

    traits: AbstractClassVar[LossTraits]

    @abc.abstractmethod
    def token_losses(self, tokens: TokenInputs) -> TokenLosses:
        """The loss of each token. What is said where the mask is `False` is ignored."""

    @abc.abstractmethod
    def average(
        self,
        token_losses: Float[Array, "rows new"],
        completion_mask: Bool[Array, "rows new"],
        normalizer: LossNormalizer,
    ) -> Float[Array, ""]:
        """This micro-batch's share of the step's loss; the shares of all micro-batches add up to it."""
