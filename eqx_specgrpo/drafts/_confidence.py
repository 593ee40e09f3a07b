"""How likely a draft's guesses are to be accepted, said before they are drawn."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..models import rms_normalize


class AbstractConfidence(eqx.Module):
    """Says from a draft's hidden states how likely each position's guess is to be accepted, or says nothing."""

    @abstractmethod
    def __call__(self, hidden: Float[Array, "*batch draft hidden"]) -> Float[Array, "*batch draft"] | None:
        """Computes the logit of the probability for each draft position; `None` where nothing is said."""


class NoConfidence(AbstractConfidence):
    """Says nothing, and has nothing to learn."""

    def __call__(self, hidden: Float[Array, "*batch draft hidden"]) -> None:
        del hidden


class ConfidenceHead(AbstractConfidence):
    """A linear function of each head's hidden state. It learns the expected acceptance, `sum min(target, draft)`, and
    its loss reaches nothing but its own weights.

    ??? cite

        DSpark, [arXiv:2607.05147](https://arxiv.org/abs/2607.05147).

    **Arguments:**

    - `num_heads`, `hidden_size`: of the draft.
    """

    weight: Float[Array, "draft hidden"]
    bias: Float[Array, " draft"]

    def __init__(self, num_heads: int, hidden_size: int):
        self.weight = jnp.zeros((num_heads, hidden_size))
        self.bias = jnp.zeros(num_heads)

    def __call__(self, hidden: Float[Array, "*batch draft hidden"]) -> Float[Array, "*batch draft"]:
        length = hidden.shape[-2]
        features = rms_normalize(lax.stop_gradient(hidden).astype(jnp.float32))
        logits = jnp.einsum("...dh,dh->...d", features, self.weight[:length])
        return logits + jnp.broadcast_to(self.bias[:length], logits.shape)
