"""Laws of the key/value cache: what was written and rewound never shows, and nothing of its size is ever copied."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, tiny_transformer
from jax import lax

from eqx_specgrpo.decoding import FixedRounds, Rejection, Sampling, UntilRowsFinish, _decode as decode_module
from eqx_specgrpo.decoding._segment import run_segment
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.models import KVCache, NoCache, take_rows

ROWS, BLOCK, CAPACITY = 3, 4, 24


@eqx.filter_jit
def _step(model, tokens, positions, cache):
    return model.hidden(tokens, positions, cache)


@pytest.mark.parametrize("window", [None, 5])
def test_cached_forward_is_the_full_forward_after_any_accepting_and_rewinding(window):
    """A random walk: every row writes a block at its own cursor, which then moves anywhere up to the block's end.

    Every 5 steps the rows change places. In the end all of every block is accepted, until each cache is exactly full.
    """
    model = tiny_transformer(sliding_window=window)
    rng = np.random.default_rng(0)
    cache = model.init_cache(ROWS, CAPACITY, jnp.float32)
    # What each row holds; beyond its cursor lies what was rejected, or never written.
    held = np.zeros((ROWS, CAPACITY), np.int32)
    cursors = np.zeros(ROWS, np.int32)
    with quick_compilation():
        for step in range(26):
            block = rng.integers(0, model.vocab_size, (ROWS, BLOCK), np.int32)
            positions = cursors[:, None] + np.arange(BLOCK, dtype=np.int32)
            found, cache = _step(model, block, positions, cache)
            np.put_along_axis(held, positions, block, axis=1)
            everywhere = np.broadcast_to(np.arange(CAPACITY, dtype=np.int32), held.shape)
            full, _ = _step(model, held, everywhere, model.no_cache())
            expected = np.take_along_axis(np.asarray(full.last), positions[:, :, None], axis=1)
            np.testing.assert_allclose(found.last, expected, atol=2e-5, err_msg=f"step {step}, at {cursors}")

            walking = step < 20
            accepted = rng.integers(0, BLOCK + 1, ROWS) if walking else BLOCK
            rewound = rng.integers(0, 6, ROWS) * (rng.random(ROWS) < 0.3) * walking
            cursors = np.clip(cursors + accepted - rewound, 0, CAPACITY - BLOCK).astype(np.int32)
            if step % 5 == 4:
                rows = rng.permutation(ROWS)
                cache, held, cursors = take_rows(cache, jnp.asarray(rows)), held[rows], cursors[rows]
    assert (cursors == CAPACITY - BLOCK).all(), "the cache was not filled to its last slot"


def test_a_block_is_written_at_each_rows_own_cursor():
    cache = KVCache.empty(2, 1, 6, 1, jnp.float32)
    block = jnp.array([[1.0, 2.0], [3.0, 4.0]])[:, None, :, None]
    keys, values, slots, cache = cache.update(block, 10 * block, jnp.array([[1, 2], [4, 5]]))
    np.testing.assert_array_equal(keys[:, 0, :, 0], [[0, 1, 2, 0, 0, 0], [0, 0, 0, 0, 3, 4]])
    np.testing.assert_array_equal(values, 10 * keys)
    np.testing.assert_array_equal(slots, np.arange(6)[None])
    np.testing.assert_array_equal(cache.keys, keys)
    np.testing.assert_array_equal(cache.values, values)


def test_rows_are_repeated_and_dropped():
    keys = jnp.arange(3.0)[:, None, None, None]
    (taken, nothing) = take_rows((KVCache(keys, keys), NoCache()), jnp.array([2, 2, 0]))
    np.testing.assert_array_equal(taken.keys[:, 0, 0, 0], [2, 2, 0])
    assert nothing == NoCache()


#
# No copies: what the compiler made of the decoder's loop, on CPU
#

# What may give out an array as large as a cache: a write in place, and what hands on. `fusion` is looked into.
_HARMLESS = {"parameter", "get-tuple-element", "bitcast", "fusion", "scatter", "dynamic-update-slice", "while", "tuple"}

only_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what XLA makes on CPU")


def _culprits(hlo: str, shape: str) -> list[str]:
    """Instructions within any loop that make an array of this shape anew."""
    computations = {}
    for text in re.split(r"\n\n+", hlo):
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", text)
        if header:
            computations[header[1]] = text
    inside = set()
    reached = re.findall(r"body=%?([\w.\-]+)", hlo)
    assert reached, "the program has no loop"
    while reached:
        name = reached.pop()
        if name not in inside:
            inside.add(name)
            reached += re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", computations[name])
    instruction = re.compile(rf"= {re.escape(shape)}(?:{{[^}}]*}})? ([\w\-]+)\(")
    return [op for name in inside for op in instruction.findall(computations[name]) if op not in _HARMLESS]


def _anything(like: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jr.split(jr.key(0), like.shape)
    return jnp.zeros(like.shape, like.dtype)


@only_cpu
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("loop", [UntilRowsFinish(), FixedRounds(rounds=2)], ids=["until", "fixed"])
def test_the_decoding_loop_copies_no_cache(share, loop):
    rows, capacity = 4, 1024
    # Wide heads: what attention makes is then smaller than the keys that it reads.
    target, heads = (
        tiny_transformer(max_position_embeddings=capacity, head_dim=32, num_layers=1),
        MedusaHeads.fresh(16, 3),
    )
    modules = (target, heads, Rejection(), Sampling(), jnp.array([0], jnp.int32))
    row_ids, twos = jnp.arange(4, dtype=jnp.int32), jnp.array([2, 2], jnp.int32)

    def prefill(tokens, lengths, limits, key):
        sizes = dict(new=capacity // 4 * 3, cache_dtype="float32", share=share, keep_prompts=False)
        return decode_module._prefill(modules, tokens, lengths, limits, key, row_ids, row_ids // 2, **sizes)[:2]

    shapes = eqx.filter_eval_shape(prefill, jnp.ones((2, capacity // 4), jnp.int32), twos, twos, jr.key(0))
    state, store = jax.tree.map(_anything, shapes)
    context = (modules, store, loop)
    compiled = run_segment.lower(context, state, twos[0], twos[1], 3).compile().compiled
    hlo = compiled.as_text()
    layer = state.cache[0]
    kept = (layer.transposed_keys, layer.values)
    if share:
        kept += (store.prompts[0].transposed_keys, store.prompts[0].values)
        assert kept[2].shape == (2, 2, 32, capacity // 4)
    for array in kept:
        shape = f"f32[{','.join(map(str, array.shape))}]"
        assert hlo.count(f"= {shape}") >= 2, "the caches are not to be seen in the program"
        assert _culprits(hlo, shape) == []

    # Donation: what goes in comes out in the same memory, and no temporary is as large as one layer's keys.
    memory = compiled.memory_analysis()
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    assert "input_output_alias" in hlo and memory.alias_size_in_bytes >= cache_bytes
    assert layer.keys.shape == layer.values.shape == (rows, 2, capacity // 4 * 3 if share else capacity, 32)
    assert memory.temp_size_in_bytes < layer.values.size * layer.values.dtype.itemsize


@only_cpu
def test_a_copy_would_be_seen():
    """The control: a cache that is realigned, as left-padded ones are, is made anew in every round."""

    def loop(cache, row):
        def body(carry):
            cache, index = carry
            return jnp.roll(cache, index, axis=1).at[:, -1].set(row), index + 1

        return lax.while_loop(lambda carry: carry[1] < 5, body, (cache, 0))

    hlo = jax.jit(loop, donate_argnums=0).lower(jnp.zeros((4, 40)), jnp.ones(4)).compile().as_text()
    assert _culprits(hlo, "f32[4,40]")
