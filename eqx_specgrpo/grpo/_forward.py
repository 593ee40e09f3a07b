"""The policy's forward in its update: each prompt once, and, if asked, inner values computed twice instead of kept."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .._errors import UserError
from ..models import (
    AbstractLanguageModel,
    Features,
    NoCache,
    PrefixPass,
    RopeTable,
    Transformer,
    rope_frequencies,
    rope_table,
    sequence_features,
    take_rows,
)
from ._batch import UpdateBatch
from ._logprobs import next_token_positions


def training_features(
    model: AbstractLanguageModel,
    batch: UpdateBatch,
    *,
    layers: tuple[int, ...] = (),
    gradient_checkpointing: bool = False,
) -> tuple[Float[Array, "rows new hidden"], Features]:
    """Hidden states of a batch's sequences, to be differentiated.

    Where the batch says which prompt each row begins with, a `Transformer` computes every prompt once, and its
    completions attend to the prompt's keys and values: the same function of the weights, with less arithmetic.

    ??? cite

        Chen et al., "Training deep nets with sublinear memory cost",
        [arXiv:1604.06174](https://arxiv.org/abs/1604.06174), section 4.

    **Arguments:**

    - `model`: the policy.
    - `batch`: the sequences.
    - `layers`: of which layers the outputs are wanted.
    - `gradient_checkpointing`: keep each layer's input only; the backward pass computes the rest of it again. For a
        `Transformer`.

    **Returns:**

    The hidden states that predict the completions' tokens, and those of the whole sequences.

    **Raises:**

    `UserError` if `gradient_checkpointing` is asked of a model that is no `Transformer`.
    """
    if not isinstance(model, Transformer):
        if gradient_checkpointing:
            raise UserError(
                f"gradient_checkpointing goes through the layers of a Transformer, but the policy is a "
                f"{type(model).__name__}: set grpo.gradient_checkpointing=false, and "
                "grpo.max_tokens_per_micro_batch if memory is short"
            )
        features = sequence_features(model, jnp.asarray(batch.tokens), layers=layers)
        return _predicting(features, batch), features
    through = _checkpointed if gradient_checkpointing else _unrolled
    if batch.prompts is None or batch.prompt_of_row is None:
        tokens = jnp.asarray(batch.tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=tokens.dtype)[None], tokens.shape)
        features, _ = through(model, (tokens, positions), None, layers)
        return _predicting(features, batch), features
    prompt_of_row = jnp.asarray(batch.prompt_of_row)
    row_lengths = jnp.asarray(batch.prompt_lengths)
    prompts, completions = jnp.asarray(batch.prompts), jnp.asarray(batch.completion_tokens)
    # Of a prompt that no row has (there to make up a round number) the length does not matter.
    lengths = jnp.ones(prompts.shape[0], row_lengths.dtype).at[prompt_of_row].set(row_lengths)
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1], dtype=prompts.dtype)[None], prompts.shape)
    after = row_lengths[:, None] + jnp.arange(completions.shape[1], dtype=prompts.dtype)[None]
    shared = (prompts, positions, lengths, prompt_of_row)
    own, of_prompts = through(model, (completions, after), shared, layers)
    assert of_prompts is not None
    whole = jax.tree.map(lambda p, c: _joined(p[prompt_of_row], c, row_lengths), of_prompts, own)
    first = of_prompts.last[prompt_of_row, row_lengths - 1]
    return jnp.concatenate([first[:, None], own.last[:, :-1]], axis=1), whole


def _predicting(features: Features, batch: UpdateBatch) -> Float[Array, "rows new hidden"]:
    """Of whole sequences, the hidden states that predict the completions' tokens."""
    rows, new = batch.completion_tokens.shape
    within = jnp.minimum(next_token_positions(jnp.asarray(batch.prompt_lengths), new), batch.tokens.shape[1] - 1)
    return features.last[jnp.arange(rows)[:, None], within]


def _joined(
    prompts: Float[Array, "rows prompt hidden"],
    completions: Float[Array, "rows new hidden"],
    prompt_lengths: Int[Array, " rows"],
) -> Float[Array, "rows prompt+new hidden"]:
    """Whole sequences without a gap; what is right of the completions is of no use."""
    (rows, width, _), new = prompts.shape, completions.shape[1]
    place, start = jnp.arange(width + new)[None], prompt_lengths[:, None]
    index = jnp.where(place < start, place, width + jnp.minimum(place - start, new - 1))
    return jnp.concatenate([prompts, completions], axis=1)[jnp.arange(rows)[:, None], index]


_Shared = tuple[Int[Array, "prompts prompt"], Int[Array, "prompts prompt"], Int[Array, " prompts"], Int[Array, " rows"]]
"""Prompts, their positions and lengths, and which of them each row begins with."""


def _unrolled(
    model: Transformer,
    block: tuple[Int[Array, "rows seq"], Int[Array, "rows seq"]],
    shared: _Shared | None,
    layers: tuple[int, ...],
) -> tuple[Features, Features | None]:
    """Features of the rows, and of the prompts that they follow."""
    if shared is None:
        return model.hidden(*block, model.no_cache(), layers=layers)[0], None
    prompts, positions, lengths, prompt_of_row = shared
    of_prompts, cache = model.hidden(prompts, positions, (PrefixPass(lengths),) * len(model.blocks), layers=layers)
    return model.hidden(*block, take_rows(cache, prompt_of_row), layers=layers)[0], of_prompts


def _checkpointed(
    model: Transformer,
    block: tuple[Int[Array, "rows seq"], Int[Array, "rows seq"]],
    shared: _Shared | None,
    layers: tuple[int, ...],
) -> tuple[Features, Features | None]:
    """As `_unrolled`, keeping nothing but each layer's input for the backward pass."""
    config = model.config

    def rope(positions: Int[Array, "batch seq"]) -> RopeTable:
        return rope_table(positions, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))

    # A loop over stacked weights: of unrolled layers XLA's CPU compiler merges the second computation with the first,
    # barriers or not, and nothing is saved. The copy that stacking makes is small beside the arithmetic here.
    arrays, static = zip(*(eqx.partition(block, eqx.is_array) for block in model.blocks), strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)
    (tokens, positions), row_rope = block, rope(block[1])
    prompt_rope = None if shared is None else rope(shared[1])

    @jax.checkpoint
    def through(x: PyTree, weights: PyTree) -> PyTree:
        layer = eqx.combine(weights, static[0])
        own, of_prompts = x
        if shared is None:
            return layer(own, positions, row_rope, NoCache())[0], None
        _, prompt_positions, lengths, prompt_of_row = shared
        of_prompts, cache = layer(of_prompts, prompt_positions, prompt_rope, PrefixPass(lengths))
        return layer(own, positions, row_rope, take_rows((cache,), prompt_of_row)[0])[0], of_prompts

    def body(x: PyTree, weights: PyTree):
        x = through(x, weights)
        return x, x if layers else None

    start = (model.embed(tokens), None if shared is None else model.embed(shared[0]))
    x, outputs = lax.scan(body, start, stacked)

    def features(last, every):
        kept = () if every is None else tuple(every[layer] for layer in layers)
        return Features(last=model.norm(last), layers=kept)

    every = (None, None) if outputs is None else outputs
    return features(x[0], every[0]), None if shared is None else features(x[1], every[1])
