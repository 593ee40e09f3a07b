"""Log-probabilities of tokens from hidden states, without the logits of all positions at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from .._types import Support
from ..sampling import restricted, temper


def next_token_positions(prompt_lengths: Int[Array, " rows"], new: int) -> Int[Array, "rows new"]:
    """Returns the positions of the hidden states that predict the completion tokens.

    The hidden state at position `i` predicts the token at `i + 1`. A row's sequence is its prompt followed by its
    completion, without a gap; so completion token `j`, at position `prompt_length + j`, is predicted at
    `prompt_length - 1 + j`, and the first one by the last token of the prompt.

    **Arguments:**

    - `prompt_lengths`: number of prompt tokens of each row, at least 1.
    - `new`: number of completion positions, padding included.

    **Returns:**

    Indices along the sequence axis. Those of padding may exceed what has been computed: with a sequence axis of
    at least `max(prompt_lengths) + new - 1` positions none does.
    """
    return prompt_lengths[:, None] - 1 + jnp.arange(new, dtype=prompt_lengths.dtype)[None, :]


def chunked_logprobs(
    hidden: Float[Array, "positions hidden"],
    tokens: Int[Array, " positions"],
    unembed: Callable[[Float[Array, "chunk hidden"]], Float[Array, "chunk vocab"]],
    temperature: Float[ArrayLike, ""],
    chunk: int,
    *,
    differentiable_entropy: bool = False,
    count: Int[ArrayLike, ""] | None = None,
    support: Support | None = None,
) -> tuple[Float[Array, " positions"], Float[Array, " positions"]]:
    """Computes the log-probability of a token, and the entropy, at each position, `chunk` positions at a time.

    No `[positions, vocab]` array exists in the forward or the backward pass: the backward pass computes each chunk's
    logits again.

    **Arguments:**

    - `hidden`: what `unembed` takes. Padding must hold finite numbers, as it does when it comes out of a model.
    - `tokens`: the token whose log-probability is wanted, at each position.
    - `unembed`: from hidden states to logits. What it closes over is differentiated as usual. It runs once a chunk
        (twice with gradients): cast weights before, not in it.
    - `temperature`: the logits are divided by it; may be traced. Positive: use 1 for a policy that decodes greedily.
    - `chunk`: number of positions at a time; static. A last chunk that is not full is padded.
    - `differentiable_entropy`: whether gradients flow through the entropy. They cost time even where nobody needs them,
        so by default the entropy is only a metric.
    - `count`: how many positions, from the first on, are wanted; may be traced. Chunks without one cost nothing, and
        what is returned for them is 0. `None`: all.
    - `support`: the tokens to normalise over, at each position: those that truncated sampling kept. All others have no
        probability, whatever their logits are. `None`: the whole vocabulary. Where its count is 0 what is returned
        means nothing.

    **Returns:**

    Log-probabilities and entropies (nats) of `softmax(logits / temperature)`, float32; minus infinity for a token
    outside of its `support`.

    **Raises:**

    `ValueError` if `chunk` is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: it is a number of positions, and must be at least 1")
    positions, size = hidden.shape
    if positions == 0:
        return jnp.zeros((0,), jnp.float32), jnp.zeros((0,), jnp.float32)
    chunk = min(chunk, positions)
    num_chunks = -(-positions // chunk)
    padding = num_chunks * chunk - positions
    temperature = jnp.asarray(temperature, jnp.float32)

    def one_chunk(
        hidden: Float[Array, "chunk hidden"], tokens: Int[Array, " chunk"], kept: Support | None
    ) -> tuple[Float[Array, " chunk"], Float[Array, " chunk"]]:
        logits = unembed(hidden).astype(jnp.float32)
        # The largest of the kept is what the others are compared with: after an update it need not be the largest.
        logits = temper(logits if kept is None else restricted(logits, kept.ids, kept.counts), temperature)
        normalizers = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
        if kept is None:
            logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - normalizers
        else:
            logprobs = _logits_of(tokens, logits, kept) - normalizers
        if not differentiable_entropy:
            logits, normalizers = lax.stop_gradient((logits, normalizers))
        log_distribution = logits - normalizers[:, None]
        # A token that a mask has ruled out contributes 0, not 0 times infinity.
        finite = jnp.where(log_distribution == -jnp.inf, 0.0, log_distribution)
        return logprobs, -jnp.sum(jnp.exp(log_distribution) * finite, axis=-1)

    hidden_chunks = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(num_chunks, chunk, size)
    token_chunks = jnp.pad(tokens, (0, padding)).reshape(num_chunks, chunk)
    support_chunks = jax.tree.map(
        lambda x: jnp.pad(x, [(0, padding), *[(0, 0)] * (x.ndim - 1)]).reshape(num_chunks, chunk, *x.shape[1:]), support
    )

    # The branch is inside of what is computed again: outside, the weights would be kept once for every chunk.
    @jax.checkpoint
    def wanted_chunk(start: Int[Array, ""], *chunk_of: PyTree) -> tuple[Float[Array, " chunk"], Float[Array, " chunk"]]:
        if count is None:
            return one_chunk(*chunk_of)
        zeros = jnp.zeros(chunk, jnp.float32)
        return lax.cond(start < count, one_chunk, lambda *_: (zeros, zeros), *chunk_of)

    starts = jnp.arange(num_chunks) * chunk
    _, (logprobs, entropies) = lax.scan(
        lambda _, x: (None, wanted_chunk(*x)), None, (starts, hidden_chunks, token_chunks, support_chunks)
    )
    return logprobs.reshape(-1)[:positions], entropies.reshape(-1)[:positions]


def _logits_of(
    tokens: Int[Array, " chunk"], logits: Float[Array, "chunk kept"], kept: Support
) -> Float[Array, " chunk"]:
    """The tokens' own among the kept ones' logits; minus infinity for a token that is not kept."""
    is_token = (kept.ids == tokens[:, None]) & (jnp.arange(kept.ids.shape[-1])[None] < kept.counts[:, None])
    found = jnp.sum(jnp.where(is_token, logits, 0.0), axis=-1)
    return jnp.where(is_token.any(-1) | (kept.counts == 0), found, -jnp.inf)
