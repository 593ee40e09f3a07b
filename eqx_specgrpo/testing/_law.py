"""The law of what is decoded with a draft, against the target's own, for any vocabulary."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from ..decoding import AbstractVerifier, Block, FixedLength, completion_logits, decode, whole_sequences
from ..models import AbstractLanguageModel
from ..sampling import Sampling
from ._errors import require
from ._pair import Pair
from ._rounds import SMALLEST_P_VALUE
from ._statistics import chi_square_p_value, uniform_p_value

_LOGITS_AT_ONCE = 1 << 24  # what verifying and judging a batch makes
_CELLS = 16


@eqx.filter_jit
def _judge(
    target: AbstractLanguageModel,
    sequences: Int[Array, "rows seq"],
    before: Int[Array, "rows new"],
    tokens: Int[Array, "rows new"],
) -> tuple[Float[Array, "new vocab"], Float[Array, "rows new"], Float[Array, "rows new"], Float[Array, "rows new"]]:
    """What was to be expected of each token, given those before it, from one forward without a cache.

    **Returns:**

    At each place: the sum of the rows' distributions; the probability of the token that came, of those before it in the
    vocabulary, and of those that are likelier.
    """
    probs = jax.nn.softmax(completion_logits(target, sequences, before))
    own = jnp.take_along_axis(probs, tokens[..., None], axis=-1)
    is_earlier = jnp.arange(probs.shape[-1])[None, None] < tokens[..., None]
    earlier = jnp.sum(jnp.where(is_earlier, probs, 0.0), axis=-1)
    likelier = jnp.sum(jnp.where((probs > own) | ((probs == own) & is_earlier), probs, 0.0), axis=-1)
    return probs.sum(0), own[..., 0], earlier, likelier


def check_law(
    pair: Pair,
    *,
    draws: int = 1024,
    verifier: AbstractVerifier | None = None,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> float:
    """That what is decoded with the draft follows the target's own law, through the decoder itself.

    Rows of a few tokens are sampled behind random prompts, where the target is uncertain. Given the tokens before it,
    every token has a distribution that a fresh forward tells: at each place the tokens of all rows are counted against
    the sum of these, and each token's place in the cumulative sum is uniform, whatever the place of the one before. A
    draft fails that reports other distributions than its tokens were drawn from, or distributions that know the tokens
    that come after.

    **Arguments:**

    - `draws`: rows. A bias of 5% in the law of a token takes some thousands to be seen.
    - `verifier`: [`eqx_specgrpo.decoding.Block`][] by default.
    - `seed`: of prompts and sampling.
    - `on_progress`: is told how many rows have been decoded.

    **Returns:**

    The least p-value.

    **Raises:**

    `ConformanceError` if the least p-value is below 1e-5.
    """
    draft, target = pair.draft, pair.target
    new = draft.max_length + 2
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, target.vocab_size, length).tolist() for length in (7, 5)]
    at_once = max(2, min(draws, _LOGITS_AT_ONCE // (new * target.vocab_size)) // 2 * 2)
    counts = expected = np.zeros((new, target.vocab_size))
    in_order, by_rank = [], []
    for key in jr.split(jr.key(seed), -(-draws // at_once)):
        rollouts = decode(
            target,
            prompts,
            draft=draft,
            verifier=Block() if verifier is None else verifier,
            length=FixedLength(draft.max_length),
            sampling=Sampling(1.0),
            key=key,
            max_new_tokens=new,
            samples=at_once // 2,
            smallest_bucket=at_once,
            cache_dtype=jnp.float32,
        )
        judged = _judge(target, *whole_sequences(rollouts), jnp.asarray(rollouts.tokens))
        sums, own, earlier, likelier = (np.asarray(x, np.float64) for x in judged)
        seen = np.zeros_like(sums)
        np.add.at(seen, (np.arange(new)[None], rollouts.tokens), 1)
        counts, expected = counts + seen, expected + sums
        point = own * rng.uniform(size=own.shape)
        in_order.append(earlier + point)
        by_rank.append(likelier + point)
        if on_progress is not None:
            on_progress(min(draws, len(by_rank) * at_once))
    uniform, ranked = np.concatenate(in_order), np.concatenate(by_rank)
    neighbours = np.stack([uniform[:, :-1], uniform[:, 1:]], axis=-1)
    # The sum of unequal laws varies less than one law drawn as often, so that these p-values are rather too large.
    p_values = {
        **{f"token {i}, counted": chi_square_p_value(counts[i], _scaled(expected[i], counts[i])) for i in range(new)},
        **{f"token {i}, by rank": uniform_p_value(ranked[:, i : i + 1], _CELLS) for i in range(new)},
        **{f"tokens {i} and {i + 1}": uniform_p_value(neighbours[:, i], 4) for i in range(new - 1)},
        "all tokens, counted": chi_square_p_value(counts.sum(0), _scaled(expected.sum(0), counts.sum(0))),
        "all tokens, by rank": uniform_p_value(ranked.reshape(-1, 1), _CELLS),
    }
    worst = min(p_values, key=lambda name: p_values[name])
    require(
        p_values[worst] > SMALLEST_P_VALUE,
        f"{pair.name}: what is decoded with it is not the target's law ({worst}: p = {p_values[worst]:.1e}): are its "
        "tokens draws from the very distributions that come with them?",
    )
    return p_values[worst]


def _scaled(expected: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rounding in float32 taken out: both sides have to have one sum."""
    return expected * (counts.sum() / expected.sum())
