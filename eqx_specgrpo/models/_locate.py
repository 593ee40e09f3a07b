"""From what a user calls a model to a path on this machine."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from ..errors import CheckpointError
from ..files import user_path

# Weights in one format only, and nothing that could be executed.
_FILES = ["*.json", "model*.safetensors", "*.jinja", "tokenizer*"]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def locate(path: str | Path, revision: str | None = None) -> Path:
    """An existing folder or `.gguf` file; `org/name` is downloaded (or found in the cache) by huggingface_hub.

    **Arguments:**

    - `revision`: branch, tag or commit of what is downloaded.

    **Raises:**

    `CheckpointError` if there is no such thing, here or there.
    """
    local = _local(path, revision)
    if local is not None:
        return local
    with _advice(str(path), revision):
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=_FILES, ignore_patterns=["*/*"]))


def locate_config(path: str | Path, revision: str | None = None) -> Path:
    """As `locate`, but of `org/name` only `config.json` is downloaded: the folder that it is in.

    **Raises:**

    `CheckpointError` if there is no such thing, here or there.
    """
    local = _local(path, revision)
    if local is not None:
        return local
    with _advice(str(path), revision):
        return Path(hf_hub_download(str(path), "config.json", revision=revision)).parent


def _local(path: str | Path, revision: str | None) -> Path | None:
    """What is on this machine; `None` if the path may be a name to download."""
    local = user_path(path)
    if local.is_dir() or (local.is_file() and local.suffix == ".gguf"):
        if revision is not None:
            raise CheckpointError(
                f"model.revision = {revision!r} is of a model by name, which is downloaded, but {path} is here: leave "
                "the revision out"
            )
        _check_no_adapter(local, str(path))
        return local
    if local.is_file():
        raise CheckpointError(f"{path} is a file; give a Hugging Face folder, a .gguf file or org/name")
    if isinstance(path, Path) or not could_be_downloaded(path):
        raise CheckpointError(f"{path} does not exist; give a Hugging Face folder, a .gguf file or org/name")
    return None


def _check_no_adapter(local: Path, path: str) -> None:
    """Raises `CheckpointError` for a folder that holds an adapter and no model, such as a run with LoRA leaves."""
    if not local.is_dir() or (local / "config.json").exists():
        return
    for folder, name in ((local, path), (local / "adapter", f"{path}/adapter")):
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{path} holds an adapter and no model: give its base as --model, and --adapter {name}"
            )


@contextmanager
def _advice(name: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Whatever the network stack throws, the advice is the same.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        of = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"there is no folder {name!r} here, and downloading the model {name!r}{of} failed: {reason}. Check the "
            "name and the network (private and gated models need `hf auth login`), or give the path of a folder that "
            "was downloaded elsewhere"
        ) from error


def could_be_downloaded(name: str) -> bool:
    """Whether this has the form `org/name` rather than that of a path."""
    return bool(_REPOSITORY.fullmatch(name)) and not name.startswith(".") and not name.endswith(".gguf")
