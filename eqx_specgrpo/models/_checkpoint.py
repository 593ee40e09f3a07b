"""Loading and saving: the verbs."""

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike
from safetensors import SafetensorError

from ..errors import UserError
from ._config import TransformerConfig
from ._config_keys import FOLDER_FILES
from ._gguf import GGUFFile
from ._gguf_tokenizer import tokenizer_from_gguf
from ._hf_config import config_from_hf
from ._hf_families import FUSED
from ._hf_write import config_to_hf
from ._keys import check_files
from ._locate import locate, locate_config
from ._safetensors import folder_tensors, read_json, write_tensors
from ._tokenizer import Tokenizer, check_tokenizer
from ._tokenizer_files import tokenizer_from_folder
from ._transformer import Transformer
from ._weights import Place, fill_model, model_tensors, on_default_device


def load_model(
    path: str | Path,
    dtype: DTypeLike = jnp.float32,
    *,
    revision: str | None = None,
    place: Place = on_default_device,
) -> Transformer:
    """Loads a pretrained model.

    Every tensor of the checkpoint must be used and every parameter filled. Nothing in a checkpoint is executed.

    **Arguments:**

    - `path`: a Hugging Face folder (`config.json` with `model.safetensors` or shards and their index; the families are
        in `docs/checkpoints.md`), a `.gguf` file (extra `gguf`), or `org/name`, which huggingface_hub downloads.
    - `dtype`: of the matrices, whatever they are stored in. Norms and biases are always float32.
    - `revision`: branch, tag or commit of a model by name.
    - `place`: puts an array on devices, given its path in the model, such as `blocks.0.mlp.down.weight`, and the array
        on the host. A mesh's own, `AbstractDeviceMesh.place`, divides it over devices. By default all of it is put
        where JAX puts arrays.

    **Returns:**

    A [`Transformer`][].

    **Raises:**

    `CheckpointError`, naming the file and the tensors or keys in question.
    """
    path = locate(path, revision)
    if path.is_dir():
        return _model_from_folder(path, dtype, place)
    return _model_from_gguf(GGUFFile(path), dtype, place)


def load_model_config(path: str | Path, *, revision: str | None = None) -> TransformerConfig:
    """Reads what a checkpoint says of its model, and no weights. Of `org/name` only `config.json` is downloaded.

    **Raises:**

    `CheckpointError` as `load_model`.
    """
    path = locate_config(path, revision)
    if path.is_dir():
        return config_from_hf(read_json(path / "config.json"), path / "config.json")
    return GGUFFile(path).config()


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> Tokenizer:
    """Loads the tokenizer of a checkpoint.

    **Arguments:**

    - `path`: as for `load_model`. From a folder, `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`
        are read, and for end-of-sequence ids also `generation_config.json` and `config.json`.

    **Raises:**

    `CheckpointError` if there is none, or none that can be read.
    """
    path = locate(path, revision)
    if path.is_dir():
        return tokenizer_from_folder(path)
    file = GGUFFile(path)
    file.check_keys()
    return tokenizer_from_gguf(file)


def load_pretrained(
    path: str | Path,
    dtype: DTypeLike = jnp.float32,
    *,
    revision: str | None = None,
    place: Place = on_default_device,
) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of one checkpoint, checked against one another; see `load_model` and `load_tokenizer`."""
    path = locate(path, revision)
    if path.is_dir():
        tokenizer = tokenizer_from_folder(path)
        model = _model_from_folder(path, dtype, place)
    else:
        file = GGUFFile(path)
        tokenizer = tokenizer_from_gguf(file)
        model = _model_from_gguf(file, dtype, place)
    check_tokenizer(model, tokenizer)
    return model, tokenizer


def _model_from_folder(folder: Path, dtype: DTypeLike, place: Place) -> Transformer:
    check_files(folder, FOLDER_FILES)
    values = read_json(folder / "config.json")
    config = config_from_hf(values, folder / "config.json")
    tensors, fused = folder_tensors(folder), values["model_type"] in FUSED
    return fill_model(config, tensors, folder, dtype, fused=fused, place=place)


def _model_from_gguf(file: GGUFFile, dtype: DTypeLike, place: Place) -> Transformer:
    config = file.config()
    return fill_model(config, file.tensors(config), file.path, dtype, place=place)


def save_model(
    model: Transformer,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    source: str | Path | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Writes a Hugging Face folder, from which transformers (and `load_model`) builds the same function.

    The folder is written aside and renamed into place, so that it is either the old one or the new one, and whole.

    **Arguments:**

    - `model`: in any dtype.
    - `folder`: to create, or to replace if it holds a checkpoint.
    - `tokenizer`: written along, with its chat template and end-of-sequence ids.
    - `source`: folder of the checkpoint that the model came from; the sampling defaults in its
        `generation_config.json` are kept.
    - `dtype`: of the stored matrices, float32 or bfloat16. Norms and biases are stored as they are.
    - `shard_bytes`: the largest file of weights to write.

    **Raises:**

    `UserError` if the folder can't be written, a full disk included; nothing that was there before is lost then.
    """
    dtype = np.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise UserError(f"save_model: dtype is {dtype.name}, but must be float32 or bfloat16")
    config = config_to_hf(model.config, dtype.name)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
        ids = tokenizer.generation_ids()
    generation: dict[str, Any] = {}
    if source is not None and (Path(source) / "generation_config.json").is_file():
        generation = read_json(Path(source) / "generation_config.json")
    with _replace_folder(Path(folder)) as aside:
        write_tensors(model_tensors(model, dtype, fused=config["model_type"] in FUSED), aside, shard_bytes)
        if tokenizer is not None:
            generation.update(ids)
        for name, values in (("config.json", {**config, **ids}), ("generation_config.json", generation)):
            (aside / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(aside)


@contextlib.contextmanager
def _replace_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place at the end if nothing was raised."""
    if (
        folder.exists()
        and not (folder / "config.json").is_file()
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise UserError(f"{folder} exists and is not a checkpoint, so it is not replaced; give another folder")
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in aside.iterdir():
            _flush(path)
        if folder.exists():
            old = aside.with_name(aside.name + ".old")
            os.rename(folder, old)
            try:
                os.rename(aside, folder)
            except OSError:
                os.rename(old, folder)
                raise
            shutil.rmtree(old)
        else:
            os.rename(aside, folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error):
            raise UserError(
                f"the disk is full: {folder} could not be written, and nothing was replaced. Free some space, or "
                "choose a folder on another disk"
            ) from error
        raise UserError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    """Forces a file or a folder's entries to the disk; without it, a rename can outlive the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
