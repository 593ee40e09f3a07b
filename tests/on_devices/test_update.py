"""Updates on four devices: the loss, its gradients and its metrics are those of one device."""

import jax
import numpy as np
import pytest
from helpers import quick_compilation, tiny_transformer

from eqx_specgrpo.grpo import (
    LossNormalizer,
    LossSettings,
    RowFeatures,
    UpdateBatch,
    batch_of_shards,
    compute_copy,
    divide_rows,
    policy_gradients,
)
from eqx_specgrpo.grpo.losses import BNPO, DAPO
from eqx_specgrpo.layout import Layout, make_mesh

VOCAB, ROWS, PROMPT, NEW = 67, 7, 5, 12
MODEL = tiny_transformer(vocab_size=VOCAB)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def batch_of(seed: int = 0) -> UpdateBatch:
    """Seven rows, which four shards can't have an equal part of, of three prompts, with lengths from 1 to 12."""
    rng = np.random.default_rng(seed)
    group = np.asarray([0, 0, 0, 1, 1, 2, 2])
    prompt_lengths = np.asarray([5, 3, 4], np.int32)[group]
    lengths = np.asarray([12, 1, 7, 3, 12, 9, 2], np.int32)
    prompts = rng.integers(1, VOCAB, (3, PROMPT))[group]
    completions = rng.integers(1, VOCAB, (ROWS, NEW)).astype(np.int32)
    tokens = np.zeros((ROWS, PROMPT + NEW), np.int32)
    for row in range(ROWS):
        start, end = prompt_lengths[row], prompt_lengths[row] + lengths[row]
        tokens[row, :start], tokens[row, start:end] = prompts[row, :start], completions[row, : lengths[row]]
    mask = np.arange(NEW)[None] < lengths[:, None]
    return UpdateBatch(
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        completion_tokens=np.where(mask, completions, 0),
        completion_mask=mask,
        old_logprobs=np.where(mask, rng.normal(-4, 0.5, (ROWS, NEW)), 0).astype(np.float32),
        advantages=rng.normal(size=ROWS).astype(np.float32),
        prompt_rows=np.asarray([0, 3, 5], np.int32),
        prompt_of_row=group.astype(np.int32),
        completion_lengths=lengths,
    )


def close(found, expected, tolerance: float = 1e-5) -> None:
    """Relative to the largest number of each array."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.abs(one - other).max(initial=0.0) <= tolerance * max(np.abs(other).max(initial=0.0), 1e-3)


@pytest.mark.parametrize(
    "model, loss, checkpointing",
    [(1, DAPO(), False), (1, BNPO(), True), (2, DAPO(), True), (4, DAPO(), False)],
)
def test_gradients_are_those_of_one_device(model, loss, checkpointing):
    batch, mesh = batch_of(), make_mesh(model)
    normalizer = LossNormalizer.from_mask(batch.completion_mask, NEW)
    settings = LossSettings(loss=loss, chunk=8, layers=(0,), gradient_checkpointing=checkpointing)
    expected, features = policy_gradients(MODEL, batch, normalizer, settings, feature_width=20)

    weights = compute_copy(mesh.lay_out(MODEL, Layout.MASTER), "float32", mesh)
    divided = divide_rows(np.arange(ROWS), mesh.data)
    own = batch_of_shards(batch, divided)
    found, of_shards = policy_gradients(weights, own, normalizer, settings, feature_width=20, mesh=mesh)
    close(found, expected)
    placed = mesh.lay_out(expected.gradients, Layout.MASTER)
    assert jax.tree.map(lambda x: x.sharding.spec, found.gradients) == jax.tree.map(lambda x: x.sharding.spec, placed)

    rows = RowFeatures.of_parts([of_shards], [divided], mesh)
    close(jax.tree.map(lambda x: np.asarray(x)[rows.slots], rows.features), features)
