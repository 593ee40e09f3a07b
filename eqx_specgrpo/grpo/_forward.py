"""The policy's forward in its update, as it is or with the layers' inner values computed twice instead of kept."""

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
    Transformer,
    rope_frequencies,
    rope_table,
    sequence_features,
)


def training_features(
    model: AbstractLanguageModel,
    tokens: Int[Array, "rows seq"],
    *,
    layers: tuple[int, ...] = (),
    gradient_checkpointing: bool = False,
) -> Features:
    """Hidden states of whole, right-padded sequences, to be differentiated.

    ??? cite

        Chen et al., "Training deep nets with sublinear memory cost",
        [arXiv:1604.06174](https://arxiv.org/abs/1604.06174), section 4.

    **Arguments:**

    - `model`: the policy.
    - `tokens`: the sequences.
    - `layers`: of which layers the outputs are wanted.
    - `gradient_checkpointing`: keep each layer's input only; the backward pass computes the rest of it again. For a
        `Transformer`.

    **Raises:**

    `UserError` if `gradient_checkpointing` is asked of a model that is no `Transformer`.
    """
    if not gradient_checkpointing:
        return sequence_features(model, tokens, layers=layers)
    if not isinstance(model, Transformer):
        raise UserError(
            f"gradient_checkpointing goes through the layers of a Transformer, but the policy is a "
            f"{type(model).__name__}: set grpo.gradient_checkpointing=false, and "
            "grpo.max_tokens_per_micro_batch if memory is short"
        )
    config = model.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=tokens.dtype)[None], tokens.shape)
    rope = rope_table(positions, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))
    blocks, static = zip(*(eqx.partition(block, eqx.is_array) for block in model.blocks), strict=True)
    # A loop over stacked weights: of unrolled layers XLA's CPU compiler merges the second computation with the first,
    # barriers or not, and nothing is saved. The copy that stacking makes is small beside the arithmetic here.
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)

    @jax.checkpoint
    def through(x: Float[Array, "rows seq hidden"], block: PyTree) -> Float[Array, "rows seq hidden"]:
        return eqx.combine(block, static[0])(x, positions, rope, NoCache())[0]

    def body(x: Float[Array, "rows seq hidden"], block: PyTree):
        x = through(x, block)
        return x, x if layers else None

    x, outputs = lax.scan(body, model.embed(tokens), stacked)
    kept = () if outputs is None else tuple(outputs[layer] for layer in layers)
    return Features(last=model.norm(x), layers=kept)
