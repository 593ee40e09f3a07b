"""The end of a run: what it leaves for others to load, what speculation gave, and a table that sums up."""

from rich.console import Console

from ..config import DraftConfig, RunParts, default_model_path, draft_spec, model_name
from ..drafts import save_draft
from ..grpo import compute_copy
from ..models import locate, save_model
from ..records import RunFolder, RunProgress, read_records, summary_table
from ._compare import compare_with_plain
from ._lessons import COMPARE
from ._segments import SegmentLog
from ._state import RunState
from ._step import step_key


def finish(
    parts: RunParts,
    state: RunState,
    folder: RunFolder,
    progress: RunProgress,
    console: Console,
    segments: SegmentLog,
) -> None:
    """Writes policy and draft for others to load, measures what speculation gave, and sums up."""
    config = parts.config
    with progress.timed("saving", "saving policy/ and draft/"):
        source = locate(config.model.path) if config.model.path else default_model_path()
        save_model(state.policy, folder.policy_path, parts.tokenizer, source if source.is_dir() else None)  # pyright: ignore[reportArgumentType]
        if config.draft.enabled:
            save_draft(folder.draft_path, state.draft, state.policy, model_name(config), draft_spec(config.draft))
    speedup = None
    if config.draft.enabled:
        progress.say("policy/ and draft/ are saved; what follows only measures, and may be stopped")
        segments.after_training(parts.length, state.draft.max_length, state.draft_acceptance)
        with progress.timed("comparison", "comparing with plain decoding"):
            speedup = compare_with_plain(
                parts,
                compute_copy(state.policy, config.model.dtype),
                compute_copy(state.draft, config.model.dtype),
                config.steps * config.grpo.prompts_per_step,
                step_key(config.seed, config.steps, COMPARE),
                progress,
                segments,
            )
    progress.close()
    console.print(summary_table(read_records(folder.metrics_path), speedup))
    if speedup and max(speedup.values()) < 1:
        progress.say(f"Speculation did not pay here. {_advice(config.draft)}")
    console.print(f"Run folder: {folder.path}", soft_wrap=True, markup=False, highlight=False)


def _advice(draft: DraftConfig) -> str:
    """To whom speculation did not pay."""
    better = "more draft.warmup, a draft that learned beforehand (specgrpo distill), or draft.kind=hydra or eagle"
    if draft.adaptive:
        return f"Lengths were chosen by what pays, so little was lost. For a gain try {better}."
    return f"draft.adaptive=true drafts only what pays. Or try a shorter draft (draft.length), {better}."
