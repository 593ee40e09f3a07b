import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..drafts import Proposal
from ..sampling import Categorical, first_argmax
from ._verifier_kind import VerifierKind
from ._verify import AbstractAcceptanceRule


class GreedyMatch(AbstractAcceptanceRule):
    """Keeps drafted tokens as long as they are the target's most likely ones. It is lossless with `GreedySampling`
    only.

    It gives the same tokens as `Rejection` for a point-mass target, without a division or a random number.
    """

    def survival(self, target: Categorical, proposal: Proposal) -> Float[Array, " draft"]:
        length = proposal.tokens.shape[0]
        matches = first_argmax(target.logits[:length]) == proposal.tokens
        return jnp.cumprod(matches).astype(jnp.float32)

    def next_weights(
        self, target: Categorical, proposal: Proposal, num_accepted: Int[Array, ""]
    ) -> Float[Array, " vocab"]:
        del proposal
        logits = target.logits[num_accepted]
        return jax.nn.one_hot(first_argmax(logits), logits.shape[-1])


VERIFIER = VerifierKind(GreedyMatch(), "the likeliest tokens only", greedy_only=True)
