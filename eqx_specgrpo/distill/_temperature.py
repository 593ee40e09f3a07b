"""The draft temperature that is accepted most: found by looking, not by gradients."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..drafts import MOST_STEPS, AbstractDraft, draft_vocabulary, steps_to_temperature, tempered_part, with_temperature
from ..layout import ROWS, WHOLE, AbstractDeviceMesh, Layout, OneDevice, at_use, gathered
from ..models import AbstractLanguageModel
from ..sampling import TruncatedSampling
from ._losses import expected_acceptance
from ._step import DraftBatch
from ._support import draft_over_support, target_over_support
from ._truncated import sampled_logits

Draft = TypeVar("Draft", bound=AbstractDraft)

# On a grid of sixteenths of a doubling. The current place first, so that it stays where nothing is better.
_MOVES = (0, -1, 1, -4, 4)


class TemperatureFit(eqx.Module):
    """The result of fitting temperatures, for each draft position that the draft learns.

    **Arguments:**

    - `before`, `after`: expected acceptance at the old and the new temperatures, on the positions looked at.
    """

    before: Float[Array, " draft"]
    after: Float[Array, " draft"]


@eqx.filter_jit
def fit_temperature(
    draft: Draft,
    target: AbstractLanguageModel,
    batch: DraftBatch,
    *,
    temperature: Float[Array, ""],
    new: int,
    positions: int = 128,
    chunk: int = 64,
    truncation: TruncatedSampling | None = None,
    mesh: AbstractDeviceMesh = OneDevice(),
) -> tuple[Draft, TemperatureFit]:
    """Moves each draft position's temperature one step towards the largest expected acceptance,
    `sum min(target, draft)`.

    The current temperature is compared with four around it, at distances of 4% and 19%, and is replaced only by a
    better one. Repeated at every step, it follows draft and policy. Draft positions beyond `train_length` get the
    temperature of the last one within it.

    **Arguments:**

    - `draft`: a [`eqx_specgrpo.drafts.TemperedDraft`][], or one that has it inside; in the dtype to compute in.
    - `target`, `batch`, `temperature`, `new`, `chunk`, `truncation`, `mesh`: as for `draft_gradients`.
    - `positions`: number of completion positions to use, spread over the batch; static.

    **Returns:**

    The draft with its new temperatures, and the expected acceptance before and after.
    """
    tempered = tempered_part(draft)
    if tempered is None or draft.train_length == 0:
        raise ValueError(
            f"this {type(draft).__name__} has no temperatures that could be fitted: wrap a draft that learns in a "
            "TemperedDraft"
        )
    num_draft = draft.train_length
    steps = jnp.clip(tempered.steps[:num_draft, None] + jnp.asarray([_MOVES]), -MOST_STEPS, MOST_STEPS)
    specs = mesh.data_specs((draft, target), Layout.MASTER)

    def of_shard(draft, target, batch, temperature, steps, truncation):
        draft, target = gathered(mesh, draft, specs[0]), at_use(mesh, target, specs[1])
        inputs = _spread(draft, target, batch, new, positions, chunk, mesh)
        of_draft = steps_to_temperature(steps)
        return mesh.total(_acceptances(draft, target, inputs, temperature, of_draft, truncation))

    sums, counts = mesh.by_shard(of_shard, (*specs, ROWS, WHOLE, WHOLE, WHOLE), WHOLE)(
        draft, target, batch, temperature, steps, truncation
    )
    acceptances = sums / jnp.maximum(counts, 1)[:, None]
    best = jnp.argmax(acceptances, axis=-1, keepdims=True)
    found = jnp.take_along_axis(steps, best, axis=-1)[:, 0].astype(tempered.steps.dtype)
    beyond = jnp.broadcast_to(found[-1], (draft.max_length - num_draft,))
    fit = TemperatureFit(acceptances[:, 0], jnp.take_along_axis(acceptances, best, axis=-1)[:, 0])
    return with_temperature(draft, jnp.concatenate([found, beyond])), fit


def _acceptances(
    draft: AbstractDraft,
    target: AbstractLanguageModel,
    inputs: PyTree,
    temperature: Float[Array, ""],
    of_draft: Float[Array, "draft moves"],
    truncation: TruncatedSampling | None,
) -> tuple[Float[Array, "draft moves"], Int[Array, " draft"]]:
    """Sums of expected acceptances at each draft position, for each of some temperatures, and the number of summands.

    **Arguments:**

    - `inputs`: from `_spread`.
    """
    num_draft, support = draft.train_length, draft_vocabulary(draft).support

    def one_chunk(sums, inputs):
        hidden, ahead, mask = inputs
        target_logits = target_over_support(sampled_logits(target.unembed(ahead), temperature, truncation), support)
        draft_logits = draft.train_logits(target, hidden)

        def drawn(move: int) -> Float[Array, "positions draft entries"]:
            if truncation is None:
                logits = draft_logits / (temperature * of_draft)[None, :, move, None]
            else:
                logits = sampled_logits(draft_logits / of_draft[None, :, move, None], temperature, truncation)
            return draft_over_support(logits, support)

        acceptances = [expected_acceptance(target_logits, drawn(move)) for move in range(len(_MOVES))]
        return sums + jnp.where(mask[..., None], jnp.stack(acceptances, axis=-1), 0.0).sum(0), None

    sums, _ = lax.scan(one_chunk, jnp.zeros((num_draft, len(_MOVES))), inputs)
    return sums, inputs[2].sum((0, 1))


def _spread(
    draft: AbstractDraft,
    target: AbstractLanguageModel,
    batch: DraftBatch,
    new: int,
    count: int,
    chunk: int,
    mesh: AbstractDeviceMesh,
):
    """In chunks: the draft's hidden states at `count` completion positions, the target's of the positions that they
    predict, and which of both count. A shard of a mesh looks at those of the positions that are in its rows."""
    rows, seq = batch.tokens.shape
    num_draft = draft.train_length
    count = min(count, rows * mesh.data * new)
    chunk = min(chunk, count)
    count -= count % chunk
    offsets = 1 + jnp.arange(num_draft)[None]
    lengths, is_own, own_row = _rows_of_all(batch, mesh)
    # Where the first draft position counts, in an order that is as good as random: multiples of the golden ratio.
    counts = (jnp.arange(new)[None] + 1 < lengths[:, None]).reshape(-1)
    order = jnp.argsort(jnp.where(counts, (jnp.arange(counts.size) * 0.6180339887) % 1.0, 2.0))[:count]
    of_all, place = order // new, order % new
    row = own_row[of_all]
    position = batch.prompt_lengths[row] - 1 + place
    mask = (place[:, None] + offsets < lengths[of_all, None]) & is_own[of_all, None]
    hidden = draft.train_hidden(target, batch.features, batch.tokens)[row, jnp.minimum(position, seq - 1)]
    ahead = batch.features.last[row[:, None], jnp.minimum(position[:, None] + offsets, seq - 1)]
    return jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (hidden, ahead, mask))


def _rows_of_all(
    batch: DraftBatch, mesh: AbstractDeviceMesh
) -> tuple[Int[Array, " all"], Bool[Array, " all"], Int[Array, " all"]]:
    """Of the rows of all shards, in the order that one device has them in: completion lengths, whether a row is this
    shard's, and where it is there."""
    lengths = batch.completion_lengths
    rows = jnp.arange(len(lengths))
    if mesh.data == 1 or batch.row_ids is None:
        return lengths, jnp.ones(len(lengths), bool), rows
    size = len(lengths) * mesh.data
    ids = jnp.where(batch.row_ids < 0, size, batch.row_ids)  # out of range, where a write is dropped
    of_all = jnp.zeros(size, lengths.dtype).at[mesh.of_all(ids)].set(mesh.of_all(lengths), mode="drop")
    own = jnp.zeros(size, bool).at[ids].set(True, mode="drop")
    return of_all, own, jnp.zeros(size, rows.dtype).at[ids].set(rows, mode="drop")
