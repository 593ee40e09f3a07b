"""Caches and buffers that grow with their rows: the ladder, and that a growth never shows in a completion."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import OracleDraft, anything, compiled_programs, quick_compilation, randomise, tiny_transformer
from jax import lax

from eqx_specgrpo._types import Prompts, Rollouts
from eqx_specgrpo.decoding import (
    Coupled,
    FixedLength,
    FixedRounds,
    GreedySampling,
    Rejection,
    Sampling,
    SegmentPlan,
    TruncatedSampling,
    UntilRowsFinish,
    _decode as decode_module,
    _room as room_module,
    _row_programs as row_programs,
    decode,
)
from eqx_specgrpo.decoding._room import Room, RoomKeeper, room_ladder, rooms_for
from eqx_specgrpo.decoding._segment import run_segment
from eqx_specgrpo.drafts import (
    EagleDraft,
    FallbackDraft,
    LayerSkipDraft,
    MedusaHeads,
    ModelDraft,
    NGramDraft,
    TemperedDraft,
)
from eqx_specgrpo.models import KVCache, Transformer, caches_can_grow, fill_cache
from eqx_specgrpo.models._cache import AbstractLayerCache

PROMPTS, NEW, SMALLEST = [[1, 2, 3], [4, 5, 6, 7, 8]], 150, 48
CONTEXT = dict(max_position_embeddings=192, num_layers=1, vocab_size=61)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def target():
    return tiny_transformer(**CONTEXT)


DRAFTS = {
    "heads": lambda target: randomise(MedusaHeads.fresh(16, 3), 1, 0.1),
    "model": lambda target: ModelDraft(tiny_transformer(seed=1, **CONTEXT), 3),
    "layers": lambda target: LayerSkipDraft(16, 1, 3, key=jr.key(1)),
    "fallback": lambda target: FallbackDraft(
        NGramDraft(3, min_ngram=2), TemperedDraft(EagleDraft.for_target(target, max_length=4, key=jr.key(1)))
    ),
}


def rooms_seen(monkeypatch: pytest.MonkeyPatch) -> list[Room]:
    """What caches grow to, in the decodings that follow."""
    seen, grow = [], decode_module.grown

    def grown(draft, state, room, *others):
        seen.append(room)
        return grow(draft, state, room, *others)

    monkeypatch.setattr(decode_module, "grown", grown)
    return seen


def generate(target, monkeypatch, smallest: int, **options: Any) -> Rollouts:
    monkeypatch.setattr(room_module, "_SMALLEST", smallest)
    monkeypatch.setattr(room_module, "_CHEAP", 0)
    defaults = dict(key=jr.key(5), max_new_tokens=NEW, eos_ids=[0], samples=2, smallest_bucket=2)
    return decode(target, PROMPTS, **(defaults | options))


def assert_same(found: Rollouts, expected: Rollouts) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    for ours, others in zip(jax.tree.leaves(found.support), jax.tree.leaves(expected.support), strict=True):
        np.testing.assert_array_equal(ours, others)
    for name in ("target_forwards", "drafted", "accepted", "emitted"):
        np.testing.assert_array_equal(getattr(found.statistics, name), getattr(expected.statistics, name))


@pytest.mark.parametrize("most", [300, 515, 640, 1000, 4099, 4400, 8195, 32771])
def test_a_ladder_is_short_and_reads_at_most_twice_what_is_filled(most):
    width, smallest = 96, 512
    rooms = room_ladder(width, most)
    assert rooms[-1].new == most and rooms[-1].whole >= width + most
    assert len(rooms) <= 2 + max(0, most // smallest).bit_length()
    assert (len(rooms) == 1) == (most <= 640), "a short run has one room, its own"
    for before, after in zip(rooms, rooms[1:], strict=False):
        assert after.new > before.new and after.whole >= before.whole
        assert before.whole % 128 == 0, "read in the same pieces as the longest"
        # It grows when less than a quarter of the first is free, for a segment and a block.
        assert after.new <= 2 * (before.new - smallest // 4)
    assert room_ladder(width, most, can_grow=False) == (Room(most, width + most),)


@pytest.mark.parametrize("loop", [UntilRowsFinish(), FixedRounds(4)], ids=["until", "fixed"])
def test_no_segment_is_planned_that_could_overflow(loop):
    rooms = room_ladder(8, 5000)
    keeper, block, reach, grown = RoomKeeper(rooms, block=4, loop=loop), 4, 1, 0
    plan = SegmentPlan(3, max_rounds=64)
    while keeper.room != rooms[-1]:
        fitting = keeper.fit(plan, reach)
        if fitting is None:
            assert keeper.room.new - reach - block < 8 * 4, "it grew with room for a segment"
            keeper.grow(plan, reach)
            grown += 1
            continue
        most = loop.most_rounds(fitting.max_rounds) * 4
        assert 0 < most and reach + most + block <= keeper.room.new
        reach += most
    assert grown == len(rooms) - 1
    assert keeper.fit(plan, 4990) == plan, "the longest room needs no bound"


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_growth_never_shows(kind, target, monkeypatch):
    """In the middle of completions, with every draft that has a cache or a memory."""
    seen = rooms_seen(monkeypatch)
    options = dict(draft=DRAFTS[kind](target), length=FixedLength(3))
    expected = generate(target, monkeypatch, 1000, **options)
    assert seen == [] and expected.lengths.max() > 100
    found = generate(target, monkeypatch, SMALLEST, **options)
    assert len(seen) >= 2, seen
    assert_same(found, expected)


@pytest.mark.parametrize("loop", [UntilRowsFinish(ahead=1), FixedRounds(4)], ids=["until", "fixed"])
def test_rows_that_start_in_a_grown_cache_are_the_same_rows(loop, target, monkeypatch):
    """Refilling, with segments under way when a row comes near its room's end, and coupled identity with no draft."""
    seen = rooms_seen(monkeypatch)
    options = dict(draft=DRAFTS["heads"](target), verifier=Coupled())
    expected = generate(target, monkeypatch, 1000, **options)
    found = generate(target, monkeypatch, SMALLEST, max_rows=2, loop=loop, **options)
    assert len(seen) >= 2
    assert_same(found, expected)


