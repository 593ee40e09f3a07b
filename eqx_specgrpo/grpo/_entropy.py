"""Entropy in the policy's loss: which tokens teach, and how large the bonus is."""

import abc

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def high_entropy_mask(
    entropies: Float[np.ndarray, "rows new"], completion_mask: Bool[np.ndarray, "rows new"], quantile: float
) -> Bool[np.ndarray, "rows new"]:
    """Selects the share `quantile` of a step's tokens with the highest entropy. It runs on the host.

    ??? cite

        Beyond the 80/20 rule, [arXiv:2506.01939](https://arxiv.org/abs/2506.01939).

    **Arguments:**

    - `entropies`: of the whole step; values where the mask is `False` are ignored.
    - `completion_mask`: `True` where a token counts.
    - `quantile`: 1 keeps all tokens, 0 only those with the very highest entropy.
    """
    if not completion_mask.any():
        return np.zeros_like(completion_mask)
    threshold = np.quantile(entropies[completion_mask], 1 - quantile)
    return completion_mask & (np.where(completion_mask, entropies, -np.inf) >= threshold)


class EntropyState(eqx.Module):
    """The state of an entropy control.

    **Arguments:**

    - `coef`: the present coefficient.
    - `entropy`: entropy at the last optimizer step, in nats per token; infinity before the first step.
    """

    coef: Float[Array, ""]
    entropy: Float[Array, ""]


class AbstractEntropyControl(eqx.Module):
    """An entropy control, which sets the coefficient of the entropy bonus for each optimizer step, on the host."""

    @abc.abstractmethod
    def init(self) -> EntropyState:
        """Returns the state before the first step."""

    @abc.abstractmethod
    def coefficient(self, state: EntropyState) -> Float[Array, ""]:
        """Returns the coefficient of the mean entropy in the loss of the next step."""

    @abc.abstractmethod
    def update(self, state: EntropyState, entropy: Float[Array, ""]) -> EntropyState:
        """Returns the state after a step.

        **Arguments:**

        - `entropy`: mean entropy before the step of the tokens that have the bonus, in nats.
        """


class FixedEntropyCoef(AbstractEntropyControl):
    """An entropy control with a constant coefficient; 0 is no bonus."""

    coef: float

    def init(self) -> EntropyState:
        return EntropyState(jnp.float32(self.coef), jnp.float32(jnp.inf))

    def coefficient(self, state: EntropyState) -> Float[Array, ""]:
        return state.coef

    def update(self, state: EntropyState, entropy: Float[Array, ""]) -> EntropyState:
        return state


class AdaptiveEntropyCoef(AbstractEntropyControl):
    """An entropy control that raises the coefficient by `delta` after each step whose entropy is at or below `target`,
    and lowers it after other steps.

    There is a bonus only if the entropy of the last step was at or below the target. The first step has none.

    ??? cite

        Skywork-OR1, [arXiv:2505.22312](https://arxiv.org/abs/2505.22312); as TRL does it.

    **Arguments:**

    - `coef`: initial coefficient.
    - `target`: target entropy in nats per token.
    - `delta`: change of the coefficient per step.
    - `lowest`, `highest`: bounds of the coefficient.
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
