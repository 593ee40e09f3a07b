import importlib.metadata
import subprocess
from pathlib import Path


def package_version() -> str:
    """The installed version of this package; it may also be used from its source tree, without one."""
    try:
        return importlib.metadata.version("eqx_specgrpo")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def source_commit() -> str | None:
    """The commit of the repository that tracks this package's source, `-dirty` if a tracked file was changed since.

    `None` if none does, as of an installed copy, or if git cannot say.
    """
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--exclude", "*")
    except (OSError, subprocess.SubprocessError):
        return None
