"""Updates on four devices: the loss, its gradients and its metrics are those of one device."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, tiny_transformer

from eqx_specgrpo.distill import ForwardKL, draft_gradients, fit_temperature
from eqx_specgrpo.drafts import EagleDraft, TemperedDraft
from eqx_specgrpo.grpo import (
    LossNormalizer,
    LossSettings,
    RowFeatures,
    UpdateBatch,
    batch_of_shards,
    compute_copy,
    divide_rows,
    policy_forward,
    policy_gradients,
)
from eqx_specgrpo.grpo.losses import BNPO, DAPO
from eqx_specgrpo.layout import Layout, OneDevice, make_mesh
from eqx_specgrpo.train._draft_step import draft_batch, features_of

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
    "devices, model, loss, checkpointing",
    [(4, 1, DAPO(), False), (2, 1, BNPO(), True), (4, 2, DAPO(), True), (4, 4, DAPO(), False)],
)
def test_gradients_are_those_of_one_device(devices, model, loss, checkpointing):
    batch, mesh = batch_of(), make_mesh(model, jax.devices()[:devices])
    normalizer = LossNormalizer.from_mask(batch.completion_mask, NEW)
    settings = LossSettings(loss=loss, chunk=8, layers=(0,), gradient_checkpointing=checkpointing)
    expected, features = policy_gradients(MODEL, batch, normalizer, settings)

    weights = compute_copy(mesh.lay_out(MODEL, Layout.MASTER), "float32", mesh)
    divided = divide_rows(np.arange(ROWS), mesh.data)
    own = batch_of_shards(batch, divided)
    found, of_shards = policy_gradients(weights, own, normalizer, settings, mesh=mesh)
    close(found, expected)
    placed = mesh.lay_out(expected.gradients, Layout.MASTER)
    assert jax.tree.map(lambda x: x.sharding.spec, found.gradients) == jax.tree.map(lambda x: x.sharding.spec, placed)

    seq = batch.tokens.shape[1]
    rows = RowFeatures.of_parts([of_shards], [divided], seq + 3, mesh)
    in_order = jax.tree.map(lambda x: np.asarray(x)[rows.slots], rows.features)
    close(jax.tree.map(lambda x: x[:, :seq], in_order), features)
    assert not any(x[:, seq:].any() or x.shape[1] != seq + 3 for x in jax.tree.leaves(in_order))


def collectives(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Those of a program, and the shapes that come of them."""
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    found = []
    for line in text.splitlines():
        match = re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\[([\d,]*)\]", match[1])
            found += [(match[2], tuple(int(size) for size in shape.split(",") if size)) for shape in shapes]
    return found


def test_what_an_update_sends_is_weights_gradients_and_sums():
    """No hidden state and no logit is sent: each shard has those of its rows alone."""
    mesh, batch = make_mesh(), batch_of()
    weights = compute_copy(mesh.lay_out(MODEL, Layout.MASTER), "float32", mesh)
    own = batch_of_shards(batch, divide_rows(np.arange(ROWS), mesh.data))
    normalizer = LossNormalizer.from_mask(batch.completion_mask, NEW)
    for program in (policy_gradients, policy_forward):
        text = program.lower(weights, own, normalizer, LossSettings(chunk=8), mesh=mesh).compile().compiled.as_text()
        sent = collectives(text)
        assert sent
        shapes = {x.shape for x in jax.tree.leaves(eqx.filter(MODEL, eqx.is_array))}
        pieces = {
            shard.data.shape
            for x in jax.tree.leaves(eqx.filter(weights, eqx.is_array))
            for shard in x.addressable_shards
        }
        whole = shapes | {shape[::-1] for shape in shapes}
        for kind, shape in sent:
            if kind == "all-gather":
                assert shape in whole or np.prod(shape) <= 4 * 16, (kind, shape)
            elif kind == "reduce-scatter":
                assert shape in pieces | {shape[::-1] for shape in pieces}, (kind, shape)
            else:
                assert kind == "all-reduce" and shape in {(), *(s for s in whole if np.prod(s) < 2**10)}, (kind, shape)
        assert ("reduce-scatter" in dict(sent)) == (program is policy_gradients)
        # Each shard has two rows of the seven, of twelve positions.
        assert f"f32[8,{VOCAB}]" in text and not re.search(rf"f32\[({ROWS},{NEW}|{ROWS * NEW}|{8 * NEW}),", text)


@pytest.mark.parametrize("model", [1, 2])
def test_lessons_are_those_of_one_device(model):
    """Five of the rows, which two of the shards have none of, and temperatures that are looked for on some positions of
    theirs."""
    batch, mesh = batch_of(), make_mesh(model)
    draft = TemperedDraft(EagleDraft.for_target(MODEL, max_length=2, key=jr.key(1)))
    chosen, lengths = np.asarray([0, 1, 2, 3, 4]), np.asarray(batch.completion_lengths)
    options = dict(temperature=jnp.float32(0.7), new=NEW)
    lesson = dict(alpha=jnp.zeros(draft.train_length), position_decay=jnp.float32(0.8), chunk=8) | options
    found = []
    for on in (OneDevice(), mesh):
        target, taught = (compute_copy(on.lay_out(one, Layout.MASTER), "float32", on) for one in (MODEL, draft))
        rows = draft_batch(features_of(target, batch, draft.layers, on), batch, lengths, chosen)
        result = draft_gradients(taught, target, rows, ForwardKL(), mesh=on, **lesson)
        fitted, fit = fit_temperature(taught, target, rows, mesh=on, positions=24, chunk=8, **options)
        found.append((result, fit, fitted.steps))
    close(found[1], found[0])
    assert found[0][1].before.max() > 0
