"""Speculative against plain decoding: the same prompts, weights and engine, measured on the spot."""

import statistics
import time

from jaxtyping import Array, Key

from ..config import RunParts
from ..drafts import AbstractDraft, NoDraft
from ..models import AbstractLanguageModel
from ..records import Comparison, RunProgress
from ..runtime import count_compilations
from ._roll_out import roll_out
from ._segments import SegmentLog
from ._step import next_examples

_ROUNDS = 15
_ENOUGH_SECONDS = 10.0


def compare_with_plain(
    parts: RunParts,
    target: AbstractLanguageModel,
    draft: AbstractDraft,
    position: int,
    key: Key[Array, ""],
    progress: RunProgress,
    segments: SegmentLog,
) -> Comparison | None:
    """Tokens a second of both ways, interleaved: the medians, or `None` if every pass compiled something.

    Sampled completions differ in length between the two, so time is taken per token. The first pass of each compiles
    and is not counted, nor is any other that does. One round is enough where it takes long.

    **Arguments:**

    - `segments`: what the length controller has learned in the run, which it goes on with.
    """
    grpo = parts.config.grpo
    _, prompts = next_examples(
        parts.task, parts.tokenizer, target, position, grpo.prompts_per_step, grpo.max_completion_length
    )
    rates: dict[str, list[float]] = {"plain": [], "speculative": []}
    begin, compiled = None, 0.0
    for measured in range(_ROUNDS + 1):
        for name, this_draft in (("plain", NoDraft()), ("speculative", draft)):
            progress.phase(f"comparing with plain decoding: {name}, {'first pass' if measured == 0 else measured}")
            start = time.perf_counter()
            log = segments if name == "speculative" else None
            with count_compilations() as compilations:
                rollouts = roll_out(parts, target, this_draft, prompts, key, segments=log)
            compiled += compilations.seconds if name == "plain" else 0.0
            if measured and compilations.seconds == 0:
                rates[name].append(float(rollouts.lengths.sum()) / (time.perf_counter() - start))
        begin = time.perf_counter() if begin is None else begin
        if all(rates.values()) and time.perf_counter() - begin > _ENOUGH_SECONDS:
            break
    if not all(rates.values()):
        return None
    plain, speculative = (statistics.median(rates[name]) for name in ("plain", "speculative"))
    return Comparison(parts.config.steps, plain, speculative, compiled)
