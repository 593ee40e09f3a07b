import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..drafts import Proposal
from ..sampling import Categorical
from ._verifier_kind import VerifierKind
from ._verify import AbstractAcceptanceRule


class Block(AbstractAcceptanceRule):
    """Block verification (Sun et al. 2024, "Block verification accelerates speculative decoding", algorithm 2).

    The drafted tokens are judged together: a token that is likelier under the target makes up for an earlier one that
    is less likely. On average this keeps at least as many tokens as `Rejection`, and no lossless rule for one chain
    keeps more. For point-mass drafts the two are the same.

    With `P_0 = 1` and `P_i = min(1, P_{i-1} target_i / draft_i)` along the drafted chain, position `i` passes with
    probability `h_i = s_i / (s_i + 1 - P_i)`, where `s_i` is the mass of the positive part of
    `P_i target_{i+1} - draft_{i+1}`, and `h_K = P_K`. What is kept ends at the *last* position that passes.
    """

    def survival(self, target: Categorical, proposal: Proposal) -> Float[Array, " draft"]:
        length = proposal.tokens.shape[0]
        if length == 0:
            return jnp.zeros(0)
        chain = self._chain(target, proposal)
        if length == 1:
            return chain
        draft = None if proposal.distribution is None else proposal.distribution[1:]
        left = jax.vmap(_left_over)(chain[:-1], target[1:length], proposal.tokens[1:], draft)
        denominator = left + 1.0 - chain[:-1]
        # Zero over zero where the distributions agree and the chain is kept for certain: it passes.
        passes = jnp.where(denominator > 0, left / jnp.where(denominator > 0, denominator, 1.0), 1.0)
        passes = jnp.concatenate([passes, chain[-1:]])
        # At least i are kept if any of the positions from i on passes.
        none_from = lax.cumprod(1.0 - passes, reverse=True)
        return 1.0 - none_from

    def next_weights(
        self, target: Categorical, proposal: Proposal, num_accepted: Int[Array, ""]
    ) -> Float[Array, " vocab"]:
        target_probs = target[num_accepted].probs()
        chain = jnp.concatenate([jnp.ones(1), self._chain(target, proposal)])
        draft_probs = proposal.probs_at(num_accepted, target_probs.shape[-1])
        residual = jnp.maximum(chain[num_accepted] * target_probs - draft_probs, 0.0)
        return jnp.where(residual.sum() > 0, residual, target_probs)

    def _chain(self, target: Categorical, proposal: Proposal) -> Float[Array, " draft"]:
        length = proposal.tokens.shape[0]
        ratios = jnp.exp(target[:length].logprob(proposal.tokens) - proposal.token_logprobs())
        kept, chain = jnp.ones(()), []
        for i in range(length):
            kept = jnp.minimum(1.0, kept * ratios[i])
            chain.append(kept)
        return jnp.stack(chain) if chain else jnp.zeros(0)


def _left_over(
    kept: Float[Array, ""], target: Categorical, token: Int[Array, ""], draft: Categorical | None
) -> Float[Array, ""]:
    """The mass of the positive part of `kept * target - draft`, at one position.

    A draft of few tokens is not spread out over the vocabulary: the mass is `kept` less what both have in common, and
    they have nothing in common elsewhere.

    **Arguments:**

    - `kept`: the probability that the chain so far is kept.
    - `token`: the drafted one; the draft is all on it where it is `None`.
    """
    if draft is None:
        return jnp.maximum(kept - kept * jnp.exp(target.logprob(token)), 0.0)
    if draft.support is None:
        return jnp.sum(jnp.maximum(kept * target.probs() - draft.probs(), 0.0))
    # Not `target.logits[draft.support]`, which takes more than twice as long on CPU.
    logits = jnp.take_along_axis(target.logits, draft.support, axis=-1)
    common = jnp.minimum(kept * jnp.exp(logits - target.log_normalizer), jnp.exp(draft.logits - draft.log_normalizer))
    return jnp.maximum(kept - jnp.sum(common), 0.0)


VERIFIER = VerifierKind(Block(), "all together")
