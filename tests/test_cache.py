"""Laws of the key/value cache: what was written and rewound never shows, and nothing of its size is ever copied."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import AS_USERS_COMPILE, anything, quick_compilation, tiny_transformer
from jax import lax

from eqx_specgrpo.decoding import FixedRounds, Rejection, Sampling, UntilRowsFinish, _row_programs as row_programs
from eqx_specgrpo.decoding._room import Room
from eqx_specgrpo.decoding._segment import run_segment
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.models import KVCache, NoCache, _partial_attention, take_rows
from eqx_specgrpo.models._attention import attention, causal_mask
from eqx_specgrpo.models._cache import attend_to_all, write_positions
from eqx_specgrpo.models._partial_attention import PartialAttention

ROWS, BLOCK, CAPACITY = 3, 4, 24


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("piece", [6, 7, 64])
def test_cached_forward_is_the_full_forward_after_any_accepting_and_rewinding(window, piece, monkeypatch):
    """A random walk: every row writes a block at its own cursor, which then moves anywhere up to the block's end.

    Every 5 steps the rows change places. In the end all of every block is accepted, until each cache is exactly full.
    It is read in pieces that make it up, in pieces that overlap in the end, and in one.
    """
    monkeypatch.setattr(_partial_attention, "_piece_length", lambda seq, slots: piece)
    jax.clear_caches()  # a block that was traced with other pieces
    step = eqx.filter_jit(lambda model, tokens, positions, cache: model.hidden(tokens, positions, cache))
    model = tiny_transformer(sliding_window=window)
    rng = np.random.default_rng(0)
    cache = model.init_cache(ROWS, CAPACITY, jnp.float32)
    # What each row holds; beyond its cursor lies what was rejected, or never written.
    held = np.zeros((ROWS, CAPACITY), np.int32)
    cursors = np.zeros(ROWS, np.int32)
    with quick_compilation():
        for number in range(26):
            block = rng.integers(0, model.vocab_size, (ROWS, BLOCK), np.int32)
            positions = cursors[:, None] + np.arange(BLOCK, dtype=np.int32)
            found, cache = step(model, block, positions, cache)
            np.put_along_axis(held, positions, block, axis=1)
            everywhere = np.broadcast_to(np.arange(CAPACITY, dtype=np.int32), held.shape)
            full, _ = step(model, held, everywhere, model.no_cache())
            expected = np.take_along_axis(np.asarray(full.last), positions[:, :, None], axis=1)
            np.testing.assert_allclose(found.last, expected, atol=2e-5, err_msg=f"step {number}, at {cursors}")

            walking = number < 20
            accepted = rng.integers(0, BLOCK + 1, ROWS) if walking else BLOCK
            rewound = rng.integers(0, 6, ROWS) * (rng.random(ROWS) < 0.3) * walking
            cursors = np.clip(cursors + accepted - rewound, 0, CAPACITY - BLOCK).astype(np.int32)
            if number % 5 == 4:
                rows = rng.permutation(ROWS)
                cache, held, cursors = take_rows(cache, jnp.asarray(rows)), held[rows], cursors[rows]
    assert (cursors == CAPACITY - BLOCK).all(), "the cache was not filled to its last slot"


def test_a_block_is_written_at_each_rows_own_cursor():
    cache = KVCache.empty(2, 1, 6, 1, jnp.float32)
    block = jnp.array([[1.0, 2.0], [3.0, 4.0]])[:, None, :, None]
    cache = cache.write(block, 10 * block, jnp.array([[1, 2], [4, 5]]))
    np.testing.assert_array_equal(cache.keys[:, 0, :, 0], [[0, 1, 2, 0, 0, 0], [0, 0, 0, 0, 3, 4]])
    np.testing.assert_array_equal(cache.values, 10 * cache.keys)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_block_written_position_by_position_is_one_written_whole(axis):
    """The form for accelerators against the one for CPUs, for values and for keys, up to the last slot."""
    rng = np.random.default_rng(4)
    cache = rng.normal(size=(ROWS, 2, 5, 5)).astype(np.float32)
    block = rng.normal(size=(ROWS, 2, *((3, 5) if axis == 1 else (5, 3)))).astype(np.float32)
    start = np.array([0, 2, 1], np.int32)
    found = write_positions(jnp.asarray(cache), jnp.asarray(block), jnp.asarray(start), axis=axis)
    for row, slot in enumerate(start):
        np.moveaxis(cache[row], axis, 0)[slot : slot + 3] = np.moveaxis(block[row], axis, 0)
    np.testing.assert_array_equal(found, cache)


only_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what XLA makes on CPU")


@only_cpu
@pytest.mark.parametrize(
    ("window", "shortest", "poisoned"), [(None, 90, slice(128, None)), (20, 180, slice(0, 128)), (None, 296, slice(0))]
)
def test_slots_that_no_query_sees_are_not_read(window, shortest, poisoned):
    """Two rows with room for 300. A masked slot that was read would give 0 * NaN."""
    rng = np.random.default_rng(0)
    keys, values = (jnp.asarray(rng.normal(size=(2, 2, 300, 4)), jnp.float32) for _ in range(2))
    queries, new = (jnp.asarray(rng.normal(size=(2, 3, heads, 4)), jnp.float32) for heads in (6, 2))
    new = new.swapaxes(1, 2)
    positions = jnp.array([[shortest], [shortest + 1]]) + jnp.arange(3)[None]
    poison = jnp.nan * jnp.ones(values[:, :, poisoned].shape)
    cache = KVCache(keys.swapaxes(2, 3), values.at[:, :, poisoned].set(poison))
    found, _ = eqx.filter_jit(cache.attend)(queries, new, new, positions, window)
    whole = KVCache(keys.swapaxes(2, 3), values).write(new, new, positions)
    mask = causal_mask(positions, jnp.arange(300)[None], window)
    np.testing.assert_allclose(found, attention(queries, whole.keys, whole.values, mask), atol=1e-6)


def test_pieces_are_read_under_shard_map():
    """JAX checks over which axes of a mesh a loop's arrays vary: those it begins with must vary like the queries."""
    rng = np.random.default_rng(2)
    cache = KVCache.empty(2, 1, 300, 2, jnp.float32)
    queries, new = jnp.asarray(rng.normal(size=(2, 1, 1, 2)), jnp.float32), jnp.ones((2, 1, 1, 2))
    rows = jax.sharding.PartitionSpec("rows")
    arguments = (cache, queries, new, jnp.array([[0], [200]]))

    def attend(cache, queries, new, positions):
        return cache.attend(queries, new, new, positions, None)[0]

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    sharded = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows))(*arguments)
    np.testing.assert_allclose(sharded, attend(*arguments), atol=1e-6)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 2.0)])
