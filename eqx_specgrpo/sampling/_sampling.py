"""From logits to a distribution over tokens, and from a distribution to a token.

Drafts and verifiers share these, because a lossless rule needs the very distribution that a token was drawn from.
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, Scalar

from ._noise import exponential_noise
from ._temperature import as_temperature, temper
from ._truncation import check_truncation

_BLOCK = 128


class Categorical(eqx.Module):
    """A distribution over the vocabulary at each of several positions: logits and the logarithm of their normalizer.

    Probabilities are formed only for the positions that are asked for.

    **Arguments:**

    - `logits`: after temperature and truncation; `-inf` where the probability is zero.
    - `log_normalizer`: log-sum-exp of the logits; not a finite number where there is no distribution, because a logit
        is not a number or infinitely large, or all of them are minus infinity.
    - `support`: the token ids that the logits belong to, all different, where they are fewer than the vocabulary; every
        other token has probability zero. `None`: the whole vocabulary in order.
    """

    logits: Float[Array, "*batch size"]
    log_normalizer: Float[Array, "*batch"]
    support: Int[Array, "*batch size"] | None = None

    @staticmethod
    def from_logits(logits: Float[Array, "*batch size"]) -> "Categorical":
        return Categorical(logits, jax.nn.logsumexp(logits, axis=-1))

    def __getitem__(self, index) -> "Categorical":
        """The distributions at some positions (leading axes)."""
        return jax.tree.map(lambda x: x[index], self)

    def logprob(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Log-probability of one token a position."""
        if self.support is None:
            return jnp.take_along_axis(self.logits, tokens[..., None], axis=-1)[..., 0] - self.log_normalizer
        return jnp.max(jnp.where(self.support == tokens[..., None], self.logits, -jnp.inf), -1) - self.log_normalizer

    def probs(self, vocab: int | None = None) -> Float[Array, "*batch vocab"]:
        """Probabilities of the whole vocabulary; how many tokens it has is told where there is a `support`."""
        probs = jnp.exp(self.logits - self.log_normalizer[..., None])
        if self.support is None:
            return probs
        if vocab is None:
            raise ValueError("this distribution has a support: give probs(vocab) the size of the whole vocabulary")
        return jnp.put_along_axis(
            jnp.zeros((*probs.shape[:-1], vocab)), self.support, probs, axis=-1, inplace=False, mode="drop"
        )

    def dense(self, vocab: int) -> "Categorical":
        """The same distributions with a logit for every token of the vocabulary: without a `support`.

        **Arguments:**

        - `vocab`: how many tokens it has.
        """
        if self.support is None:
            return self
        nothing = jnp.full((*self.logits.shape[:-1], vocab), -jnp.inf, self.logits.dtype)
        logits = jnp.put_along_axis(nothing, self.support, self.logits, axis=-1, inplace=False, mode="drop")
        return Categorical(logits, self.log_normalizer)

    def sample(self, uniform: Float[Array, "*batch"]) -> Int[Array, "*batch"]:
        """One token a position, by inversion of the cumulative distribution.

        **Arguments:**

        - `uniform`: one number in `[0, 1)` a position.
        """
        return self._token(sample_weights(jnp.exp(self.logits - self.log_normalizer[..., None]), uniform))

    def race(self, keys: Key[Array, "*batch"]) -> Int[Array, "*batch"]:
        """One token a position: the winner of a race between exponential clocks, one a token.

        A token's clock is a function of the position's key and of the token alone, so that two distributions raced
        with the same key mostly agree on the winner where they are alike. The same as adding Gumbel noise to the
        logits and taking the largest (Maddison et al. 2014, section 2), with one logarithm less.

        **Arguments:**

        - `keys`: one a position.
        """
        ids = self.support
        if ids is None:
            ids = jnp.broadcast_to(jnp.arange(self.logits.shape[-1]), self.logits.shape)
        weights = jnp.exp(self.logits - self.log_normalizer[..., None])
        return self._token(first_argmax(weights / exponential_noise(keys, ids)))

    def _token(self, index: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        if self.support is None:
            return index
        return jnp.take_along_axis(self.support, index[..., None], axis=-1)[..., 0]


def first_argmax(values: Float[Array, "*batch size"]) -> Int[Array, "*batch"]:
    """Index of the largest value, the first of equals.

    The largest of every block first, then the place within one block: XLA's own argmax goes through the values one by
    one on CPU, which is ten times slower for a vocabulary of 49,152.
    """
    size = values.shape[-1]
    blocks = _in_blocks(values, -jnp.inf)
    block = jnp.argmax(blocks.max(-1), axis=-1)
    within = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return jnp.minimum(block * _BLOCK + jnp.argmax(within, axis=-1), size - 1)


def _in_blocks(values: Float[Array, "*batch size"], fill: float) -> Float[Array, "*batch blocks block"]:
    size = values.shape[-1]
    padding = [(0, 0)] * (values.ndim - 1) + [(0, -size % _BLOCK)]
    padded = jnp.pad(values, padding, constant_values=fill)
    return padded.reshape(*values.shape[:-1], -(-size // _BLOCK), _BLOCK)


def sample_weights(weights: Float[Array, "*batch vocab"], uniform: Float[Array, "*batch"]) -> Int[Array, "*batch"]:
    """Draws an index with probability proportional to its weight. A zero weight is never drawn.

    Where no weight is positive, or one is not a number, there is nothing to draw from: any index comes out, but one of
    the weights given. It is for the caller to notice.

    One uniform number a draw instead of one Gumbel number a token: with a vocabulary of 49,152 the noise would cost
    more than the product that made the logits. The cumulative sum runs over blocks first and then within one block.

    **Arguments:**

    - `weights`: non-negative, not all zero, not necessarily normalized.
    - `uniform`: in `[0, 1)`.
    """
    blocks = _in_blocks(weights, 0.0)
    block_weights = blocks.sum(-1)
    block_ends = jnp.cumsum(block_weights, axis=-1)
    threshold = uniform * block_ends[..., -1]
    block = _first_beyond(block_weights, block_ends, threshold)
    before = jnp.take_along_axis(block_ends, jnp.maximum(block - 1, 0)[..., None], axis=-1)[..., 0]
    within = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    remainder = threshold - jnp.where(block > 0, before, 0.0)
    index = block * _BLOCK + _first_beyond(within, jnp.cumsum(within, axis=-1), remainder)
    return jnp.minimum(index, weights.shape[-1] - 1)


def _first_beyond(
    weights: Float[Array, "*batch size"], ends: Float[Array, "*batch size"], threshold: Float[Array, "*batch"]
) -> Int[Array, "*batch"]:
    """Index of the first positive weight whose cumulative value is above the threshold; where rounding leaves none, of
    the last positive weight.

    The weights are looked at themselves, because a cumulative sum in parallel rounds differently from place to place:
    it may grow, or shrink, where nothing was added.
    """
    positive = weights > 0
    beyond = positive & (ends > threshold[..., None])
    # Not by a reversed array, which devices that have a part of the vocabulary each would have to exchange.
    last_positive = jnp.max(jnp.where(positive, jnp.arange(ends.shape[-1]), 0), axis=-1)
    return jnp.where(beyond.any(-1), jnp.argmax(beyond, axis=-1), last_positive)


class AbstractSampling(eqx.Module):
    """How the next token is chosen from the logits."""

    @abstractmethod
    def distribution(self, logits: Float[Array, "*batch vocab"]) -> Categorical:
        """The distribution that tokens are drawn from: the law that verification keeps."""

    @abstractmethod
    def logprobs(
        self, logits: Float[Array, "*batch vocab"], distribution: Categorical, tokens: Int[Array, "*batch"]
    ) -> Float[Array, "*batch"]:
        """The log-probabilities to report for emitted tokens."""


class Sampling(AbstractSampling):
    """Temperature, then top-k, then top-p, then min-p (the order of transformers).

    Reported log-probabilities are those of the distribution sampled from.

    **Arguments:**

    - `temperature`: above 0; an array, so that changing it does not recompile. For 0 use `GreedySampling`. One below
        1e-30 is taken as that, and one above 1e30 likewise, see [`eqx_specgrpo.sampling.as_temperature`][].
    - `top_k`: keep the `k` largest logits (and what ties with the last of them), or `None` for all.
    - `top_p`: keep the smallest set of largest probabilities that sums to at least this, or `None` for all
        (Holtzman et al. 2020, nucleus sampling).
    - `min_p`: keep tokens that have at least this share of the likeliest one's probability, or `None` for all
        (Nguyen et al. 2024).
    """

    temperature: Float[Array, ""]
    top_k: int | None = eqx.field(static=True)
    top_p: Float[Array, ""] | None
    min_p: Float[Array, ""] | None

    def __init__(
        self,
        temperature: float | int | Scalar = 1.0,
        top_k: int | None = None,
        top_p: float | int | Scalar | None = None,
        min_p: float | int | Scalar | None = None,
    ):
        check_truncation(top_k, top_p, min_p)
        self.temperature = as_temperature(temperature)
        self.top_k = top_k
        self.top_p = None if top_p is None else jnp.asarray(top_p, jnp.float32)
        self.min_p = None if min_p is None else jnp.asarray(min_p, jnp.float32)

    def distribution(self, logits: Float[Array, "*batch vocab"]) -> Categorical:
        logits = temper(logits, self.temperature)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            smallest_kept = lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits >= smallest_kept, logits, -jnp.inf)
        if self.top_p is not None:
            descending = -jnp.sort(-logits, axis=-1)
            probs = jax.nn.softmax(descending, axis=-1)
            kept = jnp.cumsum(probs, axis=-1) - probs < self.top_p
            smallest_kept = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits >= smallest_kept, logits, -jnp.inf)
        if self.min_p is not None:
            logits = jnp.where(logits >= jnp.log(self.min_p), logits, -jnp.inf)
        # The largest is 0 and stays: it need not be looked for again.
        return Categorical(logits, jnp.log(jnp.sum(jnp.exp(logits), axis=-1)))

    def logprobs(self, logits, distribution, tokens):
        del logits
        return distribution.logprob(tokens)


class GreedySampling(AbstractSampling):
    """Always the most likely token (the first of equals): a distribution with all its mass on one token.

    Reported log-probabilities are those of the untempered softmax, since the point mass's own are all zero.
    """

    def distribution(self, logits: Float[Array, "*batch vocab"]) -> Categorical:
        best = first_argmax(logits)
        point_mass = jnp.where(jax.nn.one_hot(best, logits.shape[-1], dtype=bool), 0.0, -jnp.inf)
        return Categorical(point_mass, jnp.zeros(best.shape))

    def logprobs(self, logits, distribution, tokens):
        del distribution
        return Categorical.from_logits(logits).logprob(tokens)


def make_sampling(
    temperature: float, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> AbstractSampling:
    """`GreedySampling` at temperature 0, `Sampling` above."""
    if temperature == 0:
        return GreedySampling()
    return Sampling(temperature, top_k, top_p, min_p)
