"""Rollouts on four devices: the same tokens as on one, whatever is drafted, refilled, shared, grown or stopped."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
from helpers import make_rounds_long, quick_compilation, randomise, sequence_law, tabular_model, tiny_transformer
from jax.sharding import Mesh

from eqx_specgrpo.decoding import (
    AbstractStop,
    AdaptiveLength,
    Block,
    Coupled,
    FixedLength,
    FixedRounds,
    Rejection,
    Sampling,
    TruncatedSampling,
    UntilRowsFinish,
    _room as room_module,
    decode,
)
from eqx_specgrpo.decoding._shards import Admission, Division, ShardQueues
from eqx_specgrpo.drafts import (
    DRAFT_KINDS,
    EagleDraft,
    FallbackDraft,
    HydraHeads,
    LayerSkipDraft,
    MarkovHeads,
    MedusaHeads,
    ModelDraft,
    NGramDraft,
    NoDraft,
    TemperedDraft,
)
from eqx_specgrpo.layout import DeviceMesh, Layout, OneDevice, make_mesh
from eqx_specgrpo.testing._statistics import law_p_value

SIZES = dict(num_layers=1, max_position_embeddings=192)
TARGET = tiny_transformer(**SIZES)
# Three prompts on four shards, or five: some shards then have a filler.
PROMPTS = [[1, 2, 3, 1, 2], [4], [5, 6, 7, 8, 9], [2, 2], [3, 1, 3, 1, 3]]
DATA, BOTH = make_mesh(), make_mesh(2)
TWO = make_mesh(devices=jax.devices()[:2])
FIXED = FixedRounds(rounds=3)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def sampled(mesh, draft=None, **options):
    """One program a decoding, unless another bucket is asked for."""
    defaults = dict(
        verifier=Coupled(),  # the same tokens whatever the draft
        length=FixedLength(2),
        key=jr.key(1),
        eos_ids=(0,),
        max_new_tokens=20,
        samples=4,
        smallest_bucket=8,
    )
    # As the optimizer has them: the decoder lays out what it needs.
    target = mesh.lay_out(TARGET, Layout.MASTER)
    return decode(target, PROMPTS, draft=draft, mesh=mesh, **(defaults | options))


@pytest.fixture(scope="module")
def plain():
    """On one device, without a draft."""
    rollouts = sampled(OneDevice())
    assert len(set(rollouts.lengths.tolist())) > 5  # rows end at many places
    return rollouts


def check_same(found, expected):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_array_equal(found.stop_reasons, expected.stop_reasons)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


# Every kind, on one of the meshes and with one of the loops; below, what else a decoding may have.
DRAFTS = {
    "none": (NoDraft(), DATA, UntilRowsFinish()),
    "medusa": (randomise(MedusaHeads.fresh(16, 3), 1, 0.1), BOTH, UntilRowsFinish()),
    "hydra": (randomise(HydraHeads(16, 2, key=jr.key(1)), 1, 0.1), TWO, FIXED),
    "markov": (randomise(MarkovHeads(16, 2, key=jr.key(1)), 1, 0.1), DATA, UntilRowsFinish()),
    "eagle": (EagleDraft.for_target(TARGET, max_length=2, key=jr.key(1)), BOTH, UntilRowsFinish()),
    "ngram": (NGramDraft(2, min_ngram=1, siblings=3, memory_size=8, memory_length=8), DATA, UntilRowsFinish()),
    "model": (ModelDraft(tiny_transformer(seed=1, **SIZES), 2), DATA, FIXED),
    "layerskip": (LayerSkipDraft(16, 1, 2, key=jr.key(1)), DATA, FIXED),
    "fallback": (
        FallbackDraft(NGramDraft(2, min_ngram=1), TemperedDraft(MedusaHeads.fresh(16, 2))), DATA, FIXED,
    ),
}  # fmt: skip


def test_no_kind_of_draft_is_left_out():
    kinds = {kind.draft for kind in DRAFT_KINDS.values()}
    assert kinds <= {type(draft) for draft, *_ in DRAFTS.values()}


@pytest.mark.parametrize("name", DRAFTS)
def test_tokens_are_those_of_one_device(name, plain):
    draft, mesh, loop = DRAFTS[name]
    if name == "ngram":
        draft = draft.remember(plain)
    check_same(sampled(mesh, draft, loop=loop), plain)


def test_a_mesh_of_one_device_has_the_same_bits():
    one = DeviceMesh(Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "model")))
    heads, options = DRAFTS["medusa"][0], dict(verifier=Block(), smallest_bucket=16)
    assert eqx.tree_equal(sampled(one, heads, **options), sampled(OneDevice(), heads, **options))


class Ends(AbstractStop):
    """At a token that is said for the second time."""

    most_rounds: int | None = 2

    def end(self, tokens: Sequence[int]) -> int | None:
        return next((i + 1 for i, token in enumerate(tokens) if token in tokens[:i]), None)


def test_rows_are_left_out_and_let_in_where_they_are(plain):
    """Shrinking and refilling, in shards with unequal queues, in the order of what is known of the prompts."""
    heads = DRAFTS["medusa"][0]
    check_same(sampled(DATA, heads, smallest_bucket=1), plain)
    check_same(
        sampled(DATA, heads, smallest_bucket=1, max_rows=8, expected_lengths=[3.0, 9.0, np.nan, 1.0, 20.0]), plain
    )
    check_same(sampled(BOTH, heads, max_rows=2, loop=FIXED), plain)
    # Groups of one are not shared; stops are found by the host.
    stopped = sampled(OneDevice(), stop=Ends(), samples=1)
    check_same(sampled(DATA, heads, stop=Ends(), samples=1), stopped)


def test_caches_grow_by_shard(monkeypatch):
    monkeypatch.setattr(room_module, "_SMALLEST", 48)
    monkeypatch.setattr(room_module, "_CHEAP", 0)
    heads, options = DRAFTS["medusa"][0], dict(max_new_tokens=110, eos_ids=(), samples=2)
    grown = sampled(DATA, heads, **options)
    monkeypatch.setattr(room_module, "_SMALLEST", 512)
    check_same(grown, sampled(OneDevice(), **options))


def test_adaptive_lengths(plain, monkeypatch):
    make_rounds_long(monkeypatch)
    lengths, seen = AdaptiveLength(2), []
    options = dict(length=lengths, on_segment=lambda observation, state: seen.append(observation))
    check_same(sampled(DATA, DRAFTS["medusa"][0], **options), plain)
    assert len({observation.plan.length for observation in seen}) > 1
    # What is told of rows is of one shard, and what is counted is of all.
    assert {observation.rows for observation in seen} == {8}
    assert sum(observation.tokens for observation in seen) == (plain.lengths - 1).sum()


def test_what_truncation_kept_comes_back():
    sampling = TruncatedSampling(max_support=4, top_p=0.9)
    found, expected = (sampled(mesh, sampling=sampling, samples=2) for mesh in (DATA, OneDevice()))
    check_same(found, expected)
    np.testing.assert_array_equal(found.support.counts, expected.support.counts)


def test_rows_of_several_calls_are_those_of_one(plain):
    """As processes share a decoding out: by the index of their first row, those that are let in included."""
    later = decode(
        TARGET, PROMPTS[3:], mesh=DATA, first_row=12, verifier=Coupled(), key=jr.key(1), eos_ids=(0,),
        max_new_tokens=20, samples=4, smallest_bucket=8, max_rows=8, length=FixedLength(0),
    )  # fmt: skip
    np.testing.assert_array_equal(later.tokens, plain.tokens[12:])


def test_the_law_is_kept():
    """Of 2,048 rows on four shards; the rows of a shard are a quarter of them, so that all have to be right."""
    target, prompt, new = tabular_model(seed=0, vocab=4, scale=1.0), [3, 1], 6
    rollouts = decode(
        target, [prompt] * 4, draft=MedusaHeads.fresh(1, 2), verifier=Rejection(), length=FixedLength(2), key=jr.key(7),
        max_new_tokens=new, samples=512, smallest_bucket=512, mesh=DATA,
    )  # fmt: skip
    law = sequence_law(target, Sampling(1.0), prompt, new)
    assert law_p_value(rollouts.tokens[:, :3], law.sum((3, 4, 5))) > 1e-4
    assert law_p_value(rollouts.tokens[:, 3:], law.sum((0, 1, 2))) > 1e-4
    assert len(np.unique(rollouts.tokens, axis=0)) > 600  # shards do not repeat each other


def test_weights_that_are_there_are_not_copied():
    copy = DATA.lay_out(TARGET, Layout.COPY)
    assert DATA.lay_out(copy, Layout.COPY).embedding is copy.embedding


def test_how_prompts_are_divided():
    division = Division(4, 5, 2)
    assert division.row_ids.tolist() == [[0, 1, 2, 3], [4, 5, 10, 11], [6, 7, 12, 13], [8, 9, 14, 15]]
    assert division.prompt_of(division.row_ids)[1].tolist() == [0, 0, 1, 1]
    queues = ShardQueues(division, None, 5, 2)
    assert queues.waiting.tolist() == [4, 2, 2, 2]
    nothing = np.zeros(division.with_fillers, np.int32)
    assert queues.first(12, nothing, nothing > 0).tolist() == [[0, 1, 2], [4, 5, 10], [6, 7, 12], [8, 9, 14]]
    assert queues.waiting.tolist() == [1, 0, 0, 0]
    admission = Admission(3, queues.waiting)
    assert admission.size == 1 and admission.stop_below.tolist() == [2, -1, -1, -1]
    active = np.asarray([[True, True, True]] + [[False] * 3] * 3)
    assert not admission.is_due(active)
    active[0, 1] = False
    assert admission.is_due(active) and admission.counts(active).tolist() == [1, 0, 0, 0]
