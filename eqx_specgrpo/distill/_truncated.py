"""How often a draft is accepted where tokens are drawn from a part of the vocabulary.

A draft learns the target's whole distribution all the same: the draft's tokens are drawn by the same truncation, so
that one that is equal to the target keeps the same tokens. Had it learned the truncated distribution, a part of that
would be cut off once more.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..sampling import TruncatedSampling
from ._losses import expected_acceptance
from ._support import draft_over_support, target_over_support


def sampled_logits(
    logits: Float[Array, "*batch vocab"], temperature: Float[Array, ""], truncation: TruncatedSampling | None
) -> Float[Array, "*batch vocab"]:
    """Those of the distribution that is drawn from; minus infinity for what a truncation leaves out.

    **Arguments:**

    - `logits`: as they come out of a model or a draft.
    - `temperature`: of sampling, where nothing is truncated.
    - `truncation`: with its own temperature, or `None`.
    """
    if truncation is None:
        return logits / temperature
    return truncation.distribution(logits).dense(logits.shape[-1]).logits


def truncated_acceptance(
    target_logits: Float[Array, "ahead vocab"],
    draft_logits: Float[Array, "positions draft size"],
    truncation: TruncatedSampling,
    support: Int[Array, " size"] | None,
) -> Float[Array, "positions draft"]:
    """`sum min(target, draft)` after truncation, of both.

    **Arguments:**

    - `target_logits`: at the positions and `draft` more; offset `k` of the draft is judged by the one `k + 1` later.
    - `draft_logits`: over the draft's vocabulary.
    - `truncation`: how tokens are drawn, of the draft too.
    - `support`: the draft's vocabulary; `None`: the whole one.
    """
    positions, num_draft, _ = draft_logits.shape
    temperature = truncation.temperature
    ahead = target_over_support(sampled_logits(target_logits, temperature, truncation), support)
    drawn = draft_over_support(sampled_logits(draft_logits, temperature, truncation), support)
    of_offsets = [expected_acceptance(ahead[1 + k : 1 + k + positions], drawn[:, k]) for k in range(num_draft)]
    return jnp.stack(of_offsets, axis=1)
