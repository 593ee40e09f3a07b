"""The trackers by name."""

import importlib.util
from collections.abc import Iterable, Mapping

from ...choices import TRACKERS, described
from ...errors import UserError, did_you_mean
from ._base import TrackerKind

# By what a configuration calls them; each is described at the end of its file.
TRACKER_KINDS: Mapping[str, TrackerKind] = described(__package__ or "", TRACKERS, "TRACKER", TrackerKind)


def check_trackers(names: Iterable[str]) -> None:
    """Whether each tracker that is named is installed; none is imported.

    **Raises:**

    `UserError` if one is not, with the command that installs it, or if there is no tracker of that name.
    """
    for name in names:
        if name not in TRACKER_KINDS:
            raise UserError(f"there is no tracker {name!r}.{did_you_mean(name, TRACKER_KINDS)}")
        kind = TRACKER_KINDS[name]
        if not all(_is_installed(module) for module in kind.modules):
            raise UserError(
                f"tracking names {name}, which is not installed: pip install {kind.package}, or take it out of "
                "tracking (metrics.jsonl in the run folder is written without any)"
            )


def _is_installed(module: str) -> bool:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a package above it is not there, or broken
        return False
    # A folder of that name where Python looks, such as the `wandb` that wandb itself leaves, is no package.
    return found is not None and found.origin is not None
