"""The estimate of what an update needs of memory, against the compiler's own figure; and what follows from it."""

from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
from helpers import AS_USERS_COMPILE, tabular_model

from eqx_specgrpo.grpo import (
    LossNormalizer,
    LossSettings,
    UpdateBatch,
    UpdateBudget,
    choose_update,
    compute_copy,
    policy_gradients,
    update_bytes,
)
from eqx_specgrpo.models import Transformer, TransformerConfig
from eqx_specgrpo.runtime import Memory

GIB = 2**30


def shapes(vocab: int = 512, hidden: int = 96, layers: int = 3, dtype: str = "float32"):
    config = TransformerConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_layers=layers,
        num_heads=hidden // 32,
        num_kv_heads=hidden // 96,
        head_dim=32,
        max_position_embeddings=1 << 16,
        tie_embeddings=True,
    )
    model = eqx.filter_eval_shape(Transformer, config, key=jr.key(0))
    return eqx.filter_eval_shape(compute_copy, model, dtype)


def compiled_bytes(model, rows: int, prompt: int, new: int, checkpointing: bool) -> int:
    """What XLA says that the program needs besides what goes in and comes out."""
    model = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, model)
    tokens, numbers = np.zeros((rows, prompt + new), np.int32), np.zeros((rows, new), np.float32)
    ones = np.ones(rows, np.int32)
    batch = UpdateBatch(
        tokens, prompt * ones, tokens[:, prompt:], numbers == 0, numbers, numbers[:, 0], 0 * ones[:1], 0 * ones,
        completion_lengths=new * ones,
    )  # fmt: skip
    normalizer = LossNormalizer.from_mask(numbers == 0, new, num_micro_batches=1)
    settings = LossSettings(gradient_checkpointing=checkpointing, chunk=128)
    lowered = policy_gradients.lower(model, batch, normalizer, settings).lowered  # pyright: ignore
    return lowered.compile(compiler_options=AS_USERS_COMPILE).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("vocab", "layers", "rows", "prompt", "new"), [(512, 3, 1, 32, 480), (8192, 2, 3, 64, 96)])
def test_the_estimate_is_what_the_compiler_says(vocab, layers, rows, prompt, new, checkpointing):
    model = shapes(vocab, layers=layers)
    estimate = update_bytes(model, rows * new + prompt, chunk=128, gradient_checkpointing=checkpointing)
    assert estimate == pytest.approx(compiled_bytes(model, rows, prompt, new, checkpointing), rel=0.25)


@pytest.fixture(scope="module")
def large():
    return shapes(49152, 576, 30)


def choose(model, budget: UpdateBudget | None, smallest: int = 4224, usual: int | None = 2048, **said: Any):
    return choose_update(model, smallest, budget, dtype="float32", chunk=512, usual_tokens=usual, **said)


def test_values_are_kept_where_there_is_room(large):
    kept = choose(large, UpdateBudget(16 * GIB, 16 * GIB))
    assert (kept.gradient_checkpointing, kept.max_tokens) == (False, 2048)
    assert "values are kept for the backward: that takes" in kept.reason
    again = choose(large, UpdateBudget(3 * GIB, 16 * GIB))
    assert (again.gradient_checkpointing, again.max_tokens) == (True, 2048)
    assert "computed again in the backward" in again.reason and "more than 3.0 GiB" in again.reason
    assert "may not fit" not in again.reason
    assert "may not fit" in choose(large, UpdateBudget(0, GIB // 2)).reason
    # As much as two rows need is room for micro-batches of two rows.
    for smallest in (1024, 700):
        most = update_bytes(large, 2 * smallest, chunk=512, gradient_checkpointing=False)
        assert most is not None
        unlimited = choose(large, UpdateBudget(most, most), smallest, usual=None)
        assert not unlimited.gradient_checkpointing and unlimited.max_tokens == 2 * smallest


def test_what_a_user_says_goes(large):
    little, much = UpdateBudget(0, 0), UpdateBudget(GIB << 10, GIB << 10)
    assert not choose(large, little, gradient_checkpointing=False).gradient_checkpointing
    assert choose(large, much, gradient_checkpointing=True).gradient_checkpointing
    assert choose(large, little, max_tokens=5000).max_tokens == 5000
    # Whether values are kept follows from the micro-batches that were asked for.
    budget = UpdateBudget(6 * GIB, 16 * GIB)
    assert not choose(large, budget, 640, max_tokens=2048).gradient_checkpointing
    assert choose(large, budget, 640, max_tokens=16384).gradient_checkpointing


def test_where_nothing_is_known_all_is_kept(large):
    assert choose(large, None)[:2] == (False, 2048)
    other = tabular_model(seed=0, vocab=3, scale=1.0)
    assert update_bytes(other, 100, chunk=8, gradient_checkpointing=False) is None
    unknown = choose(other, UpdateBudget(0, 0), usual=None)
    assert unknown[:2] == (False, None) and "is not known" in unknown.reason


def test_budget_of_memory():
    own = UpdateBudget.of(Memory(80 * GIB, 60 * GIB, is_shared=False), 20 * GIB)
    assert own == (30 * GIB, 30 * GIB)
    # A machine's memory is not all for values that can be computed again.
    shared = UpdateBudget.of(Memory(24 * GIB, 20 * GIB, is_shared=True), 4 * GIB)
    assert shared == (3 * GIB, 12 * GIB)
    assert UpdateBudget.of(Memory(24 * GIB, 2 * GIB, is_shared=True), 4 * GIB) == (0, 0)
