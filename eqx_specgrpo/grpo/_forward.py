"""The policy's forward in its update: each prompt once, and, if asked, inner values computed twice instead of kept."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int, PyTree

from ..errors import UserError
from ..models import (
    AbstractLanguageModel,
    Features,
    PrefixPass,
    Transformer,
    default_cache_dtype,
    rope_tables,
    sequence_features,
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
    """Computes the hidden states of a batch's sequences, for a loss that is differentiated.

    A `Transformer` computes every prompt once, and the completions attend to its keys and values. This is the same
    function of the weights as for whole sequences, with less arithmetic. Other models get whole sequences.

    ??? cite

        Chen et al., "Training deep nets with sublinear memory cost",
        [arXiv:1604.06174](https://arxiv.org/abs/1604.06174), section 4.

    **Arguments:**

    - `model`: the policy.
    - `batch`: the sequences.
    - `layers`: the layers whose outputs are returned.
    - `gradient_checkpointing`: keep only each layer's input, and compute the rest again in the backward pass. Only for
        a `Transformer`.

    **Returns:**

    The hidden states that predict the completions' tokens, and those of the whole sequences.

    **Raises:**

    `UserError` if `gradient_checkpointing` is set for a model that is not a `Transformer`.
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
    layout = _Layout(batch, default_cache_dtype(model))
    through = _checkpointed if gradient_checkpointing else _unrolled
    prompts, own = through(model, layout, layers)
    lengths, prompt_of_row = jnp.asarray(batch.prompt_lengths), layout.prompt_of_row
    whole = jax.tree.map(lambda p, c: _joined(p[prompt_of_row], c, lengths), prompts, own)
    first = prompts.last[prompt_of_row, lengths - 1]
    return jnp.concatenate([first[:, None], own.last[:, :-1]], axis=1), whole


def _predicting(features: Features, batch: UpdateBatch) -> Float[Array, "rows new hidden"]:
    """Of whole sequences, the hidden states that predict the completions' tokens."""
    rows, new = batch.completion_tokens.shape
    within = jnp.minimum(next_token_positions(jnp.asarray(batch.prompt_lengths), new), batch.tokens.shape[1] - 1)
    return features.last[jnp.arange(rows)[:, None], within]


def _period(blocks: tuple[Callable, ...]) -> int:
    """After how many layers their kinds repeat: 1 if all are alike, 6 where each sixth has no window."""
    kinds = [jax.tree.structure(block) for block in blocks]
    return next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[: len(kinds) - n])


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


class _Layout(eqx.Module):
    """A batch as prompts, each once, and the completions that follow them."""

    prompts: Int[Array, "prompts prompt"]
    prompt_positions: Int[Array, "prompts prompt"]
    prompt_lengths: Int[Array, " prompts"]
    completions: Int[Array, "rows new"]
    positions: Int[Array, "rows new"]
    lengths: Int[Array, " rows"]
    prompt_of_row: Int[Array, " rows"]
    dtype: DTypeLike = eqx.field(static=True)

    def __init__(self, batch: UpdateBatch, dtype: DTypeLike):
        tokens, lengths = jnp.asarray(batch.tokens), jnp.asarray(batch.prompt_lengths)
        new = batch.completion_tokens.shape[1]
        self.prompts = tokens[batch.prompt_rows, : tokens.shape[1] - new]
        self.prompt_positions = jnp.broadcast_to(
            jnp.arange(self.prompts.shape[1], dtype=tokens.dtype)[None], self.prompts.shape
        )
        self.prompt_lengths = lengths[batch.prompt_rows]
        self.completions = jnp.asarray(batch.completion_tokens)
        self.positions = lengths[:, None] + jnp.arange(new, dtype=lengths.dtype)[None]
        self.lengths = jnp.full_like(lengths, new)
        if batch.completion_lengths is not None:
            self.lengths = jnp.asarray(batch.completion_lengths, lengths.dtype)
        self.prompt_of_row = jnp.asarray(batch.prompt_of_row)
        self.dtype = dtype

    def prefix_pass(self) -> PrefixPass:
        return PrefixPass(self.prompt_lengths, self.prompt_of_row, self.lengths, self.dtype)


def _unrolled(model: Transformer, layout: _Layout, layers: tuple[int, ...]) -> tuple[Features, Features]:
    """Features of the prompts, and of the completions."""
    cache = (layout.prefix_pass(),) * len(model.blocks)
    prompts, cache = model.hidden(layout.prompts, layout.prompt_positions, cache, layers=layers)
    return prompts, model.hidden(layout.completions, layout.positions, cache, layers=layers)[0]


def _checkpointed(model: Transformer, layout: _Layout, layers: tuple[int, ...]) -> tuple[Features, Features]:
    """As `_unrolled`, keeping nothing but each layer's input for the backward pass."""
    prompt_ropes, row_ropes = (
        rope_tables(positions, model.config) for positions in (layout.prompt_positions, layout.positions)
    )

    @jax.checkpoint
    def through(x: PyTree, layer: Callable) -> PyTree:
        prompts, own = x
        prompts, cache = layer(prompts, layout.prompt_positions, prompt_ropes, layout.prefix_pass())
        return prompts, layer(own, layout.positions, row_ropes, cache)[0]

    def scan(x: PyTree, blocks: tuple[Callable, ...], period: int) -> PyTree:
        """Through layers, as many at a time as it takes until the first kind of layer comes again."""
        # Over stacked weights: of unrolled layers XLA's CPU compiler merges the second computation with the first,
        # barriers or not, and nothing is saved. The copy that stacking makes is small beside the arithmetic here.
        arrays, static = zip(*(eqx.partition(block, eqx.is_array) for block in blocks), strict=True)
        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays[i::period]) for i in range(period)]

        def body(x: PyTree, weights: list[PyTree]):
            for kind, layer in zip(static, weights, strict=False):
                x = through(x, eqx.combine(layer, kind))
            return x, None

        return lax.scan(body, x, stacked)[0]

    x = model.embed(layout.prompts), model.embed(layout.completions)
    outputs, first = {}, 0
    # One loop ends at each layer that is asked for: a loop gives out what all of its layers say, or the last.
    for end in sorted({*(layer + 1 for layer in layers), len(model.blocks)}):
        blocks = model.blocks[first:end]
        period = _period(blocks)
        whole = len(blocks) // period * period
        for part, size in ((blocks[:whole], period), (blocks[whole:], len(blocks) - whole)):
            x = scan(x, part, size) if part else x
        outputs[end - 1], first = x, end
    prompts, own = (
        Features(last=model.norm(last), layers=tuple(outputs[layer][index] for layer in layers))
        for index, last in enumerate(x)
    )
    return prompts, own
