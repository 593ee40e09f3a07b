"""Losses of a draft that has fewer tokens than its target."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def target_over_support(
    logits: Float[Array, "*batch vocab"], support: Int[Array, " size"] | None
) -> Float[Array, "*batch entries"]:
    """The target's logits of some tokens, and last a logit that stands for all others.

    So the softmax is the target's own on these tokens, not renormalized, which is what a total variation or an
    acceptance is about.
    """
    if support is None:
        return logits
    others = jnp.ones(logits.shape[-1], bool).at[support].set(False)
    rest = jax.nn.logsumexp(jnp.where(others, logits, -jnp.inf), axis=-1, keepdims=True)
    return jnp.concatenate([logits[..., support], rest], axis=-1)


def draft_over_support(
    logits: Float[Array, "*batch size"], support: Int[Array, " size"] | None
) -> Float[Array, "*batch entries"]:
    """The draft's logits of the same tokens; all others it can't say."""
    if support is None:
        return logits
    return jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, 1)], constant_values=-jnp.inf)
