"""The end of a run: what it leaves for others to load, what speculation gave, and a table that sums up."""

from rich.console import Console

from ..config import DraftConfig, RunConfig, RunParts, draft_spec, model_name
from ..drafts import save_draft
from ..records import AbstractRunFolder, Comparison, RunProgress, read_steps, rounds_by_length, summary_table
from ._compare import compare_with_plain
from ._lessons import COMPARE
from ._policy import save_policy
from ._roll_out import copies_to_decode
from ._segments import SegmentLog
from ._state import RunState
from ._step import step_key


def finish(
    parts: RunParts,
    state: RunState,
    folder: AbstractRunFolder,
    progress: RunProgress,
    segments: SegmentLog,
) -> Comparison | None:
    """Writes policy and draft for others to load, and measures what speculation gives, unless that was done already or
    is not wanted."""
    config, mesh, is_first = parts.config, parts.mesh, parts.processes.is_first
    with progress.timed("saving", "saving policy/ and draft/"):
        policy, draft = mesh.readable((state.policy, state.draft), keep=is_first)
        if is_first:
            save_policy(parts, policy, folder.policy_path)
        if is_first and config.draft.enabled:
            save_draft(folder.draft_path, draft, policy, model_name(config), draft_spec(config.draft))
        del policy, draft
    target, draft = copies_to_decode(parts, state.policy, state.draft)
    if not is_first:
        return None  # it waits until the first one is done
    if not config.draft.enabled:
        return None
    before = folder.comparison()
    if before is not None and before["steps"] == config.steps:
        return Comparison(**before)
    if not config.compare:
        return None
    progress.say("policy/ and draft/ are saved; what follows measures, and may be stopped (compare=false: left out)")
    segments.after_training(state.draft.max_length, state.draft_acceptance)
    with progress.timed("comparison", "comparing with plain decoding"):
        comparison = compare_with_plain(
            parts,
            target,
            draft,
            state.position,
            step_key(config.seed, config.steps, COMPARE),
            progress,
            segments,
        )
    if comparison is not None:
        folder.write_comparison(comparison._asdict())
    return comparison


def sum_up(config: RunConfig, folder: AbstractRunFolder, comparison: Comparison | None, console: Console) -> None:
    """Prints what the run has come to.

    **Arguments:**

    - `comparison`: what was measured against plain decoding.
    """
    metrics = read_steps(folder.metrics_path)
    console.print(summary_table(metrics, folder.times(), comparison))
    advice = None
    if config.draft.enabled and set(rounds_by_length(metrics)) == {0}:
        advice = (
            "Nothing was drafted: no guess would have paid. The policy's entropy was "
            f"{metrics[-1]['entropy']:.2f} nats a token at the end; the lower it is, the more guesses are right. "
            f"{_advice(config.draft)}"
        )
    elif comparison is not None and comparison.ratio < 1:
        advice = f"Speculation did not pay here. {_advice(config.draft)}"
    if advice is not None:
        console.print(advice, soft_wrap=True, markup=False, highlight=False)
    console.print(f"Run folder: {folder.path}", soft_wrap=True, markup=False, highlight=False)


def _advice(draft: DraftConfig) -> str:
    """To whom speculation did not pay."""
    better = "more draft.warmup, a draft that learned beforehand (specgrpo distill), or draft.kind=hydra or eagle"
    if draft.adaptive:
        return f"Lengths were chosen by what pays, so little was lost. For a gain try {better}."
    return f"draft.adaptive=true drafts only what pays. Or try a shorter draft (draft.length), {better}."
