"""Rolling out: completions of prompts by the parts of a run, in one process or in several."""

import functools as ft
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Key

from .._types import Prompts, Rollouts
from ..config import RunParts
from ..decoding import DecodeProgress, decode, default_smallest_bucket
from ..drafts import AbstractDraft
from ..evaluation import gather_rollouts, own_prompts
from ..grpo import compute_copy
from ..layout import nothing
from ..models import AbstractLanguageModel
from ._segments import SegmentLog


def copies_to_decode(
    parts: RunParts, policy: AbstractLanguageModel, draft: AbstractDraft
) -> tuple[AbstractLanguageModel, AbstractDraft]:
    """Policy and draft in the dtype of computation, where rollouts are decoded. All processes of a run have to ask for
    them at the same time."""
    mesh, dtype = parts.mesh, parts.config.model.dtype
    return mesh.copies(compute_copy(policy, dtype, mesh)), mesh.copies(compute_copy(draft, dtype, mesh))


def roll_out(
    parts: RunParts,
    target: AbstractLanguageModel,
    draft: AbstractDraft,
    prompts: Prompts,
    key: Key[Array, ""],
    on_progress: Callable[[DecodeProgress], None] | None = None,
    segments: SegmentLog | None = None,
    expected_lengths: Sequence[float] | None = None,
    first_row: int = 0,
) -> Rollouts:
    """Completions of the prompts, `num_generations` each.

    **Arguments:**

    - `first_row`: see [`eqx_specgrpo.decoding.decode`][]; where the prompts are a part of more.
    - `segments`: goes on with what the length controller has learned, and collects what it sees.
    - `expected_lengths`: see [`eqx_specgrpo.decoding.decode`][]; for `grpo.max_rows`.
    """
    grpo = parts.config.grpo
    segments = SegmentLog(parts.length) if segments is None else segments
    smallest = default_smallest_bucket(target)
    rollouts = decode(
        target,
        prompts,
        draft=draft,
        verifier=parts.verifier,
        length=parts.length,
        length_state=segments.length_state,
        sampling=parts.sampling,
        key=key,
        max_new_tokens=grpo.max_completion_length,
        eos_ids=parts.tokenizer.eos_ids,
        stop=parts.stop,
        samples=grpo.num_generations,
        max_rows=grpo.max_rows,
        expected_lengths=expected_lengths,
        mesh=parts.mesh.for_rollouts(),
        first_row=first_row,
        smallest_bucket=smallest,
        compiler=segments.compiler,
        on_progress=on_progress,
        on_segment=segments,
    )
    # A shard stands for all: they go on in step, and rows are dealt out to them.
    data = parts.mesh.for_rollouts().data
    of_shard = np.sort(np.asarray(rollouts.lengths))[::-1][::data]
    segments.decoded(of_shard, smallest, grpo.max_rows and -(-grpo.max_rows // data))
    return rollouts


def roll_out_together(
    parts: RunParts,
    target: AbstractLanguageModel,
    draft: AbstractDraft,
    prompts: Prompts,
    key: Key[Array, ""],
    phase: str,
    on_progress: Callable[[DecodeProgress], None] | None = None,
) -> Rollouts:
    """Completions of the prompts, of which each process of the run decodes its share; all have all of them then.

    **Arguments:**

    - `phase`: see [`eqx_specgrpo.layout.AbstractProcesses`][].
    """
    processes = parts.processes
    first_row = parts.config.grpo.num_generations * processes.share(len(prompts.lengths)).start
    with processes.alone():
        own = roll_out(parts, target, draft, own_prompts(processes, prompts), key, on_progress, first_row=first_row)
    return gather_rollouts(processes, phase, own, prompts, waiting(on_progress, own))


def waiting(on_progress: Callable[[DecodeProgress], None] | None, rollouts: Rollouts) -> Callable[[], None]:
    """What is called while others still decode: `on_progress`, which may raise, with what this process has done."""
    done = DecodeProgress(0, len(rollouts.group), int(rollouts.lengths.sum()))
    return nothing if on_progress is None else ft.partial(on_progress, done)
