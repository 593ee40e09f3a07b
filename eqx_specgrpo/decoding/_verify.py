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
    """The outcome of a round for one row: how many drafted tokens are kept, and the token after them.

    **Arguments:**

    - `num_accepted`: between 0 and the draft's length.
    - `next_token`: the correction of the first rejected token, or the bonus token if none was rejected.
    """

    num_accepted: Int[Array, ""]
    next_token: Int[Array, ""]


class AbstractVerifier(eqx.Module):
    """A verifier: a rule under which the output has exactly the target's distribution, whatever the draft guesses.

    A verifier says how drafted tokens are drawn, and how many of them are kept. It derives all its random numbers from
    a key for each row's whole completion and an absolute position, so that nothing depends on the order of rows or on
    how they are batched.
    """

    @abstractmethod
    def sampler(
        self, sampling: AbstractSampling, keys: Key[Array, " rows"], positions: Int[Array, " rows"]
    ) -> AbstractSampler:
        """Makes the sampler that draws the drafted tokens of one round.

        **Arguments:**

        - `sampling`: temperature and truncation.
        - `keys`: one per row.
        - `positions`: absolute position of each row's first drafted token.
        """

    @abstractmethod
    def verify(self, target: Categorical, proposal: Proposal, key: Key[Array, ""], position: Int[Array, ""]) -> Verdict:
        """Decides how many drafted tokens are kept, and draws the token after them. Takes one row; the decoder uses
        `vmap`.

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
    """A verifier that states its law: the probability that at least `i` drafted tokens are kept, and the distribution
    of the token after them.

    Both are deterministic methods, so that tests can enumerate the law of the output exactly. `verify` only draws from
    them. The drafted tokens are drawn with random numbers of their own.
    """

    @abstractmethod
    def survival(self, target: Categorical, proposal: Proposal) -> Float[Array, " draft"]:
        """Computes the probabilities, given the drafted tokens, that at least 1, 2, ... of them are kept. They never
        increase.

        For one row.

        **Arguments:**

        - `target`, `proposal`: as for `verify`.
        """

    @abstractmethod
    def next_weights(
        self, target: Categorical, proposal: Proposal, num_accepted: Int[Array, ""]
    ) -> Float[Array, " vocab"]:
        """Computes the weights from which the next token is drawn, given how many drafted tokens were kept. They need
        not add up to 1."""

    def sampler(self, sampling, keys, positions) -> AbstractSampler:
        return IndependentSampler(sampling, jax.vmap(lambda k, p: _round_key(k, p, _PROPOSE))(keys, positions))

    def verify(self, target, proposal, key, position) -> Verdict:
        uniform_accept, uniform_next = jr.uniform(_round_key(key, position, _VERIFY), (2,))
        num_accepted = jnp.sum(uniform_accept < self.survival(target, proposal), dtype=jnp.int32)
        next_token = sample_weights(self.next_weights(target, proposal, num_accepted), uniform_next)
        return Verdict(num_accepted, next_token)