def test_attention_to_all_slots_is_attention_to_those_that_are_filled(window, softcap):
    """The form for accelerators against the one for CPUs."""
    rng = np.random.default_rng(3)
    keys, values = (jnp.asarray(rng.normal(size=(2, 2, 300, 4)), jnp.float32) for _ in range(2))
    cache, queries = KVCache(keys.swapaxes(2, 3), values), jnp.asarray(rng.normal(size=(2, 2, 9, 4)), jnp.float32)
    positions = jnp.array([[140], [3]]) + jnp.arange(3)[None]
    found = attend_to_all(cache, queries, positions, sliding_window=window, softcap=softcap)
    expected = cache.attend_on(PartialAttention.of_nothing(queries), queries, positions, window, softcap).result()
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_attention_by_pieces_is_attention_to_all(scale):
    """Also where a query sees nothing of the first piece, or of the last, and where scores are very unlike."""
    rng = np.random.default_rng(1)
    queries, keys, values = (jnp.asarray(rng.normal(size=(1, 1, size, 2)), jnp.float32) for size in (4, 9, 9))
    queries = scale * queries
    mask = jnp.asarray(rng.random((1, 4, 9)) < 0.6).at[0, 0, :3].set(False).at[0, 1, 6:].set(False)
    mask = mask.at[0, :, 4].set(True)
    sums = PartialAttention.of_nothing(queries)
    for piece in (slice(0, 3), slice(3, 6), slice(6, 9)):
        scores = queries @ keys[:, :, piece].swapaxes(2, 3)
        sums = sums.add(scores, mask[..., piece], lambda weights, part=values[:, :, piece]: weights @ part)
    weights = jax.nn.softmax(jnp.where(mask, queries @ keys.swapaxes(2, 3), -jnp.inf))
    np.testing.assert_allclose(sums.result(), weights @ values, atol=1e-5)


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
        room = Room(capacity // 4 * 3, capacity)
        sizes = dict(room=room, capacity=capacity, cache_dtype="float32", share=share, keep_prompts=False)
        return row_programs.prefill(modules, tokens, lengths, limits, key, row_ids, row_ids // 2, **sizes)[:2]

    shapes = eqx.filter_eval_shape(prefill, jnp.ones((2, capacity // 4), jnp.int32), twos, twos, jr.key(0))
    state, store = jax.tree.map(anything, shapes)
    context = (modules, store, loop)
    compiled = run_segment.lower(context, state, twos[0], twos[1:], 3).compile().compiled
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
@pytest.mark.parametrize(("slots", "copies"), [(192, False), (300, True)])
def test_a_short_cache_is_read_as_it_lies(slots, copies):
    """A piece of a cache is copied before it is read; all of a short one is read, and none of it copied."""
    cache = KVCache.empty(2, 2, slots, 8, jnp.float32)
    arguments = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 2, 1, 8)), jnp.array([[3], [5]])

    def attend(cache, queries, new, positions):
        return cache.attend(queries, new, new, positions, None)

    lowered = jax.jit(attend, donate_argnums=0).lower(cache, *arguments)
    hlo = lowered.compile(compiler_options=AS_USERS_COMPILE).as_text()
    assert ("dynamic-slice(" in hlo) == copies
    for array in (cache.transposed_keys, cache.values):
        assert not re.search(rf"= f32\[{','.join(map(str, array.shape))}\]\S* copy\(", hlo)


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
