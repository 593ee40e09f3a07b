"""Attention by blocks against attention with all scores at once: values, gradients, and which blocks are computed."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation

from eqx_specgrpo.models import _blockwise_attention as blockwise_module
from eqx_specgrpo.models._blockwise_attention import Blocks, _Blocked, _Places, _Tile, blockwise_attention
from eqx_specgrpo.models._segments import Extent, Segment
from eqx_specgrpo.models._sequence_attention import cudnn_attention, dense_attention

ROWS, SEQ, PROMPTS, PROMPT = 4, 21, 3, 10
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
LENGTHS = jnp.array([21, 3, 14, 8], jnp.int32)  # no block of 8 of the second row's queries is full
PROMPT_LENGTHS = jnp.array([10, 4, 1], jnp.int32)
PROMPT_OF_ROW = jnp.array([2, 0, 1, 0], jnp.int32)
BLOCKS = Blocks(1, 8, 6)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def normal(seed: int, *shape: int):
    return 2.0 * jr.normal(jr.key(seed), shape)


def alone(arrays) -> tuple[Extent, tuple[Segment, ...]]:
    """Rows that see themselves."""
    extent = Extent(jnp.zeros_like(LENGTHS), LENGTHS)
    return extent, (Segment(arrays["keys"], arrays["values"], None, extent),)


def behind_prompts(arrays) -> tuple[Extent, tuple[Segment, ...]]:
    """Rows that see one of fewer prompts as well."""
    starts = PROMPT_LENGTHS[PROMPT_OF_ROW]
    extent = Extent(starts, LENGTHS)
    prompt = Segment(
        arrays["prompt_keys"], arrays["prompt_values"], PROMPT_OF_ROW, Extent(jnp.zeros_like(starts), starts)
    )
    return extent, (prompt, Segment(arrays["keys"], arrays["values"], None, extent))


def arrays_in(dtype):
    shapes = {
        "queries": (ROWS, SEQ, HEADS, HEAD_DIM),
        "keys": (ROWS, KV_HEADS, SEQ, HEAD_DIM),
        "values": (ROWS, KV_HEADS, SEQ, HEAD_DIM),
        "prompt_keys": (PROMPTS, KV_HEADS, PROMPT, HEAD_DIM),
        "prompt_values": (PROMPTS, KV_HEADS, PROMPT, HEAD_DIM),
    }
    arrays = {name: normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    return {name: x if name == "queries" else x.astype(dtype) for name, x in arrays.items()}


def by_blocks(blocks: Blocks | None = None):
    return lambda *given: blockwise_attention(*given, blocks=blocks)[0]


def differences(attend, layout, window, dtype=jnp.float32) -> dict[str, float]:
    """Of the output and of each gradient, relative to the greatest entry. What is computed at padding is not used."""
    counts = (jnp.arange(SEQ)[None] < LENGTHS[:, None])[..., None]
    cotangent = jnp.where(counts, normal(9, ROWS, SEQ, HEADS * HEAD_DIM), 0.0)

    @eqx.filter_jit
    def both(function, arrays):
        def call(arrays):
            extent, segments = layout(arrays)
            return jnp.where(counts, function(arrays["queries"], extent, segments, window), 0.0)

        out, back = jax.vjp(call, arrays)
        return {"out": out} | back(cotangent)[0]

    arrays = arrays_in(dtype)
    found, expected = both(attend, arrays), both(dense_attention, jax.tree.map(lambda x: x.astype(jnp.float32), arrays))
    seen = {"out", "queries", "keys", "values"} if layout is alone else set(found)
    assert all(jnp.max(jnp.abs(expected[name])) > 0.1 for name in seen)
    return {
        name: float(jnp.max(jnp.abs(found[name] - expected[name])) / jnp.max(jnp.abs(expected[name]))) for name in seen
    }


@pytest.mark.parametrize("window", [None, 5], ids=["whole", "sliding window"])
@pytest.mark.parametrize("layout", [alone, behind_prompts])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_values_and_gradients_are_those_of_all_scores_at_once(rows, layout, window):
    attend = by_blocks(Blocks(rows, 8, 6))
    assert max(differences(attend, layout, window).values()) < 1e-5


def test_by_itself_it_takes_blocks_that_the_platform_likes():
    assert max(differences(by_blocks(), behind_prompts, None).values()) < 1e-5


def test_normalizers_can_be_differentiated():
    """With them attention to two segments can be joined from attention to each."""

    def joined(queries, extent, segments, window):
        parts = [blockwise_attention(queries, extent, (segment,), window, BLOCKS) for segment in segments]
        weights = jax.nn.softmax(jnp.stack([normalizers for _, normalizers in parts]), axis=0)[..., None]
        mixed = jnp.stack([mixed.reshape(queries.shape) for mixed, _ in parts])
        return jnp.sum(weights * mixed, axis=0).reshape(ROWS, SEQ, -1)

    assert max(differences(joined, behind_prompts, None).values()) < 1e-5


@pytest.mark.parametrize("window", [None, 5], ids=["whole", "sliding window"])
def test_what_cudnn_is_asked_is_the_same(window):
    """Its kernel runs on CUDA alone; here JAX's own computes what it is asked."""
    attend = partial(cudnn_attention, implementation="xla")
    assert max(differences(attend, behind_prompts, window).values()) < 1e-5


