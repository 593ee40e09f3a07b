"""One update of the draft, on features that the policy's own forward has produced."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..drafts import AbstractDraft, draft_vocabulary
from ..layout import (
    ROWS,
    WHOLE,
    AbstractDeviceMesh,
    Layout,
    OneDevice,
    at_use,
    gathered,
    own_parts_of_total,
)
from ..models import AbstractLanguageModel, Features
from ..sampling import TruncatedSampling
from ._base import AbstractDraftLoss
from ._losses import confidence_loss, expected_acceptance
from ._support import draft_over_support, target_over_support
from ._truncated import truncated_acceptance


class DraftBatch(eqx.Module):
    """Whole sequences with the target's features of them.

    **Arguments:**

    - `features`: from the policy's forward.
    - `tokens`: the sequences.
    - `prompt_lengths`, `completion_lengths`: the draft learns where completions are, which is where it is used. Rows
        of length 0 pad the batch, so that all shards of a mesh have as many.
    - `row_ids`: on a mesh, where each row is in the batch that one device has; -1 for padding.
    """

    features: Features
    tokens: Int[Array, "rows seq"]
    prompt_lengths: Int[Array, " rows"]
    completion_lengths: Int[Array, " rows"]
    row_ids: Int[Array, " rows"] | None = None


class DraftGradients(eqx.Module):
    """Outcome of a pass over a batch.

    **Arguments:**

    - `gradients`: float32, shaped like the draft.
    - `loss`: the weighted mean over draft positions.
    - `acceptance`: expected acceptance of each draft position, `sum min(target, draft)`, over the completion positions.
    """

    gradients: PyTree
    loss: Float[Array, ""]
    acceptance: Float[Array, " draft"]


@eqx.filter_jit
def select_rows(
    features: Features,
    tokens: Int[Array, "rows seq"],
    prompt_lengths: Int[Array, " rows"],
    completion_lengths: Int[Array, " rows"],
    rows: Int[Array, " chosen"],
) -> DraftBatch:
    """The batch of some rows."""
    return jax.tree.map(lambda x: x[rows], DraftBatch(features, tokens, prompt_lengths, completion_lengths))


@eqx.filter_jit
def draft_gradients(
    draft: AbstractDraft,
    target: AbstractLanguageModel,
    batch: DraftBatch,
    loss: AbstractDraftLoss,
    *,
    temperature: Float[Array, ""],
    alpha: Float[Array, " draft"],
    position_decay: Float[Array, ""],
    new: int,
    chunk: int | None = None,
    truncation: TruncatedSampling | None = None,
    mesh: AbstractDeviceMesh = OneDevice(),
) -> DraftGradients:
    """Loss and gradients of the draft, in chunks of positions: no array of all positions times the vocabulary exists.

    A chunk's logits serve forward and backward at once, so that each is computed one time. Only the draft is
    differentiated; target and features are constants. A draft of a reduced vocabulary learns over that alone, which
    leaves one pass over the target's whole vocabulary of those that a full one needs.

    **Arguments:**

    - `draft`: in the dtype to compute in.
    - `target`: the very weights that gave the features.
    - `batch`: the sequences.
    - `loss`: see `AbstractDraftLoss`.
    - `temperature`: of sampling; applied to both sides.
    - `alpha`: recent expected acceptance of each draft position, for losses that adapt to it.
    - `position_decay`: weight of each draft position relative to the one before it (Medusa uses 0.8).
    - `new`: the completion positions to look at; static.
    - `chunk`: positions a chunk; static. `None`: as many as keep an array of draft logits below 32 MiB, which is about
        what CPU caches and allocators like. Chunks in which no position counts are passed over.
    - `truncation`: how tokens are drawn, where that is from a part of the vocabulary: the acceptance is then that of
        what is drawn. What is learned is the whole distribution, which both sides truncate alike.
    - `mesh`: that draft and target are laid out on. Each shard computes its rows of the batch, whose number is the same
        in all; the gradients are divided as the draft is.
    """
    specs = mesh.data_specs((draft, target), Layout.MASTER)
    of_draft = jax.tree.map(
        lambda x, spec: spec if eqx.is_inexact_array(x) else None, eqx.filter(draft, eqx.is_array), specs[0]
    )

    def of_shard(draft, target, batch, loss, temperature, alpha, position_decay, truncation):
        draft, target = gathered(mesh, draft, specs[0]), at_use(mesh, target, specs[1])
        found = _of_own_rows(
            draft, target, batch, loss, temperature, alpha, position_decay, new, chunk, truncation, mesh
        )
        gradients = own_parts_of_total(mesh, found.gradients, of_draft)
        return gradients, *mesh.total((found.loss, found.acceptance))

    in_specs = (*specs, ROWS, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE)
    found = mesh.by_shard(of_shard, in_specs, (of_draft, WHOLE, WHOLE))(
        draft, target, batch, loss, temperature, alpha, position_decay, truncation
    )
    return DraftGradients(*found)


def _of_own_rows(
    draft: AbstractDraft,
    target: AbstractLanguageModel,
    batch: DraftBatch,
    loss: AbstractDraftLoss,
    temperature: Float[Array, ""],
    alpha: Float[Array, " draft"],
    position_decay: Float[Array, ""],
    new: int,
    chunk: int | None,
    truncation: TruncatedSampling | None,
    mesh: AbstractDeviceMesh,
) -> DraftGradients:
    """A shard's share of each sum."""
    features, target = lax.stop_gradient((batch.features, target))
    params, static = eqx.partition(draft, eqx.is_inexact_array)
    rows, seq = batch.tokens.shape
    num_draft, vocabulary = draft.train_length, draft_vocabulary(draft)
    positions = jnp.minimum(batch.prompt_lengths[:, None] - 1 + jnp.arange(new)[None], seq - 1)
    offsets = jnp.arange(new)[None, :, None] + 1 + jnp.arange(num_draft)[None, None]
    mask = offsets < batch.completion_lengths[:, None, None]
    counts = mesh.total(mask.sum((0, 1)))
    decay = position_decay ** jnp.arange(num_draft)
    weights = jnp.where(counts > 0, decay / jnp.sum(decay), 0.0) / jnp.maximum(counts, 1)

    def completion_hidden(params: PyTree) -> Float[Array, "positions draft hidden"]:
        hidden = eqx.combine(params, static).train_hidden(target, features, batch.tokens)
        hidden = jnp.take_along_axis(hidden, positions[:, :, None, None], axis=1)
        return hidden.reshape(rows * new, num_draft, hidden.shape[-1])

    draft_hidden, pull_back = jax.vjp(completion_hidden, params)
    target_hidden = jnp.take_along_axis(features.last, positions[:, :, None], axis=1).reshape(rows * new, -1)

    if chunk is None:
        draft_size = vocabulary.size or target.vocab_size
        chunk = _default_chunk(rows * new, max(num_draft * draft_size, target.vocab_size))
    # Offset k looks k + 1 positions ahead in the same row; what would be another row's is masked.
    padding = -(rows * new) % chunk
    draft_chunks = jnp.pad(draft_hidden, ((0, padding), (0, 0), (0, 0))).reshape(-1, chunk, *draft_hidden.shape[1:])
    mask_chunks = jnp.pad(mask.reshape(-1, num_draft), ((0, padding), (0, 0))).reshape(-1, chunk, num_draft)
    target_hidden = jnp.pad(target_hidden, ((0, padding + num_draft), (0, 0)))

    def one_chunk(carry, inputs):
        return lax.cond(inputs[2].any(), learn, lambda carry, inputs: (carry, jnp.zeros_like(inputs[1])), carry, inputs)

    def learn(carry, inputs):
        start, hidden, mask = inputs
        ahead = target.unembed(lax.dynamic_slice_in_dim(target_hidden, start, chunk + num_draft))
        ahead_logits = target_over_support(ahead / temperature, vocabulary.support)
        target_logits = jnp.stack([ahead_logits[1 + k : 1 + k + chunk] for k in range(num_draft)], axis=1)

        def chunk_loss(params, hidden):
            untempered = eqx.combine(params, static).train_logits(target, hidden)
            draft_logits = draft_over_support(untempered / temperature, vocabulary.support)
            losses, acceptances = loss(target_logits, draft_logits, mask, alpha)
            confidence = eqx.combine(params, static).train_confidence(hidden)
            if confidence is not None:
                losses += _confidence_losses(confidence, target_logits, draft_logits, mask)
            if truncation is not None:
                drawn = truncated_acceptance(ahead, lax.stop_gradient(untempered), truncation, vocabulary.support)
                acceptances = jnp.where(mask, drawn, 0.0).sum(0)
            return jnp.sum(weights * losses), acceptances

        (value, acceptances), (d_params, d_hidden) = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)(
            params, hidden
        )
        total, acceptance_sums, gradients = carry
        gradients = jax.tree.map(lambda total, new: total + new.astype(jnp.float32), gradients, d_params)
        return (total + value, acceptance_sums + acceptances, gradients), d_hidden

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    starts = jnp.arange(draft_chunks.shape[0]) * chunk
    (total, acceptance_sums, gradients), d_hidden = lax.scan(
        one_chunk, (jnp.zeros(()), jnp.zeros(num_draft), zeros), (starts, draft_chunks, mask_chunks)
    )
    (through_hidden,) = pull_back(d_hidden.reshape(-1, *draft_hidden.shape[1:])[: rows * new])
    gradients = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), gradients, through_hidden)
    return DraftGradients(gradients, total, acceptance_sums / jnp.maximum(counts, 1))


def _confidence_losses(
    confidence_logits: Float[Array, "positions draft"],
    target_logits: Float[Array, "positions draft vocab"],
    draft_logits: Float[Array, "positions draft vocab"],
    mask: Bool[Array, "positions draft"],
) -> Float[Array, " draft"]:
    """The losses of a draft's confidence, summed over the positions that count."""
    target_logits, draft_logits = (jnp.where(mask[..., None], x, 0.0) for x in (target_logits, draft_logits))
    losses = confidence_loss(confidence_logits, expected_acceptance(target_logits, lax.stop_gradient(draft_logits)))
    return jnp.where(mask, losses, 0.0).sum(0)


def _default_chunk(positions: int, logits: int) -> int:
    """A power of two from 16 to 512, and no more than the positions ask for."""
    fitting = max(16, min(512, (1 << 23) // logits))
    return min(1 << fitting.bit_length() - 1, 1 << (positions - 1).bit_length())
