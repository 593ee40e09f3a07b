"""Whole programs, as they are handed to the compiler: what is converted, what is traced, and how many there are."""

import re
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import compiled_programs, make_rounds_long, quick_compilation, tiny_transformer

from eqx_specgrpo.decoding import (
    AdaptiveLength,
    FixedLength,
    FixedRounds,
    Rejection,
    Sampling,
    _row_programs as row_programs,
    decode,
)
from eqx_specgrpo.decoding._room import Room
from eqx_specgrpo.decoding._segment import UntilRowsFinish, run_segment
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.grpo import LossNormalizer, LossSettings, UpdateBatch, compute_copy, policy_gradients
from eqx_specgrpo.grpo.losses import DAPO
from eqx_specgrpo.models import Transformer, _dtype, default_cache_dtype

# Sizes that no activation has: a weight is recognised by its shape.
SIZES = dict(hidden_size=20, intermediate_size=28, vocab_size=37)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def segment_program(target: Transformer) -> str:
    """StableHLO of a segment with two guesses a round."""
    modules = (target, MedusaHeads.fresh(20, 2), Rejection(), Sampling(), jnp.array([0], jnp.int32))
    rows, twos = jnp.arange(4, dtype=jnp.int32), jnp.array([2, 2], jnp.int32)
    sizes = dict(room=Room(12, 18), capacity=18, cache_dtype="float32", share=False, keep_prompts=False)

    def prefill(tokens):
        return row_programs.prefill(modules, tokens, twos, twos, jr.key(0), rows, rows // 2, **sizes)[:2]

    state, store = eqx.filter_jit(prefill)(jnp.ones((2, 6), jnp.int32))
    return run_segment.lower((modules, store, UntilRowsFinish()), state, twos[0], twos[1:], 2).as_text()


def update_program(target: Transformer) -> str:
    """StableHLO of a policy gradient."""
    tokens = np.ones((4, 11), np.int32)
    mask = np.ones((4, 5), bool)
    values = np.zeros((4, 5), np.float32)
    batch = UpdateBatch(
        tokens, np.full(4, 6, np.int32), tokens[:, 6:], mask, values, np.ones(4, np.float32), np.array([0, 2]),
        np.array([0, 0, 1, 1]),
    )  # fmt: skip
    settings = LossSettings(temperature=1.0, loss=DAPO(epsilon=0.2, epsilon_high=0.2))
    return policy_gradients.lower(
        target, batch, LossNormalizer.from_mask(mask, 5, num_micro_batches=1), settings
    ).as_text()


def converted_weights(program: str, target: Transformer) -> list[str]:
    """Conversions of a bfloat16 array as large as a weight to float32, however it is turned."""
    shapes = {x.shape for x in jax.tree.leaves(eqx.filter(target, eqx.is_inexact_array)) if x.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    found = re.findall(r"stablehlo\.convert .*: \(tensor<([\dx]+)xbf16>\) -> tensor<[\dx]+xf32>", program)
    return [shape for shape in found if tuple(map(int, shape.split("x"))) in shapes]


def test_no_weight_is_converted_to_float32():
    """In bfloat16 a float32 copy of the weights would be most of what a round reads."""
    target = compute_copy(tiny_transformer(**SIZES), "bfloat16")
    program = segment_program(target)
    assert "20xbf16>" in program
    assert converted_weights(program, target) == []
    # Of an update each weight's gradient is, once, and nothing else of that size.
    matrices = [x for x in jax.tree.leaves(eqx.filter(target, eqx.is_inexact_array)) if x.ndim == 2]
    assert len(converted_weights(update_program(target), target)) == len(matrices)


def test_a_converted_weight_would_be_seen():
    target = compute_copy(tiny_transformer(**SIZES), "bfloat16")
    spoilt = jax.jit(lambda x: x @ target.embedding.astype(jnp.float32).T)
    assert converted_weights(spoilt.lower(jnp.ones((3, 20))).as_text(), target) == ["37x20"]


@pytest.mark.parametrize("program_of", [segment_program, update_program])
def test_a_layer_is_traced_and_lowered_once(program_of):
    """Not once for each layer: a model of thirty would take its start, also a second one, many seconds."""
    sizes = [program_of(tiny_transformer(num_layers=layers, **SIZES)).count("dot_general") for layers in (2, 5)]
    assert sizes[0] == sizes[1] > 4


def test_programs_of_decoding_are_bounded_by_the_ladder():
    """Rows that finish one by one, several decodings, prompts and settings: a program a bucket and length."""
    target, heads = tiny_transformer(**SIZES), MedusaHeads.fresh(20, 2)

    def decode_with(length, seed, temperature):
        return decode(
            target,
            [[seed + 1, 2, 3], [4, seed + 5]],
            draft=heads,
            length=FixedLength(length),
            sampling=Sampling(jnp.float32(temperature)),
            key=jr.key(seed),
            max_new_tokens=16,
            eos_ids=range(30, 37),
            samples=8,
            smallest_bucket=4,
        )

    with compiled_programs() as found:
        lengths = [decode_with(length, seed, 0.7 + seed / 10).lengths for seed in range(3) for length in (0, 2)]
    assert len(set(np.concatenate(lengths).tolist())) > 5, "rows have to finish at different times"
    buckets = 3  # 16, 8 and 4 rows
    assert 3 <= found["jit(run_segment)"] <= 2 * buckets
    assert found["jit(keep_rows)"] <= 2 * 3  # from any bucket to a smaller one, prompts shared or in the rows
    assert found["jit(prefill)"] == 1
    with compiled_programs() as again:
        decode_with(2, 0, 0.7)
    assert again["jit(run_segment)"] == again["jit(prefill)"] == 0


@pytest.mark.parametrize("loop", [UntilRowsFinish(), FixedRounds(rounds=2)], ids=["until", "fixed"])
def test_an_adaptive_length_drafts_under_either_loop(loop, monkeypatch):
    """In the real decoder, with a draft that is always right: also where the host looks a segment late."""
    make_rounds_long(monkeypatch)
    target = tiny_transformer(num_layers=1, **SIZES)
    # Whatever comes, the token after it is the same: the heads, which say the target's own next token again, are right.
    target = eqx.tree_at(lambda m: m.unembedding, target, jnp.zeros((37, 20)), is_leaf=lambda x: x is None)
    heads, controller = MedusaHeads.fresh(20, 1), AdaptiveLength(1)
    state, lengths, expected = None, Counter(), 0
    for seed in range(6):
        seen = []
        found = decode(
            target, [[1, 2, 3]], draft=heads, length=controller, length_state=state, key=jr.key(seed), samples=8,
            max_new_tokens=60, smallest_bucket=8, loop=loop, on_segment=lambda *x, seen=seen: seen.append(x),
        )  # fmt: skip
        assert (found.lengths == 60).all()
        state = seen[-1][1]
        lengths.update(observation.plan.length for observation, _ in seen)
        expected += sum(observation.plan.expected is not None for observation, _ in seen)
    assert lengths[0] > 0 and lengths[1] > 0, lengths
    assert expected > 0, "what a segment will yield is predicted once something has been measured"


@pytest.mark.parametrize(("platform", "expected"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_a_cache_has_the_dtype_of_the_model_but_on_cpu(platform, expected, monkeypatch):
    monkeypatch.setattr(_dtype, "platform_of", lambda model: platform)
    model = tiny_transformer(**SIZES)
    assert default_cache_dtype(model) == jnp.float32
    assert default_cache_dtype(compute_copy(model, "bfloat16")) == jnp.dtype(expected)
    shapes = eqx.filter_eval_shape(lambda: compute_copy(model, "bfloat16"))
    assert default_cache_dtype(shapes) == jnp.dtype(expected), "where a program is compiled from shapes alone"
