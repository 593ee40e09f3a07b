"""The update of the draft: the rows that it learns from, and one optimizer step on them."""

import dataclasses
import itertools
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int, Key

from ..config import RunParts
from ..distill import DraftBatch, draft_gradients, fit_temperature
from ..drafts import AbstractDraft, tempered_part, with_temperature
from ..grpo import (
    RowFeatures,
    UpdateBatch,
    apply_gradients,
    batch_of_shards,
    check_finite,
    compute_copy,
    divide_rows,
    global_norm,
    training_features,
)
from ..layout import ROWS, AbstractDeviceMesh, Layout, OneDevice, at_use
from ..models import AbstractLanguageModel, Features
from ._state import RunState

_FOUND = "draft/expected_acceptance_pos_{}"
POSITION_DECAY = 0.8  # weight of a draft position relative to the one before it (Cai et al. 2024, section 2.2.1)


def update_draft(
    parts: RunParts,
    state: RunState,
    target: AbstractLanguageModel,
    features: RowFeatures,
    batch: UpdateBatch,
    lengths: Int[np.ndarray, " rows"],
    rows: Int[np.ndarray, " chosen"],
    step: int,
) -> tuple[RunState, dict[str, float]]:
    """One optimizer step of the draft on some of the rollouts. DONATES the draft and its optimizer's state.

    **Arguments:**

    - `target`: the weights that gave the features.
    - `features`, `batch`: of all the rollouts, as `update_policy` gave them.
    - `lengths`: of the completions; truncated ones teach the draft as well, and so do groups without an advantage.
    - `rows`: the rollouts to learn from.
    """
    config, mesh = parts.config.draft, features.mesh
    chosen = draft_batch(features, batch, lengths, rows)
    result = draft_gradients(
        compute_copy(state.draft, parts.config.model.dtype, mesh),
        target,
        chosen,
        parts.draft_loss,
        temperature=parts.loss.temperature,
        alpha=state.draft_acceptance,
        position_decay=jnp.float32(POSITION_DECAY),
        new=batch.completion_tokens.shape[1],
        truncation=parts.truncation,
        mesh=mesh,
    )
    norm = global_norm(result.gradients)
    check_finite("draft", step, loss=result.loss, grad_norm=norm)
    draft, optimizer_state = apply_gradients(
        (parts.draft_optimizer, result.gradients, jnp.float32(config.learning_rate)),
        state.draft,
        state.draft_optimizer,
        mesh,
    )
    state = dataclasses.replace(state, draft=draft, draft_optimizer=optimizer_state, draft_acceptance=result.acceptance)
    metrics = {"draft/loss": float(result.loss), "draft/grad_norm": float(norm)}
    for position, acceptance in enumerate(np.asarray(result.acceptance).tolist()):
        metrics[_FOUND.format(position)] = acceptance
    if config.fit_temperature:
        fitted, fit_metrics = _fit_temperature(
            parts, state.draft, target, chosen, batch.completion_tokens.shape[1], mesh
        )
        state = dataclasses.replace(state, draft=fitted)
        metrics |= fit_metrics
    return state, metrics


def found_acceptance(metrics: Mapping[str, float | int]) -> list[float]:
    """What a lesson has found accepted at each draft position, out of its metrics; empty if there was none."""
    names = itertools.takewhile(metrics.__contains__, map(_FOUND.format, itertools.count()))
    return [float(metrics[name]) for name in names]


def _fit_temperature(
    parts: RunParts,
    draft: AbstractDraft,
    target: AbstractLanguageModel,
    chosen: DraftBatch,
    new: int,
    mesh: AbstractDeviceMesh,
) -> tuple[AbstractDraft, dict[str, float]]:
    """The draft with temperatures that follow what is accepted most on these rollouts."""
    fitted, fit = fit_temperature(
        compute_copy(draft, parts.config.model.dtype, mesh),
        target,
        chosen,
        temperature=parts.loss.temperature,
        new=new,
        truncation=parts.truncation,
        mesh=mesh,
    )
    part = tempered_part(fitted)
    assert part is not None
    metrics = {}
    for position, acceptance in enumerate(np.asarray(fit.after).tolist()):
        metrics[f"draft/tempered_acceptance_pos_{position}"] = acceptance
        metrics[f"draft/temperature_pos_{position}"] = float(part.temperature[position])
    return with_temperature(draft, part.steps), metrics


