import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..drafts import Proposal
from ..sampling import Categorical
from ._verifier_kind import VerifierKind
from ._verify import AbstractAcceptanceRule


class Rejection(AbstractAcceptanceRule):
    """Token-wise rejection sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023).

    A drafted token is kept with probability `min(1, target / draft)`; the first one that is not is replaced by a draw
    from the positive part of `target - draft`.
    """

    def survival(self, target: Categorical, proposal: Proposal) -> Float[Array, " draft"]:
        length = proposal.tokens.shape[0]
        log_ratio = target[:length].logprob(proposal.tokens) - proposal.token_logprobs()
        return jnp.exp(jnp.cumsum(jnp.minimum(log_ratio, 0.0)))

    def next_weights(
        self, target: Categorical, proposal: Proposal, num_accepted: Int[Array, ""]
    ) -> Float[Array, " vocab"]:
        target_probs = target[num_accepted].probs()
        residual = jnp.maximum(target_probs - proposal.probs_at(num_accepted, target_probs.shape[-1]), 0.0)
        # Where the distributions agree to rounding nothing is left over, and a rejection has no probability either.
        return jnp.where(residual.sum() > 0, residual, target_probs)


VERIFIER = VerifierKind(Rejection(), "token by token")
