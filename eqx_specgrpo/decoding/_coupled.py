import jax
import jax.numpy as jnp
import jax.random as jr

from ..drafts import AbstractSampler, CoupledSampler
from ._verifier_kind import VerifierKind
from ._verify import AbstractVerifier, Verdict


class Coupled(AbstractVerifier):
    """Shared noise (Daliri, Musco and Suresh 2024, "Coupling without communication and drafter-invariant speculative
    decoding", section 4).

    The target draws its token at a position with exponential random numbers, one per token of the vocabulary, that
    depend on the row and the position only: the token with the largest ratio of probability to random number is drawn.
    The draft draws with the same random numbers, and a guess is kept if the target draws the same token. So every token
    is the one that plain decoding would have drawn, with any draft and any length. Only rounding can change a token,
    where two tokens are all but tied.

    A drafted token is kept with probability at least `(1 - TV) / (1 + TV)`, against `1 - TV` for `Rejection`. The
    draft's distribution is not needed, only its tokens.
    """

    def sampler(self, sampling, keys, positions) -> AbstractSampler:
        return CoupledSampler(sampling, keys, positions)

    def verify(self, target, proposal, key, position) -> Verdict:
        length = proposal.tokens.shape[0]
        keys = jax.vmap(jr.fold_in, in_axes=(None, 0))(key, position + jnp.arange(length + 1))
        drawn = target.race(keys)
        kept = jnp.cumprod(drawn[:length] == proposal.tokens)
        num_accepted = kept.sum(dtype=jnp.int32)
        return Verdict(num_accepted, drawn[num_accepted])


VERIFIER = VerifierKind(Coupled(), "by shared noise", draft_invariant=True)