def test_what_truncated_sampling_keeps_grows_along(target, monkeypatch):
    """In the middle of completions, and in rows that start in a grown cache."""
    seen = rooms_seen(monkeypatch)
    options = dict(draft=DRAFTS["heads"](target), sampling=TruncatedSampling(1.0, max_support=7, top_p=0.9))
    expected = generate(target, monkeypatch, 1000, **options)
    assert seen == [] and expected.support is not None and expected.support.counts.max() == 7
    found = generate(target, monkeypatch, SMALLEST, max_rows=2, **options)
    assert len(seen) >= 2
    assert_same(found, expected)


class OwnCache(AbstractLayerCache):
    """A user's own, of which the decoder knows nothing but that it attends."""

    inner: KVCache

    def attend(self, queries, keys, values, positions, sliding_window, softcap=None):
        mixed, inner = self.inner.attend(queries, keys, values, positions, sliding_window, softcap)
        return mixed, OwnCache(inner)


class OwnModel(Transformer):
    def init_cache(self, batch, capacity, dtype):
        return tuple(OwnCache(layer) for layer in super().init_cache(batch, capacity, dtype))


class OwnDraft(OracleDraft):
    """Keeps what it was told in an array of its capacity, and knows nothing of growing."""


def test_what_cannot_grow_has_all_its_room_at_once(target, monkeypatch):
    seen = rooms_seen(monkeypatch)
    own = object.__new__(OwnModel)
    for name, value in vars(target).items():
        object.__setattr__(own, name, value)
    assert caches_can_grow(target) and not caches_can_grow(own)
    greedy = dict(sampling=GreedySampling(), samples=1, eos_ids=[-1])
    found = generate(own, monkeypatch, SMALLEST, **greedy)
    assert seen == []
    # A draft of that kind is right beside a target that grows: all that it proposes is accepted to the end.
    drafted = generate(target, monkeypatch, SMALLEST, draft=OwnDraft(3, jnp.int32(3)), **greedy)
    assert len(seen) >= 2
    np.testing.assert_array_equal(drafted.tokens, found.tokens)
    # The last block of a row is cut short by its limit.
    assert (drafted.statistics.accepted[:, 2] >= drafted.statistics.target_forwards - 1).all()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_on_a_cpu_prompts_have_few_sizes_and_small_caches_one(platform, monkeypatch):
    target = tiny_transformer(max_position_embeddings=9000)
    monkeypatch.setattr(room_module, "platform_of", lambda tree: platform)
    widths = [32, 64, 96, 128, 192, 512, 768, 3072]
    rows, most, width = 4, 2000, 192
    sizes = dict(rows=rows, most=most, cache_dtype="float32")
    slots = [rooms_for(target, width=width, **sizes)[0] for width in widths]
    assert slots == ([32, 64, 128, 128, 1024, 1024, 1024, 8192] if platform == "cpu" else widths)
    config = target.config
    size = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4 * rows * (1024 + most)
    monkeypatch.setattr(room_module, "_CHEAP", size)
    few, grows = (1024, room_ladder(1024, most, can_grow=False)), (width, room_ladder(width, most))
    assert rooms_for(target, width=width, **sizes) == (few if platform == "cpu" else grows)
    monkeypatch.setattr(room_module, "_CHEAP", size - 1)
    assert rooms_for(target, width=width, **sizes) == grows and len(grows[1]) > 2


