"""Caches and buffers that grow with their rows: the ladder, and that a growth never shows in a completion."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, randomise, tiny_transformer

from eqx_specgrpo._types import Rollouts
from eqx_specgrpo.decoding import (
    Coupled,
    FixedLength,
    FixedRounds,
    SegmentPlan,
    UntilRowsFinish,
    _decode as decode_module,
    _room as room_module,
    decode,
)
from eqx_specgrpo.decoding._room import Room, RoomKeeper, room_ladder
from eqx_specgrpo.drafts import (
    EagleDraft,
    FallbackDraft,
    LayerSkipDraft,
    MedusaHeads,
    ModelDraft,
    NGramDraft,
    TemperedDraft,
)

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

    def grown(draft, state, room, slots):
        seen.append(room)
        return grow(draft, state, room, slots)

    monkeypatch.setattr(decode_module, "grown", grown)
    return seen


def generate(target, monkeypatch, smallest: int, **options: Any) -> Rollouts:
    monkeypatch.setattr(room_module, "_SMALLEST", smallest)
    defaults = dict(key=jr.key(5), max_new_tokens=NEW, eos_ids=[0], samples=2, smallest_bucket=2)
    return decode(target, PROMPTS, **(defaults | options))


def assert_same(found: Rollouts, expected: Rollouts) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
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
    assert len(seen) >= 2 and seen[0].new < 100, seen
    assert_same(found, expected)
