"""How drafted tokens are drawn. The verifier decides, because its rule holds only for tokens drawn its way."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from ..sampling import AbstractSampling, Categorical


class AbstractSampler(eqx.Module):
    """A sampler, which draws a draft's tokens from its logits. A verifier makes one for each round, for `propose`."""

    @abstractmethod
    def __call__(
        self,
        logits: Float[Array, "rows size"],
        offset: Int[Array, ""] | int,
        support: Int[Array, " size"] | None = None,
    ) -> tuple[Int[Array, " rows"], Categorical]:
        """One token a row, and the distribution that it was drawn from.

        **Arguments:**

        - `logits`: the draft's.
        - `offset`: the draft position, counted from 0. Each is to be asked for once.
        - `support`: the token ids of the logits, where they are fewer than the vocabulary.
        """

    def chain(
        self, logits: Float[Array, "rows draft size"], support: Int[Array, " size"] | None = None
    ) -> tuple[Int[Array, "rows draft"], Categorical]:
        """Draws all positions at once, for drafts whose logits do not depend on the tokens drawn."""

        def one(logits, offset):
            return self(logits, offset, support)

        return jax.vmap(one, in_axes=(1, 0), out_axes=1)(logits, jnp.arange(logits.shape[1]))


class IndependentSampler(AbstractSampler):
    """A sampler with random numbers of its own.

    **Arguments:**

    - `sampling`: temperature and truncation.
    - `keys`: one per row, for this round only.
    """

    sampling: AbstractSampling
    keys: Key[Array, " rows"]

    def __call__(self, logits, offset, support=None):
        distribution = with_support(self.sampling.distribution(logits), support)
        uniform = jax.vmap(lambda key: jr.uniform(jr.fold_in(key, offset)))(self.keys)
        return distribution.sample(uniform).astype(jnp.int32), distribution


class CoupledSampler(AbstractSampler):
    """A sampler with the same random numbers as the target's own token at each position.

    **Arguments:**

    - `sampling`: temperature and truncation.
    - `keys`: one per row, for a whole completion.
    - `positions`: absolute position of each row's first drafted token.
    """

    sampling: AbstractSampling
    keys: Key[Array, " rows"]
    positions: Int[Array, " rows"]

    def __call__(self, logits, offset, support=None):
        distribution = with_support(self.sampling.distribution(logits), support)
        keys = jax.vmap(jr.fold_in)(self.keys, self.positions + offset)
        return distribution.race(keys).astype(jnp.int32), distribution


def with_support(distribution: Categorical, support: Int[Array, " size"] | None) -> Categorical:
    """The distribution over some token ids; they are repeated for every row, so that rows can be taken apart."""
    if support is None:
        return distribution
    if distribution.support is not None:  # what truncation kept, as places among the ids
        return Categorical(distribution.logits, distribution.log_normalizer, support[distribution.support])
    support = jnp.broadcast_to(support, distribution.logits.shape)
    return Categorical(distribution.logits, distribution.log_normalizer, support)
