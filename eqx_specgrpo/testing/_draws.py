"""A drafted token is a draw from the distribution that comes with it."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from ._drive import propose, script, start
from ._errors import require
from ._pair import Pair
from ._rewind import capacity_of, padded_prompts
from ._rounds import SMALLEST_P_VALUE
from ._statistics import uniform_p_value


def check_draws(pair: Pair, *, draws: int = 256) -> float:
    """That drafted tokens are draws from the returned distributions, independent between positions and rows.

    **Arguments:**

    - `draws`: proposals to draw; the more, the finer what is noticed.

    **Returns:**

    The least p-value; 1 for point masses.
    """
    draft, target, rows = pair.draft, pair.target, pair.rows
    if draft.max_length == 0:
        return 1.0
    state = start(draft, target, padded_prompts(pair), pair.prompts.lengths, capacity_of(pair))
    rng = np.random.default_rng(2)
    last, uniforms, by_rank = rng.integers(0, target.vocab_size, rows).astype(np.int32), [], []
    for key in jr.split(jr.key(3), draws):
        sampler = eqx.tree_at(
            lambda s: (s.is_scripted, s.keys),
            script(np.zeros((rows, draft.max_length), np.int32)),
            (jnp.array(False), jr.split(key, rows)),
        )
        tokens, logprobs, probs, _ = propose(draft, target, state, last, sampler, draft.max_length)
        tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
        require(
            bool(np.all((tokens >= 0) & (tokens < target.vocab_size))),
            f"{pair.name}: drafted token ids from {tokens.min()} to {tokens.max()}, but the vocabulary has "
            f"{target.vocab_size}",
        )
        require(
            bool(np.all(np.isfinite(logprobs) & (logprobs < 1e-4))),
            f"{pair.name}: a drafted token has log-probability {logprobs.min()} under the distribution returned with "
            "it: return the very distribution that the sampler gave",
        )
        if probs is None:
            return 1.0
        # A token's probability is an interval of the cumulative sum, and a uniform point of it is uniform in the whole.
        # With the tokens in their order random numbers that were used twice show; with the likeliest first, a
        # distribution that is too sharp or too flat.
        probs = np.asarray(probs, np.float64)
        own = np.take_along_axis(probs, tokens[..., None], axis=-1)
        is_before = np.arange(target.vocab_size) < tokens[..., None]
        point = np.exp(logprobs) * rng.uniform(size=tokens.shape)
        for found, comes_first in ((uniforms, is_before), (by_rank, (probs > own) | ((probs == own) & is_before))):
            found.append((np.where(comes_first, probs, 0.0).sum(-1) + point) / probs.sum(-1))
    uniform = np.stack(uniforms)  # [draws, rows, draft]
    p_values = {
        "a token": uniform_p_value(uniform.reshape(-1, 1), 16),
        "a token, by rank": uniform_p_value(np.stack(by_rank).reshape(-1, 1), 16),
    }
    if draft.max_length > 1:
        neighbours = np.stack([uniform[..., :-1], uniform[..., 1:]], axis=-1)
        p_values["two consecutive tokens"] = uniform_p_value(neighbours.reshape(-1, 2), 4)
    if rows > 1:
        neighbours = np.stack([uniform[:, :-1], uniform[:, 1:]], axis=-1)
        p_values["the tokens of two rows"] = uniform_p_value(neighbours.reshape(-1, 2), 4)
    for what, p_value in p_values.items():
        require(
            p_value > SMALLEST_P_VALUE,
            f"{pair.name}: {what}: not drawn as the returned distributions say (p = {p_value:.1e}). Ask the sampler "
            "once for each offset, and return what it gave",
        )
    return min(p_values.values())