def test_bfloat16_operands_give_float32_results():
    attend = by_blocks(BLOCKS)
    found = differences(attend, behind_prompts, None, jnp.bfloat16)
    assert 1e-5 < max(found.values()) < 2e-2
    extent, segments = behind_prompts(arrays_in(jnp.bfloat16))
    assert attend(arrays_in(jnp.bfloat16)["queries"], extent, segments, None).dtype == jnp.float32


def test_a_block_too_few_is_noticed(monkeypatch):
    bounds = _Tile.bounds

    def too_few(*given):
        first, after = bounds(*given)
        return first, jnp.maximum(after - 1, 1)

    monkeypatch.setattr(_Tile, "bounds", too_few)
    attend = by_blocks(Blocks(1, 8, 5))  # other blocks, so that nothing is taken as compiled
    assert differences(attend, behind_prompts, None)["out"] > 0.1


def test_wrong_normalizers_are_noticed(monkeypatch):
    forward = blockwise_module._forward

    def without_the_sum(*given):
        out, normalizers = forward(*given)
        return out, 0.9 * normalizers

    monkeypatch.setattr(blockwise_module, "_forward", without_the_sum)
    found = differences(by_blocks(Blocks(1, 7, 6)), behind_prompts, None)
    assert found["out"] < 1e-5
    assert all(found[name] > 1e-2 for name in ("queries", "keys", "values", "prompt_keys", "prompt_values"))


@pytest.mark.parametrize("window", [None, 5], ids=["whole", "sliding window"])
def test_only_blocks_of_which_something_is_seen_are_computed(window):
    extent, segments = behind_prompts(arrays_in(jnp.float32))
    keys_and_values = tuple((segment.keys, segment.values) for segment in segments)
    places = _Places(extent, tuple((segment.row, segment.extent) for segment in segments))
    computed = seen = 0
    for segment in _Blocked.all(keys_and_values, places, BLOCKS):
        for row in range(ROWS):
            for block in range(-(-SEQ // BLOCKS.queries)):
                tile = _Tile.of(extent, jnp.array([row]), jnp.int32(block), BLOCKS.queries)
                first, after = (int(bound) for bound in tile.bounds(segment, window))
                computed += max(after - first, 0)
                index = block * BLOCKS.queries + np.arange(BLOCKS.queries)
                positions = int(extent.start[row]) + index[index < int(LENGTHS[row])]
                slots = int(segment.extent.start[row]) + np.arange(int(segment.extent.length[row]))
                distance = positions[:, None] - slots[None]
                mask = (distance >= 0) & (distance < (window or SEQ + PROMPT))
                seen += sum(mask[:, i : i + BLOCKS.keys].any() for i in range(0, len(slots), BLOCKS.keys))
    assert computed == seen
    blocks_in_all = ROWS * 3 * (-(-SEQ // BLOCKS.keys) + -(-PROMPT // BLOCKS.keys))
    assert seen < 0.5 * blocks_in_all
