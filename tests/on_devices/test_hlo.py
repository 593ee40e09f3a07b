"""What four devices do, read from the programs that the compiler made: what they send, and what each computes."""

import re
from collections import Counter

import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, tiny_transformer

from eqx_specgrpo.decoding import FixedRounds, Rejection, Sampling, UntilRowsFinish
from eqx_specgrpo.decoding._room import Room
from eqx_specgrpo.decoding._row_programs import admit, keep_rows, prefill
from eqx_specgrpo.decoding._segment import run_segment
from eqx_specgrpo.drafts import EagleDraft, MedusaHeads, NGramDraft, NoDraft
from eqx_specgrpo.layout import ROWS, WHOLE, Layout, make_mesh

VOCAB, PROMPTS, SAMPLES, LENGTH = 39, 8, 2, 2
TARGET = tiny_transformer(vocab_size=VOCAB)
MESH = make_mesh()
HEADS = MedusaHeads.fresh(16, LENGTH)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def collectives(text: str) -> list[str]:
    """Those of a program, or of a part of it."""
    return re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)


def loop_of(text: str) -> str:
    """The condition and the body of the loop of rounds, and whatever those call: the loop that carries most."""
    parts = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, flags=re.M | re.S))
    line = max((line for line in text.splitlines() if " while(" in line), key=len)
    (called,) = re.findall(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    found, waiting = set(), list(called)
    while waiting:
        name = waiting.pop()
        if name in parts and name not in found:
            found.add(name)
            waiting += re.findall(r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+)", parts[name])
    return "\n".join(parts[name] for name in sorted(found))


def compiled(function, *arguments, **options) -> str:
    return function.lower(*arguments, **options).compile().compiled.as_text()


def started(draft=HEADS, *, share=True, keep_prompts=False, target=TARGET, mesh=MESH):
    """The modules and the arguments of the prompts' pass."""
    target, draft = mesh.lay_out((target, draft), Layout.COPY)
    modules = (target, draft, *mesh.put((Rejection(), Sampling(), np.asarray([0], np.int32)), WHOLE))
    tokens, lengths = np.ones((PROMPTS, 6), np.int32), np.full(PROMPTS, 6, np.int32)
    rows = np.arange(PROMPTS * SAMPLES, dtype=np.int32)
    of_rows = (tokens, lengths, np.full(PROMPTS, 30, np.int32), rows, rows // SAMPLES % (PROMPTS // mesh.data))
    tokens, lengths, limits, ids, prompt_of_row = mesh.put(of_rows, ROWS)
    options = dict(
        room=Room(40, 46), capacity=46, cache_dtype="float32", share=share, keep_prompts=keep_prompts, mesh=mesh
    )
    return modules, (modules, tokens, lengths, limits, mesh.put(jr.key(0), WHOLE), ids, prompt_of_row), options


@pytest.fixture(scope="module")
def shared():
    modules, arguments, options = started()
    return (modules, *prefill(*arguments, **options))


def segment(modules, store, state, loop, length=LENGTH, mesh=MESH) -> str:
    """A segment with two guesses a round."""
    max_rounds, enough = mesh.put((np.int32(9), np.int32(4)), WHOLE)
    stop_below = mesh.put(np.full(mesh.data, 2, np.int32), ROWS)
    return compiled(run_segment, (modules, store, loop), state, max_rounds, stop_below, length, mesh, enough)


def test_nothing_is_sent_where_rows_begin_or_leave(shared):
    modules, state, store, _ = shared
    _, arguments, options = started()
    begin = compiled(prefill, *arguments, **options)
    assert not collectives(begin)
    # Each device has the last hidden state and the logits of its own prompts alone.
    assert f"f32[{PROMPTS // 4},{VOCAB}]" in begin or f"f32[{PROMPTS // 4},1,{VOCAB}]" in begin
    assert not re.search(rf"f32\[({PROMPTS}|{PROMPTS * SAMPLES}),(1,)?{VOCAB}\]", begin)
    kept = MESH.put(np.tile(np.arange(2, dtype=np.int32), MESH.data), ROWS)
    assert not collectives(compiled(keep_rows, state, store, kept, 46, MESH))
    smaller = keep_rows(state, store, kept, 46, MESH)
    # After it, too, each device has its own rows, a quarter.
    for array in (smaller.tokens, smaller.cache[0].values, smaller.draft):
        assert array.shape[0] == 8
        assert [shard.data.shape[0] for shard in array.addressable_shards] == [2] * 4


def test_nothing_is_sent_where_rows_are_let_in():
    modules, arguments, options = started(share=False, keep_prompts=True)
    state, _, prompt_state = prefill(*arguments, **options)
    which = tuple(np.zeros((3, MESH.data), np.int32))
    context = (modules, prompt_state, arguments[4], *MESH.put(which, ROWS))
    assert not collectives(compiled(admit, context, state, Room(40, 46), MESH))


@pytest.mark.parametrize("loop, most", [(UntilRowsFinish(), 1), (FixedRounds(), 0)], ids=["until", "fixed"])
def test_what_a_round_sends(shared, loop, most):
    modules, state, store, _ = shared
    text = segment(modules, store, state, loop)
    rounds = loop_of(text)
    assert len(collectives(rounds)) == most
    assert set(collectives(text)) == {"all-reduce"}  # the report, once a segment
    # Logits of a device's own four rows, three positions each; of all sixteen nowhere.
    assert re.search(rf"f32\[(4,3|12),{VOCAB}\]", rounds)
    assert not re.search(rf"f32\[(16,3|48),{VOCAB}\]", text)


@pytest.mark.parametrize(
    "draft",
    [NGramDraft(LENGTH, memory_size=4, memory_length=8), EagleDraft.for_target(TARGET, max_length=2, key=jr.key(1))],
    ids=["ngram", "eagle"],
)
def test_other_drafts_send_no_more(draft):
    """Siblings are on one device, and so are caches of drafts."""
    modules, arguments, options = started(draft)
    state, store, _ = prefill(*arguments, **options)
    text = segment(modules, store, state, FixedRounds())
    assert len(collectives(loop_of(text))) == 0


def test_a_layer_sums_twice_over_the_devices_that_share_its_weights():
    """After attention's and the MLP's second product (Shoeybi et al. 2019, section 3); a layer moves nothing else."""
    sent, mesh = [], make_mesh(2)
    sizes = dict(vocab_size=512, hidden_size=32, num_heads=8, num_kv_heads=4, intermediate_size=64)
    for num_layers in (2, 3):
        target = tiny_transformer(num_layers=num_layers, **sizes)
        modules, arguments, options = started(NoDraft(), target=target, mesh=mesh)
        state, store, _ = prefill(*arguments, **options)
        rounds = loop_of(segment(modules, store, state, FixedRounds(), 0, mesh))
        sent.append(Counter(collectives(rounds)))
    assert sent[1] - sent[0] == Counter({"all-reduce": 2}) and not sent[0] - sent[1]
