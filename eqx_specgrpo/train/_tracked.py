"""The trackers of a run, made of its configuration."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ..config import RunConfig
from ..records import (
    AbstractRunFolder,
    Comparison,
    RunProgress,
    TrackedRun,
    Trackers,
    begun_trackers,
    flattened,
    read_steps,
    run_summary,
)


@contextmanager
def tracked(
    config: RunConfig, folder: AbstractRunFolder, progress: RunProgress, done: int, is_first: bool
) -> Iterator[Trackers]:
    """The trackers that the configuration names, for the length of a `with` block.

    **Arguments:**

    - `done`: how many steps were done before.
    - `is_first`: whether this is the first process of the run; others track nothing.
    """
    names = config.tracking if is_first else []
    path = folder.path.resolve()
    settings = flattened(config.model_dump(mode="json"))
    run = TrackedRun(config.run_name or path.name, config.project, path, settings, done, {})
    begun = begun_trackers(names, run, config.log_completions_steps, progress.say, progress.advise)
    with ExitStack() as stack:
        if names:  # importing them takes seconds
            with progress.timed("trackers", f"beginning {', '.join(config.tracking)}"):
                trackers = stack.enter_context(begun)
        else:
            trackers = stack.enter_context(begun)
        yield trackers


def track_summary(
    trackers: Trackers, folder: AbstractRunFolder, progress: RunProgress, start: int, comparison: Comparison | None
) -> None:
    """Tells the trackers what the run has come to.

    **Arguments:**

    - `start`: steps that were done before this start.
    - `comparison`: what was measured against plain decoding.
    """
    starts = [*folder.times(), progress.times.record(start + 1)]
    trackers.summary(run_summary(read_steps(folder.metrics_path), starts, comparison))
