"""What is recorded of truncated sampling, beside a fresh forward."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from .._types import Prompts, Support
from ..decoding import Block, DecodeProgress, FixedLength, completion_logits, decode, whole_sequences
from ..drafts import AbstractDraft
from ..models import AbstractLanguageModel
from ..sampling import TruncatedSampling, restricted
from ._errors import require


class TruncationReport(eqx.Module):
    """What was found of tokens drawn from a nucleus.

    **Arguments:**

    - `tokens`: how many.
    - `kept_mean`: tokens kept at each of them, on average.
    - `kept_max`: the most.
    - `edge`: how far a recorded set is from being the nucleus of a fresh forward, at most: in probability, of what it
        lacks or has too much, or in logits, by which a token left out is above one that is kept.
    - `logprob_gap`: between a reported log-probability and that of a fresh forward, normalised over the recorded set.
    """

    tokens: int
    kept_mean: float
    kept_max: int
    edge: float
    logprob_gap: float

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.tokens} tokens, each of {self.kept_mean:.1f} kept ({self.kept_max} at most): the recorded sets are "
            f"a fresh forward's but for {self.edge:.1e}, and log-probabilities over them but for {self.logprob_gap:.1e}"
        )


def check_truncation(
    draft: AbstractDraft,
    target: AbstractLanguageModel,
    prompts: Prompts | Sequence[Sequence[int]],
    *,
    key: Key[Array, ""],
    max_new_tokens: int,
    length: int = 3,
    top_p: float = 0.9,
    max_support: int = 64,
    near_tie: float = 1e-3,
    logprob_tolerance: float = 1e-3,
    on_progress: Callable[[DecodeProgress], None] | None = None,
) -> TruncationReport:
    """Decodes by nucleus sampling with the draft, and looks whether each token was drawn from the set that is recorded
    with it, and whether that is the nucleus.

    **Arguments:**

    - `draft`, `target`: the pair.
    - `prompts`, `key`, `max_new_tokens`, `on_progress`: see [`eqx_specgrpo.decoding.decode`][].
    - `length`: tokens drafted a round.
    - `top_p`, `max_support`: of the truncation.
    - `near_tie`: what rounding may do to a set's edge.
    - `logprob_tolerance`: of reported log-probabilities.

    **Raises:**

    `ConformanceError` if something is off by more.
    """
    sampling = TruncatedSampling(1.0, max_support=max_support, top_p=top_p)
    prompts = prompts if isinstance(prompts, Prompts) else Prompts.from_lists(prompts)
    rollouts = decode(
        target,
        prompts,
        draft=draft,
        verifier=Block(),
        length=FixedLength(length),
        sampling=sampling,
        key=key,
        max_new_tokens=max_new_tokens,
        smallest_bucket=len(prompts.lengths),  # no shrinking: every bucket is another program to compile
        cache_dtype=jnp.float32,
        on_progress=on_progress,
    )
    assert rollouts.support is not None
    sequences, before = whole_sequences(rollouts)
    support = jax.tree.map(jnp.asarray, rollouts.support)
    found = _edges(target, sequences, before, jnp.asarray(rollouts.tokens), support, top_p, max_support)
    is_token = np.arange(max_new_tokens)[None] < rollouts.lengths[:, None]
    edges, logprobs = (np.asarray(x)[is_token] for x in found)
    counts = np.asarray(rollouts.support.counts)[is_token]
    require(bool((counts > 0).all()), "a token was drawn, but no set is recorded that it was drawn from")
    require(
        bool(np.isfinite(logprobs).all()),
        "a token was drawn that is not in the set recorded with it: the two belong to different positions",
    )
    gap = float(np.abs(logprobs - rollouts.logprobs[is_token]).max())
    report = TruncationReport(int(is_token.sum()), float(counts.mean()), int(counts.max()), float(edges.max()), gap)
    require(
        report.edge <= near_tie,
        f"the tokens recorded as kept are not those that top_p = {top_p} keeps in a fresh forward, which is off by "
        f"{report.edge:.1e} (allowed are {near_tie:.0e})",
    )
    require(
        report.logprob_gap <= logprob_tolerance,
        f"a log-probability is off by {report.logprob_gap:.1e} from that of a fresh forward over the kept tokens "
        f"(allowed are {logprob_tolerance:.0e})",
    )
    return report


@eqx.filter_jit
def _edges(
    target: AbstractLanguageModel,
    sequences: Int[Array, "rows seq"],
    before: Int[Array, "rows new"],
    tokens: Int[Array, "rows new"],
    support: Support,
    top_p: float,
    max_support: int,
) -> tuple[Float[Array, "rows new"], Float[Array, "rows new"]]:
    """By how much each recorded set is off, and the log-probabilities of the tokens, normalised over it."""
    logits = jax.nn.log_softmax(completion_logits(target, sequences, before))
    kept = restricted(logits, support.ids, support.counts)
    is_there = kept > -jnp.inf
    least = jnp.min(jnp.where(is_there, kept, jnp.inf), axis=-1)
    is_kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), support.ids, is_there, axis=-1, inplace=False)
    best_outside = jnp.max(jnp.where(is_kept, -jnp.inf, logits), axis=-1)
    mass = jnp.sum(jnp.exp(kept), axis=-1)
    too_much = mass - jnp.exp(least) - top_p  # without its last it would still be enough
    lacks = jnp.where(support.counts < max_support, top_p - mass, -jnp.inf)
    edge = jnp.maximum(jnp.maximum(too_much, lacks), best_outside - least)
    is_token = (support.ids == tokens[..., None]) & is_there
    logprobs = jnp.max(jnp.where(is_token, kept, -jnp.inf), axis=-1) - jnp.log(mass)
    return jnp.maximum(edge, 0.0), logprobs
