"""The cache of rows that begin with common prompts: what is common is stored, and read, once."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from ._attention import causal_mask, fold_queries, soft_capped, unfold_heads
from ._cache import AbstractLayerCache, KVCache, write_rows
from ._partial_attention import PartialAttention, over_filled


class SharedPromptCache(AbstractLayerCache):
    """Prompts, each followed by as many rows as the others; a row's own slots begin behind its prompt.

    Attention is exact. Positions are a row's own, the prompt included, as with any other cache.

    ??? cite

        Juravsky et al., "Hydragen: high-throughput LLM inference with shared prefixes",
        [arXiv:2402.05099](https://arxiv.org/abs/2402.05099), section 3.

    **Arguments:**

    - `prompts`: their keys and values, a row each.
    - `lengths`: of the prompts.
    - `rows`: what follows them; those of a prompt are consecutive, and all prompts have as many.
    """

    prompts: KVCache
    lengths: Int[Array, " prompts"]
    rows: KVCache

    def attend(self, queries, keys, values, positions, sliding_window, softcap=None):
        batch, kv_heads, seq, _ = keys.shape
        num_prompts = self.prompts.values.shape[0]
        samples = batch // num_prompts
        starts = jnp.repeat(self.lengths, samples, total_repeat_length=batch)[:, None]
        folded = fold_queries(queries, kv_heads).astype(self.prompts.values.dtype)
        queries_of = folded.shape[2]

        def by_prompt(x):
            # All rows of a prompt become queries of one product.
            x = x.reshape(num_prompts, samples, kv_heads, queries_of, -1).transpose(0, 2, 1, 3, 4)
            return x.reshape(num_prompts, kv_heads, samples * queries_of, -1)

        def by_row(x):
            x = x.reshape(num_prompts, kv_heads, samples, queries_of, -1).transpose(0, 2, 1, 3, 4)
            return x.reshape(batch, kv_heads, queries_of, -1)

        queries_by_prompt = by_prompt(folded)

        def add(start, keys, part, is_new, sums):
            place = (start + jnp.arange(part.shape[2], dtype=positions.dtype))[None]
            in_prompt = jnp.where((place < starts) & is_new(place), place, jnp.iinfo(positions.dtype).max)

            def mix(weights):
                return by_row(_product("pkqs,pksd->pkqd", by_prompt(weights.astype(part.dtype)), part))

            scores = soft_capped(by_row(_product("pkqd,pkds->pkqs", queries_by_prompt, keys)), softcap)
            return sums.add(scores, causal_mask(positions, in_prompt, sliding_window), mix)

        first = 0 if sliding_window is None else jnp.maximum(jnp.min(positions) - sliding_window + 1, 0)
        filled = first, jnp.max(self.lengths)
        before = PartialAttention.of_nothing(folded)
        sums = over_filled(add, before, self.prompts.transposed_keys, self.prompts.values, filled, seq)
        # A row's own slots are counted from its prompt's end.
        rows = self.rows.write(keys, values, positions - starts)
        sums = rows.attend_on(sums, folded, positions - starts, sliding_window, softcap)
        return unfold_heads(sums.result(), seq), SharedPromptCache(self.prompts, self.lengths, rows)

    def unshared(self, chosen: Int[Array, " chosen"]) -> KVCache:
        """Some of the rows with a copy of their prompt each, in slots equal to their positions."""
        samples = self.rows.values.shape[0] // self.prompts.values.shape[0]
        prompt_of_row = chosen // samples
        more = self.rows.values.shape[2]

        def join(prompts, rows, axis):
            pad = [(0, more if i == axis else 0) for i in range(4)]
            whole = jnp.pad(prompts, pad)[prompt_of_row]
            return write_rows(whole, rows[chosen], self.lengths[prompt_of_row], axis=axis - 1)

        return KVCache(
            join(self.prompts.transposed_keys, self.rows.transposed_keys, 3),
            join(self.prompts.values, self.rows.values, 2),
        )


def _product(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
