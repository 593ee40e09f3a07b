"""Lossless verification of one drafted chain. Numbers in, numbers out: only the decoder commits anything."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from ..drafts import AbstractSampler, IndependentSampler, Proposal
from ..sampling import AbstractSampling, Categorical, sample_weights


class Verdict(eqx.Module):
    """The outcome of one row's round: keep so many drafted tokens, then emit this one.

    **Arguments:**

    - `num_accepted`: between 0 and the draft's length.
    - `next_token`: the correction of the first rejected token, or the bonus token if none was rejected.
    """

    num_accepted: Int[Array, ""]
    next_token: Int[Array, ""]


class AbstractVerifier(eqx.Module):
    """A rule that keeps exactly the target's distribution, whatever the draft's.

    A rule says how drafted tokens are drawn, and what becomes of them. It is given a key for each row's whole
    completion and an absolute position, and derives all its random numbers from them: nothing depends on the order of
    rows or on how they are batched.
    """

    @abstractmethod
    def sampler(
        self, sampling: AbstractSampling, keys: Key[Array, " rows"], positions: Int[Array, " rows"]
    ) -> AbstractSampler:
        """What draws the tokens of one round's drafts.

        **Arguments:**

        - `sampling`: temperature and truncation.
        - `keys`: one a row.
        - `positions`: absolute position of each row's first drafted token.
        """

    @abstractmethod
    def verify(self, target: Categorical, proposal: Proposal, key: Key[Array, ""], position: Int[Array, ""]) -> Verdict:
        """Decides how many tokens are kept, and the token after them. For one row; the decoder uses `vmap`.

        **Arguments:**

        - `target`: the target's distributions at the draft's positions and the one after, `draft + 1` in all.
        - `proposal`: the drafted tokens and their distributions.
        - `key`, `position`: the row's, as for `sampler`.
        """


# What a random number is for. The numbers of a round derive from the absolute position of its first new token, which no
# other round of the row shares: no number is used twice, whatever the order of rows, the bucket or the draft length.
_PROPOSE, _VERIFY = 0, 1


def _round_key(key: Key[Array, ""], position: Int[Array, ""], purpose: int) -> Key[Array, ""]:
    return jr.fold_in(jr.fold_in(key, position), purpose)


class AbstractAcceptanceRule(AbstractVerifier):
    """A rule that is given by its law: how likely at least `i` drafted tokens are kept, and what the token after them
    is drawn from.

    Both are methods of their own, so that tests can enumerate the law of the output exactly; `verify` only draws from
    them. Tokens are drafted with random numbers of their own.
    """

    @abstractmethod
    def survival(self, target: Categorical, proposal: Proposal) -> Float[Array, " draft"]:
        """Probability, given the drafted tokens, that at least 1, 2, ... of them are kept. Never increasing.

        For one row.

        **Arguments:**

        - `target`, `proposal`: as for `verify`.
        """

    @abstractmethod
    def next_weights(
        self, target: Categorical, proposal: Proposal, num_accepted: Int[Array, ""]
    ) -> Float[Array, " vocab"]:
        """What the next token is drawn from, given how many drafted tokens were kept; need not be normalized."""

    def sampler(self, sampling, keys, positions) -> AbstractSampler:
        return IndependentSampler(sampling, jax.vmap(lambda k, p: _round_key(k, p, _PROPOSE))(keys, positions))

    def verify(self, target, proposal, key, position) -> Verdict:
        uniform_accept, uniform_next = jr.uniform(_round_key(key, position, _VERIFY), (2,))
        num_accepted = jnp.sum(uniform_accept < self.survival(target, proposal), dtype=jnp.int32)
        next_token = sample_weights(self.next_weights(target, proposal, num_accepted), uniform_next)
        return Verdict(num_accepted, next_token)