def test_prompts_of_another_width_run_the_same_segments():
    """On a CPU; and they emit what they emit in as many slots as they need."""
    target = tiny_transformer(max_position_embeddings=900, num_layers=1, sliding_window=70)

    def generated(width: int, own_slots: bool) -> Rollouts:
        tokens = np.random.default_rng(width).integers(0, 13, (2, width)).astype(np.int32)
        prompts = Prompts(tokens, np.array([width - 5, width // 2], np.int32))
        with pytest.MonkeyPatch.context() as patch:
            if own_slots:
                patch.setattr(room_module, "_CHEAP", 0)
            heads = randomise(MedusaHeads.fresh(16, 2), 1, 0.1)
            return decode(
                target, prompts, draft=heads, length=FixedLength(2), verifier=Coupled(), key=jr.key(1),
                max_new_tokens=660, eos_ids=[0], samples=3, smallest_bucket=2,
            )  # fmt: skip

    first = generated(192, False)
    with compiled_programs() as found:
        again = generated(320, False)
    assert found["jit(prefill)"] == 1 and found["jit(run_segment)"] == 0, found
    for width, rollouts in ((192, first), (320, again)):
        assert_same(generated(width, True), rollouts)


def test_a_run_of_4096_tokens_compiles_a_program_a_rung(monkeypatch):
    monkeypatch.setattr(room_module, "_CHEAP", 0)
    target = tiny_transformer(max_position_embeddings=4200, num_layers=1)
    # Every token is the same, and so is what the heads say: four tokens a round.
    target = eqx.tree_at(lambda m: m.unembedding, target, jnp.zeros((13, 16)), is_leaf=lambda x: x is None)
    options = dict(
        draft=MedusaHeads.fresh(16, 3), sampling=GreedySampling(), key=jr.key(0), eos_ids=[-1], smallest_bucket=2
    )
    with compiled_programs() as found:
        rollouts = decode(target, [[1, 2], [3]], max_new_tokens=4096, **options)
    assert (rollouts.lengths == 4096).all()
    rungs = len(room_ladder(2, 4096 + 4))
    assert found["jit(run_segment)"] == rungs == 5
    assert found["jit(_grow_layer)"] == found["jit(_grow_others)"] == rungs - 1
    with compiled_programs() as again:
        decode(target, [[5, 6], [7]], max_new_tokens=4096, **options)
    assert sum(again.values()) == 0, again


def test_off_the_cpu_a_round_reads_the_room_and_not_the_limit(monkeypatch):
    """The program that other devices get, compiled here: it has no array of more slots than the rows have room for."""
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    target, heads = tiny_transformer(num_layers=1, max_position_embeddings=9000), MedusaHeads.fresh(16, 3)
    rooms = room_ladder(96, 8196)
    modules = (target, heads, Rejection(), Sampling(), jnp.array([0], jnp.int32))
    rows, twos = jnp.arange(2, dtype=jnp.int32), jnp.array([2, 2], jnp.int32)

    def prefill(tokens):
        sizes = dict(room=rooms[1], capacity=96 + 8196, cache_dtype="float32", share=False, keep_prompts=False)
        return row_programs.prefill(modules, tokens, twos, twos, jr.key(0), rows, rows, **sizes)[:2]

    shapes = eqx.filter_eval_shape(prefill, jnp.ones((2, 96), jnp.int32))
    state, store = jax.tree.map(anything, shapes)
    context = (modules, store, FixedRounds())
    hlo = run_segment.lower(context, state, twos[0], twos[1:], 3).compile().compiled.as_text()
    longest = max(int(size) for shape in re.findall(r"[a-z]\d+\[([\d,]+)\]", hlo) for size in shape.split(","))
    assert longest == rooms[1].whole
    # Rows come to this room when they have filled the last one up to a segment and a block.
    filled = 96 + rooms[0].new - 2 * 8 * 4 - 4
    assert rooms[1].whole <= 2 * filled


def test_prompts_in_chunks_are_whole_prompts():
    """Also where the last chunk overlaps the one before, and the cache has no slot to spare."""
    target = tiny_transformer(sliding_window=8)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 17)), jnp.int32)
    for seq, chunk in ((17, 5), (10, 5)):
        cache = target.init_cache(2, seq, jnp.float32)
        whole, filled = fill_cache(target, tokens[:, :seq], cache, layers=(0,))
        features, pieces = fill_cache(target, tokens[:, :seq], cache, layers=(0,), chunk=chunk)
        for found, expected in zip(jax.tree.leaves((features, pieces)), jax.tree.leaves((whole, filled)), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_long_prompt_needs_its_cache_its_features_and_one_chunk():
    target = tiny_transformer(num_layers=2, max_position_embeddings=9000, intermediate_size=256)

    def temporaries(seq: int) -> int:
        cache = target.init_cache(1, seq, jnp.float32)
        fill = eqx.filter_jit(lambda given, cache: fill_cache(*given, cache), donate="all-except-first")
        compiled = fill.lower((target, jnp.zeros((1, seq), jnp.int32)), cache).compile().compiled
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(8192)
    # Three times the features' bytes for the seven thousand more: they are put together, and handed on.
    assert long - short <= 3 * 4 * 16 * (8192 - 1024), (short, long)
