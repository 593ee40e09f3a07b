"""Truncated sampling whose kept tokens are known: few enough that they can be written down with each token drawn."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Scalar

from ..errors import UserError
from ._sampling import AbstractSampling, Categorical
from ._temperature import as_temperature, temper
from ._truncation import check_truncation


class TruncatedSampling(AbstractSampling):
    """Temperature, then top-k, then top-p, then min-p (the order of transformers), and of what they keep the
    `max_support` likeliest at most.

    The bound is part of the truncation: what is drawn from, what is reported as the distribution's `support`, and what
    log-probabilities are normalised over is one and the same set, whether the bound acts or not. Of equal logits at an
    edge those of the smaller ids are kept, so that a set never exceeds its bound (`Sampling` keeps all of them).

    The nucleus of `top_p` is that of the whole distribution, or of the `top_k` likeliest where that is given.

    ??? cite

        Nucleus: Holtzman et al. 2020, [arXiv:1904.09751](https://arxiv.org/abs/1904.09751). min-p: Nguyen et al. 2024,
        [arXiv:2407.01082](https://arxiv.org/abs/2407.01082).

    **Arguments:**

    - `temperature`: above 0; an array, so that changing it does not recompile.
    - `max_support`: the most tokens that are kept at a position; static.
    - `top_k`: keep the `k` likeliest, at most `max_support`; static. `None`: no such bound.
    - `top_p`: keep the smallest set of likeliest tokens whose probabilities sum to at least this. `None`: all.
    - `min_p`: keep tokens that have at least this share of the likeliest one's probability. `None`: all.
    """

    temperature: Float[Array, ""]
    max_support: int = eqx.field(static=True)
    top_k: int | None = eqx.field(static=True)
    top_p: Float[Array, ""] | None
    min_p: Float[Array, ""] | None

    def __init__(
        self,
        temperature: float | int | Scalar = 1.0,
        *,
        max_support: int,
        top_k: int | None = None,
        top_p: float | int | Scalar | None = None,
        min_p: float | int | Scalar | None = None,
    ):
        check_truncation(top_k, top_p, min_p)
        if max_support < 1:
            raise UserError(f"max_support is {max_support}, but at least 1 token has to be kept")
        if top_k is not None and top_k > max_support:
            raise UserError(
                f"top_k is {top_k}, but at most {max_support} tokens are kept (max_support): give a larger "
                "max_support, or a smaller top_k"
            )
        self.temperature = as_temperature(temperature)
        self.max_support = max_support
        self.top_k = top_k
        self.top_p = None if top_p is None else jnp.asarray(top_p, jnp.float32)
        self.min_p = None if min_p is None else jnp.asarray(min_p, jnp.float32)

    def distribution(self, logits: Float[Array, "*batch vocab"]) -> Categorical:
        logits = temper(logits, self.temperature)
        most = self.max_support if self.top_k is None else self.top_k
        values, ids = likeliest(logits, min(most, logits.shape[-1]))
        kept = values > -jnp.inf  # False also for what is not a number
        if self.top_p is not None:
            candidates = logits if self.top_k is None else values
            probs = jnp.exp(values) / jnp.sum(jnp.exp(candidates), axis=-1, keepdims=True)
            kept &= jnp.cumsum(probs, axis=-1) - probs < self.top_p
        if self.min_p is not None:
            kept &= values >= jnp.log(self.min_p)  # the largest is 0
        values = jnp.where(kept, values, -jnp.inf)
        return Categorical(values, jnp.log(jnp.sum(jnp.exp(values), axis=-1)), ids)

    def logprobs(self, logits, distribution, tokens):
        del logits
        return distribution.logprob(tokens)


def likeliest(
    logits: Float[Array, "*batch vocab"], count: int
) -> tuple[Float[Array, "*batch count"], Int[Array, "*batch count"]]:
    """The largest logits and their ids, largest first; of equals the smaller id first."""
    # In two axes: XLA has a partial sort for these on CPU, and sorts everything else as a whole.
    values, ids = lax.top_k(logits.reshape(-1, logits.shape[-1]), count)
    shape = (*logits.shape[:-1], count)
    return values.reshape(shape), ids.astype(jnp.int32).reshape(shape)


def restricted(
    logits: Float[Array, "*batch vocab"],
    ids: Int[Array | np.ndarray, "*batch kept"],
    counts: Int[Array | np.ndarray, "*batch"],
) -> Float[Array, "*batch kept"]:
    """The logits of a position's kept tokens, `-inf` beyond their number. Where none is kept the first counts, so that
    padding has finite numbers.

    **Arguments:**

    - `ids`: what was kept, and beyond `counts` any ids of the vocabulary.
    - `counts`: how many of them count.
    """
    place = jnp.broadcast_to(jnp.arange(ids.shape[-1]), ids.shape)
    return jnp.where(
        place < jnp.maximum(counts, 1)[..., None], jnp.take_along_axis(logits, jnp.asarray(ids), axis=-1), -jnp.inf
    )
