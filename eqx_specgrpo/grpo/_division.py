"""Which rows of an update each shard of the mesh computes, and where the features of a row are then."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ..layout import ROWS, AbstractDeviceMesh
from ..models import Features
from ._batch import UpdateBatch, num_prompts


def divide_rows(rows: Int[np.ndarray, " rows"], shards: int) -> Int[np.ndarray, "shards part"]:
    """Gives each shard as many of some rows. Rows that follow one another stay together, so that a shard has few
    prompts.

    **Returns:**

    The rows of each shard; -1 where there are none left, at the end of a shard.
    """
    if shards == 1:
        return rows[None]
    part = -(-len(rows) // shards)
    ends = np.linspace(0, len(rows), shards + 1).round().astype(int)
    divided = np.full((shards, part), -1, np.int32)
    ordered = np.sort(rows)
    for shard, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        divided[shard, : end - start] = ordered[start:end]
    return divided


def batch_of_shards(batch: UpdateBatch, divided: Int[np.ndarray, "shards part"], new: int | None = None) -> UpdateBatch:
    """A micro-batch of rows that are divided: those of the first shard, then those of the second, and so on.

    Each shard finds its prompts among its own rows. Where a shard has a row less than others, another row comes again,
    without a token that counts.

    **Arguments:**

    - `divided`: see [`eqx_specgrpo.grpo.divide_rows`][].
    - `new`: see [`eqx_specgrpo.grpo.UpdateBatch.rows`][].
    """
    shards, part = divided.shape
    if shards == 1:
        return batch.rows(divided[0], new)
    spare = np.where(divided[:, :1] < 0, divided.max(), divided[:, :1])
    rows = np.where(divided < 0, spare, divided)
    whole = batch.rows(rows.reshape(-1), new)
    of_row = np.asarray(whole.prompt_of_row).reshape(shards, part)
    distinct = [np.unique(prompts, return_index=True, return_inverse=True) for prompts in of_row]
    size = num_prompts(max(len(prompts) for prompts, *_ in distinct), len(batch.prompt_rows))
    is_there = (divided >= 0).reshape(-1)
    return dataclasses.replace(
        whole,
        completion_mask=np.asarray(whole.completion_mask) & is_there[:, None],
        prompt_rows=np.concatenate([np.resize(first, size) for _, first, _ in distinct]).astype(np.int32),
        prompt_of_row=np.concatenate([inverse for *_, inverse in distinct]).astype(np.int32),
    )


def rows_of_shards(
    x: Shaped[Array | np.ndarray, "of_shards ..."], divided: Int[np.ndarray, "shards part"]
) -> tuple[Int[np.ndarray, " rows"], Shaped[np.ndarray, "rows ..."]]:
    """The rows that there are among those of [`batch_of_shards`][eqx_specgrpo.grpo.batch_of_shards], and what was
    computed for them."""
    is_there = divided.reshape(-1) >= 0
    return divided.reshape(-1)[is_there], np.asarray(x)[is_there]


class RowFeatures(eqx.Module):
    """Features of the rows of an update, each on the shard that computed it.

    **Arguments:**

    - `features`: those of the first shard's rows, then those of the second's, and so on.
    - `slots`: for each row, its place among them.
    - `mesh`: whose shards these are.
    """

    features: Features
    slots: Int[np.ndarray, " rows"]
    mesh: AbstractDeviceMesh

    @staticmethod
    def of_parts(
        parts: list[Features], divided: list[Int[np.ndarray, "shards part"]], width: int, mesh: AbstractDeviceMesh
    ) -> "RowFeatures":
        """Of micro-batches, and how the rows of each were divided. All are padded to a width, that of the whole batch's
        sequences: here, since a program that computes them would have to be compiled for each such width."""
        rows = np.concatenate(divided, axis=1).reshape(-1)
        slots = np.zeros(int((rows >= 0).sum()), np.int32)
        slots[rows[rows >= 0]] = np.nonzero(rows >= 0)[0]
        return RowFeatures(_joined(parts, width, mesh), slots, mesh)

    @property
    def num_slots(self) -> int:
        """Of one shard."""
        return self.features.last.shape[0] // self.mesh.data

    @property
    def rows(self) -> Int[np.ndarray, " slots"]:
        """The row at each place; the first one where there is none."""
        rows = np.zeros(self.features.last.shape[0], np.int32)
        rows[self.slots] = np.arange(len(self.slots))
        return rows


@eqx.filter_jit
def _joined(parts: list[Features], width: int, mesh: AbstractDeviceMesh) -> Features:
    def padded(x: Float[Array, "rows seq hidden"]) -> Float[Array, "rows width hidden"]:
        return jnp.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)))

    def of_shard(*parts: Features) -> Features:
        return jax.tree.map(lambda *xs: jnp.concatenate([padded(x) for x in xs]), *parts)

    return mesh.by_shard(of_shard, (ROWS,) * len(parts), ROWS)(*parts)
