"""The one decoder layer of an EAGLE-style draft, a position at a time and unrolled on its own outputs."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..models import (
    Block,
    Features,
    KVCache,
    Linear,
    RopeTable,
    TransformerConfig,
    attend_with_normalizers,
    rms_normalize,
    rope_tables,
)

KeysAndValues = tuple[Float[Array, "rows kv_heads seq head_dim"], Float[Array, "rows kv_heads seq head_dim"]]


class EagleLayer(eqx.Module):
    """The trained part of [`eqx_specgrpo.drafts.EagleDraft`][]: what it computes, knowing nothing of rounds.

    Everything that enters a product is brought to unit root mean square: embeddings are often a hundred times smaller
    than hidden states, and the layers of a model differ as much.
    """

    fuse: Linear
    enter: Linear
    block: Block
    leave: Linear

    def __init__(self, config: TransformerConfig, target_size: int, num_features: int, *, key: PRNGKeyArray):
        fuse_key, enter_key, block_key, leave_key = jr.split(key, 4)
        width = config.hidden_size
        self.fuse = Linear(num_features * target_size, width, use_bias=False, key=fuse_key)
        self.enter = Linear(width + target_size, width, use_bias=False, key=enter_key)
        self.block = Block(config, key=block_key)
        leave = Linear(width, target_size, use_bias=False, key=leave_key)
        self.leave = eqx.tree_at(lambda linear: linear.weight, leave, jnp.zeros((target_size, width)))

    @jax.named_scope("EagleLayer.fused")
    def fused(self, features: Features) -> Float[Array, "rows seq width"]:
        """The target's features of each position in one vector (Li et al. 2025, EAGLE-3, section 3.1)."""
        return self.fuse(jnp.concatenate([rms_normalize(x) for x in (*features.layers, features.last)], axis=-1))

    def absorb(
        self,
        cache: KVCache,
        states: Float[Array, "rows block width"],
        embeddings: Float[Array, "rows block hidden"],
        start: Int[Array, " rows"],
    ) -> KVCache:
        """Writes the keys and values of positions whose outputs nobody needs: of one layer, they need no attention."""
        positions = start[:, None] + jnp.arange(states.shape[1], dtype=start.dtype)[None]
        _, keys, values = self._project(self._inputs(states, embeddings), positions)
        return cache.write(keys, values, positions)

    def step(
        self,
        cache: KVCache,
        state: Float[Array, "rows width"],
        embedding: Float[Array, "rows hidden"],
        position: Int[Array, " rows"],
    ) -> tuple[Float[Array, "rows width"], KVCache]:
        """One position of each row, which attends to all before it and to itself."""
        positions = position[:, None]
        x = self._inputs(state[:, None], embedding[:, None])
        x, updated = self.block(x, positions, self._rope(positions), cache)
        assert isinstance(updated, KVCache)
        return x[:, 0], updated

    def unroll(
        self, states: Float[Array, "rows seq width"], embeddings: Sequence[Float[Array, "rows seq hidden"]]
    ) -> list[Float[Array, "rows seq width"]]:
        """What `step` gives from every position of whole sequences on, some steps long.

        Step `k` from position `i` stands at position `i + k`. It attends to the true entries up to `i`, which step 0
        made, and to the entries of steps 1 to `k` from the same `i`.

        **Arguments:**

        - `states`: the fused features.
        - `embeddings`: for each step, of the newest token then known.
        """
        rows, seq, _ = states.shape
        positions = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32)[None], (rows, seq))
        block, outputs = self.block, []
        entries: list[KeysAndValues] = []
        for offset, embedding in enumerate(embeddings):
            x = self._inputs(states, embedding)
            queries, keys, values = self._project(x, positions + offset)
            entries.append((keys, values))
            x = x + block.attention.output(unrolled_attention(queries, entries[0], entries[1:]))
            states = x + block.mlp(block.mlp_norm(x))
            outputs.append(states)
        return outputs

    def correct(
        self, hidden: Float[Array, "*batch hidden"], state: Float[Array, "*batch width"]
    ) -> Float[Array, "*batch hidden"]:
        """From the hidden state that predicted a token to the one that predicts the token after it."""
        return hidden + self.leave(rms_normalize(state))

    def _inputs(
        self, states: Float[Array, "rows seq width"], embeddings: Float[Array, "rows seq hidden"]
    ) -> Float[Array, "rows seq width"]:
        return self.enter(jnp.concatenate([rms_normalize(states), rms_normalize(embeddings)], axis=-1))

    def _rope(self, positions: Int[Array, "rows seq"]) -> tuple[RopeTable, ...]:
        return rope_tables(positions, self.block.attention.config)

    def _project(self, x: Float[Array, "rows seq width"], positions: Int[Array, "rows seq"]):
        return self.block.attention.project(self.block.attention_norm(x), self._rope(positions))


@jax.named_scope("unrolled_attention")
def unrolled_attention(
    queries: Float[Array, "rows seq heads head_dim"], true: KeysAndValues, own: Sequence[KeysAndValues]
) -> Float[Array, "rows seq heads*head_dim"]:
    """Causal attention to `true`, and, for the query at index `i`, to index `i` alone of each of `own`.

    The mask of EAGLE-3's training-time test (Li et al. 2025, section 3.2): beyond the triangle it is diagonal, so that
    the scores there are plain dot products, one a query. Memory is linear in the positions.
    """
    rows, seq, heads, head_dim = queries.shape
    kv_heads = true[0].shape[1]
    grouped = queries.reshape(rows, seq, kv_heads, heads // kv_heads, head_dim)
    mixed, normalizers = attend_with_normalizers(queries, *true)
    of_own = [tuple(x.transpose(0, 2, 1, 3)[:, :, :, None] for x in pair) for pair in own]
    own_scores = [jnp.sum(grouped * keys, axis=-1) / math.sqrt(head_dim) for keys, _ in of_own]
    scores = jnp.stack([normalizers.reshape(grouped.shape[:4]), *own_scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = weights[..., :1] * mixed.reshape(grouped.shape)
    for index, (_, values) in enumerate(of_own):
        mixed = mixed + weights[..., index + 1, None] * values
    return mixed.reshape(rows, seq, heads * head_dim)
