"""The programs of a decoding as functions and shapes, to be compiled for any device."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import PartitionSpec
from jaxtyping import DTypeLike, PyTree

from ..drafts import AbstractDraft
from ..layout import ROWS, WHOLE, AbstractDeviceMesh, Layout, OneDevice
from ..models import AbstractLanguageModel, Program, default_cache_dtype
from ..sampling import AbstractSampling
from ._prompts import share_prompts
from ._room import rooms_for
from ._row_programs import keep_rows, prefill
from ._segment import AbstractSegmentLoop, default_loop, run_segment
from ._verify import AbstractVerifier


def decode_programs(
    target: AbstractLanguageModel,
    draft: AbstractDraft,
    verifier: AbstractVerifier,
    sampling: AbstractSampling,
    *,
    prompts: int,
    samples: int,
    prompt_length: int,
    new_tokens: int,
    lengths: Sequence[int],
    loop: AbstractSegmentLoop | None = None,
    cache_dtype: DTypeLike | None = None,
    mesh: AbstractDeviceMesh = OneDevice(),
) -> list[Program]:
    """What `decode` compiles for one batch in one room: the prompts' pass, a segment of each draft length, and the step
    to half as many rows.

    **Arguments:**

    - `target`, `draft`: their arrays may be shapes, as `eqx.filter_eval_shape` gives them.
    - `verifier`, `sampling`, `loop`, `cache_dtype`: see `decode`.
    - `prompts`, `samples`: of the batch; it has as many rows as their product.
    - `prompt_length`: of the padded prompts.
    - `new_tokens`: that rows have room for: the step of the ladder that holds so many.
    - `lengths`: tokens drafted a round; one segment each.
    - `mesh`: whose shards have an equal part of the prompts and of their rows.
    """

    def ints(spec: PartitionSpec, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=mesh.sharding(spec))

    def lying(tree: PyTree, specs: PyTree) -> PyTree:
        """Shapes of arrays that are so divided."""

        def one(x: Any, spec: PartitionSpec | None) -> Any:
            if spec is None or not isinstance(x, jax.ShapeDtypeStruct):
                return x
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.sharding(spec))

        if isinstance(specs, PartitionSpec):
            specs = jax.tree.map(lambda _: specs, tree)
        return jax.tree.map(one, tree, specs)

    rows = prompts * samples
    loop = default_loop(target) if loop is None else loop
    cache_dtype = default_cache_dtype(target) if cache_dtype is None else cache_dtype
    target, draft = eqx.filter_eval_shape(lambda: (target, draft))
    copies = [lying(one, mesh.specs(one, Layout.COPY)) for one in (target, draft)]
    modules = (*copies, lying(verifier, WHOLE), lying(sampling, WHOLE), ints(WHOLE, 1))
    slots, ladder = rooms_for(
        target, rows=rows // mesh.data, width=prompt_length, most=target.max_length, cache_dtype=cache_dtype
    )
    room = next((room for room in ladder if room.new >= new_tokens + draft.max_length + 1), ladder[-1])
    key = lying(eqx.filter_eval_shape(jr.key, 0), WHOLE)
    share = share_prompts(
        target, prompts=prompts // mesh.data, width=slots, samples=samples, waiting=0, cache_dtype=cache_dtype
    )
    begin = Program(
        "prefill",
        prefill,
        (modules, ints(ROWS, prompts, prompt_length), *[ints(ROWS, prompts)] * 2, key, *[ints(ROWS, rows)] * 2),
        dict(
            room=room,
            prompt_slots=slots,
            capacity=slots + ladder[-1].new,
            cache_dtype=jnp.dtype(cache_dtype).name,
            share=share,
            keep_prompts=False,
            mesh=mesh,
        ),
    )
    state, store, _ = eqx.filter_eval_shape(begin.function, *begin.arguments, **begin.options)
    state, store = lying(state, ROWS), lying(store, ROWS)
    context = (modules, store, loop)
    segments = [
        Program(
            f"segment of length {length}",
            run_segment,
            (context, state, ints(WHOLE), ints(ROWS, mesh.data), length, mesh, ints(WHOLE)),
            donated=(1, 2, 3),
        )
        for length in lengths
    ]
    if rows < 2 * mesh.data:
        return [begin, *segments]
    return [begin, *segments, Program("shrink", keep_rows, (state, store, ints(ROWS, rows // 2), room.whole, mesh))]
