"""Entropy in the policy's loss: which tokens teach, and how large the bonus is."""

import abc

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def high_entropy_mask(
    entropies: Float[np.ndarray, "rows new"], completion_mask: Bool[np.ndarray, "rows new"], quantile: float
) -> Bool[np.ndarray, "rows new"]:
    """The counted tokens of a step with the highest entropy, as a share of `quantile`. On the host.

    ??? cite

        Beyond the 80/20 rule, [arXiv:2506.01939](https://arxiv.org/abs/2506.01939).

    **Arguments:**

    - `entropies`: of the whole step; what lies where the mask is `False` may be anything.
    - `completion_mask`: `True` where a token counts.
    - `quantile`: 1 keeps all, 0 those that have the very highest.
    """
    if not completion_mask.any():
        return np.zeros_like(completion_mask)
    threshold = np.quantile(entropies[completion_mask], 1 - quantile)
    return completion_mask & (np.where(completion_mask, entropies, -np.inf) >= threshold)


class EntropyState(eqx.Module):
    """What a controller of the bonus goes on with.

    **Arguments:**

    - `coef`: the coefficient as it stands.
    - `entropy`: at the last optimizer step, nats a token; infinity before the first.
    """

    coef: Float[Array, ""]
    entropy: Float[Array, ""]


class AbstractEntropyControl(eqx.Module):
    """How large the entropy bonus is, from optimizer step to optimizer step. On the host."""

    @abc.abstractmethod
    def init(self) -> EntropyState:
        """Before the first step."""

    @abc.abstractmethod
    def coefficient(self, state: EntropyState) -> Float[Array, ""]:
        """What the mean entropy is multiplied with in the next step's loss."""

    @abc.abstractmethod
    def update(self, state: EntropyState, entropy: Float[Array, ""]) -> EntropyState:
        """After a step.

        **Arguments:**

        - `entropy`: mean over the tokens that the bonus is for, nats, before the step.
        """


class FixedEntropyCoef(AbstractEntropyControl):
    """The same coefficient throughout; 0 is no bonus."""

    coef: float

    def init(self) -> EntropyState:
        return EntropyState(jnp.float32(self.coef), jnp.float32(jnp.inf))

    def coefficient(self, state: EntropyState) -> Float[Array, ""]:
        return state.coef

    def update(self, state: EntropyState, entropy: Float[Array, ""]) -> EntropyState:
        return state


class AdaptiveEntropyCoef(AbstractEntropyControl):
    """Raises the coefficient by `delta` after each step whose entropy is at or below `target`, and lowers it otherwise.

    The bonus itself is there only while the last step's entropy was at or below the target: not in the first step.

    ??? cite

        Skywork-OR1, [arXiv:2505.22312](https://arxiv.org/abs/2505.22312); as TRL does it.

    **Arguments:**

    - `coef`: to begin with.
    - `target`: nats a token.
    - `delta`: a step of the coefficient.
    - `lowest`, `highest`: its bounds.
    """

    coef: float
    target: float = 0.2
    delta: float = 0.005
    lowest: float = 0.0
    highest: float = 1.0

    def init(self) -> EntropyState:
        return EntropyState(jnp.float32(self.coef), jnp.float32(jnp.inf))

    def coefficient(self, state: EntropyState) -> Float[Array, ""]:
        return state.coef if float(state.entropy) <= self.target else jnp.float32(0.0)

    def update(self, state: EntropyState, entropy: Float[Array, ""]) -> EntropyState:
        step = self.delta if float(entropy) <= self.target else -self.delta
        moved = min(max(float(state.coef) + step, self.lowest), self.highest)
        return EntropyState(jnp.float32(moved), jnp.float32(entropy))