def draft_batch(
    features: RowFeatures, batch: UpdateBatch, lengths: Int[np.ndarray, " rows"], rows: Int[np.ndarray, " chosen"]
) -> DraftBatch:
    """Makes the batch of some rollouts. Each is on the shard that has its features.

    **Arguments:**

    - `features`, `batch`, `lengths`, `rows`: as for `update_draft`.
    """
    mesh = features.mesh
    shard, slot = np.divmod(features.slots[rows], features.num_slots)
    most = int(np.bincount(shard).max())
    # A power of two, so that few shapes are compiled: which rows are chosen is left to chance.
    size = most if mesh.data == 1 else min(1 << (most - 1).bit_length(), features.num_slots)
    row_ids, slots = np.full((mesh.data, size), -1, np.int32), np.zeros((mesh.data, size), np.int32)
    for number in range(mesh.data):
        found = np.flatnonzero(shard == number)
        row_ids[number, : len(found)], slots[number, : len(found)] = found, slot[found]
    row_ids = row_ids.reshape(-1)
    of_row = rows[np.maximum(row_ids, 0)]
    tokens, prompt_lengths = np.asarray(batch.tokens)[of_row], np.asarray(batch.prompt_lengths)[of_row]
    completion_lengths = np.where(row_ids < 0, 0, np.asarray(lengths)[of_row])
    of_rows = mesh.put((slots.reshape(-1), tokens, prompt_lengths, completion_lengths, row_ids), ROWS)
    return DraftBatch(_taken(features.features, of_rows[0], mesh), *of_rows[1:])


@eqx.filter_jit
def _taken(features: Features, slots: Int[Array, " chosen"], mesh: AbstractDeviceMesh) -> Features:
    def of_shard(features: Features, slots: Int[Array, " chosen"]) -> Features:
        return jax.tree.map(lambda x: x[slots], features)

    return mesh.by_shard(of_shard, (ROWS, ROWS), ROWS)(features, slots)


def features_of(
    target: AbstractLanguageModel,
    batch: UpdateBatch,
    layers: tuple[int, ...],
    mesh: AbstractDeviceMesh = OneDevice(),
) -> RowFeatures:
    """The target's features of whole sequences, for a draft that learns outside a policy update.

    **Arguments:**

    - `mesh`: that the target is laid out on.
    """
    divided = divide_rows(np.arange(len(batch.tokens)), mesh.data)
    own = mesh.put(batch if mesh.data == 1 else batch_of_shards(batch, divided), ROWS)
    return RowFeatures.of_parts([_features(target, own, layers, mesh)], [divided], batch.tokens.shape[1], mesh)


@eqx.filter_jit
def _features(
    target: AbstractLanguageModel, batch: UpdateBatch, layers: tuple[int, ...], mesh: AbstractDeviceMesh
) -> Features:
    specs = mesh.data_specs(target, Layout.MASTER)

    def of_shard(target: AbstractLanguageModel, batch: UpdateBatch) -> Features:
        return training_features(at_use(mesh, target, specs), batch, layers=layers)[1]

    return mesh.by_shard(of_shard, (specs, ROWS), ROWS)(target, batch)


def draft_rows(key: Key[Array, ""], rows: int, fraction: float) -> Int[np.ndarray, " chosen"]:
    """Which rollouts the draft learns from: a random share, at least one, the same number in every step."""
    chosen = max(1, min(rows, round(fraction * rows)))
    return np.sort(np.asarray(jr.permutation(key, rows))[:chosen])
