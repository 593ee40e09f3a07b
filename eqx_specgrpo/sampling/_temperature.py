"""What a temperature is, and how logits are divided by it."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from ..errors import UserError

# Within them neither a temperature, nor its reciprocal, nor a model's logits over it leave float32. Two logits that
# differ at all, differ by so much more than the lowest that it is greedy, but for exact ties.
_LOWEST, _HIGHEST = 1e-30, 1e30


def as_temperature(temperature: float | int | Scalar) -> Float[Array, ""]:
    """A temperature in float32, no lower than 1e-30 and no higher than 1e30: beyond them nothing changes any more but
    rounding, which would become infinite.

    **Raises:**

    `UserError` for a number that is not above 0, or not finite. (What is traced can't be looked at.)
    """
    if isinstance(temperature, int | float):
        if not temperature > 0:
            raise UserError(f"temperature is {temperature}, but must be above 0; for greedy use GreedySampling()")
        if temperature == math.inf:
            raise UserError("temperature is inf, but must be a finite number; a large one draws uniformly")
        return jnp.asarray(min(max(temperature, _LOWEST), _HIGHEST), jnp.float32)
    return jnp.clip(jnp.asarray(temperature, jnp.float32), _LOWEST, _HIGHEST)


@jax.custom_jvp
def temper(logits: Float[Array, "*batch vocab"], temperature: Float[Array, ""]) -> Float[Array, "*batch vocab"]:
    """`(logits - largest) / temperature`: the softmax is that of `logits / temperature`, and the largest is exactly 0.

    The difference comes first, because the quotients of a low temperature are so large that float32 keeps nothing of
    their differences. What is no distribution, because a logit is not a number or infinitely large, or all are minus
    infinity, has nothing that is a number in the place of the largest.

    Differentiated as `(logits - constant) / temperature`, which is the same for whatever is normalized afterwards.

    **Arguments:**

    - `logits`: minus infinity rules a token out.
    - `temperature`: see [`eqx_specgrpo.sampling.as_temperature`][].
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)
    below = jnp.minimum((logits - largest) / temperature, 0.0)
    # Said, not computed: a compiler may round a logit differently when it is compared and when it is subtracted from,
    # and the smallest difference, over a low temperature, would leave nothing of the whole distribution.
    return jnp.where(logits >= largest, largest - largest, below)


@temper.defjvp
def _temper_jvp(primals, tangents):
    (logits, temperature), (d_logits, d_temperature) = primals, tangents
    tempered = temper(logits, temperature)
    # What is ruled out stays so at any temperature.
    finite = jnp.where(tempered == -jnp.inf, 0.0, tempered)
    return tempered, (d_logits - finite * d_temperature) / temperature
