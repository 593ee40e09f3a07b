"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, in a folder of their own."""

import json
import math
import shutil
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import CheckpointError, UserError
from ._adapted_linear import LowRank
from ._keys import check_keys, harmless, read, refused
from ._lora import Adapters, layer_shapes, short_names
from ._safetensors import listing, read_json
from ._transformer import Transformer

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _BASE = "base_model.model.", "base_weights_crc32"
_KEYS = (
    read("the kind of adapter, LORA", "peft_type"),
    read("the rank", "r"),
    read("the scale, over the rank, or over its root", "lora_alpha", "use_rslora"),
    read("which layers, besides the names of the tensors", "target_modules"),
    harmless("names and versions", "base_model_name_or_path", "revision", "task_type", "peft_version", "auto_mapping"),
    harmless("of training, and of memory", "lora_dropout", "inference_mode", "runtime_config", "ephemeral_gpu_offload"),
    harmless("the tensors' names say it", "layers_to_transform", "layers_pattern", "exclude_modules"),
    refused(
        "it changes how the factors are used", "use_dora", "use_qalora", "alora_invocation_tokens", "velora_config"
    ),
    refused("it adds weights that are no factors", "modules_to_save", "trainable_token_indices", "lora_bias"),
    refused("only one rank and scale for all layers is supported", "rank_pattern", "alpha_pattern", neutral=(None, {})),
    refused("biases must not be trained", "bias", neutral=(None, "none")),
    refused("factors of weights themselves", "target_parameters", neutral=(None, [])),
    refused("layers are repeated", "layer_replication"),
    refused("weights are transposed", "fan_in_fan_out"),
    refused(
        "it takes something off the base's weights",
        "init_lora_weights",
        neutral=(None, True, False, "gaussian", "eva", "orthogonal"),
    ),
    harmless("of such a start", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "monteclora_config"),
    harmless(
        "of sharing, and of experiments", "arrow_config", "ensure_weight_tying", "megatron_config", "megatron_core"
    ),
    harmless("of 4-bit weights", "qalora_group_size"),
)


def describe_adapter(folder: Path) -> dict[str, Any]:
    """Rank, `alpha` (so that `alpha / rank` is the scale) and targets of a saved adapter. Reads no tensors.

    **Raises:**

    `CheckpointError` if there is none, or none of this kind.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no adapter in {folder}, for it is no folder: name one with {_CONFIG}")
    path = folder / _CONFIG
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {values.get('peft_type')!r}, but only LORA is supported")
    check_keys(values, _KEYS, path)
    rank, alpha, targets = values.get("r"), values.get("lora_alpha"), values.get("target_modules")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{path}: r is {rank!r} and lora_alpha is {alpha!r}; they must be a rank and a number")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise CheckpointError(f"{path}: target_modules is {targets!r}, but must be a pattern or a list of names")
    alpha = alpha * math.sqrt(rank) if values.get("use_rslora") else alpha
    return {"rank": rank, "alpha": float(alpha), "targets": targets if isinstance(targets, str) else sorted(targets)}


def load_adapter(folder: Path, base: Transformer) -> Adapters:
    """Reads adapters that PEFT or `save_adapter` has written.

    **Arguments:**

    - `folder`: with `adapter_config.json` and `adapter_model.safetensors`.
    - `base`: what they belong to.

    **Raises:**

    `CheckpointError` if they can't be read, or belong to another base: one of other sizes or layers, or, where
    `save_adapter` has noted it, of other weights.
    """
    about, path = describe_adapter(folder), folder / _TENSORS
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: copy the whole folder; an adapter that is a pickle is never read")
    try:
        with safe_open(path, framework="numpy") as file:
            noted = (file.metadata() or {}).get(_BASE)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); copy it again") from error
    shapes = layer_shapes(base.config)
    names = sorted({_layer_of(name, path) for name in tensors})
    layers = {name: _factors(name, tensors, shapes, about["rank"], path) for name in shapes if name in names}
    strange = [name for name in names if name not in shapes]
    if strange or not layers:
        raise CheckpointError(
            f"the adapter in {folder} is for another base: it adapts {listing(strange) or 'nothing'}, and this model "
            f"has no such layers. Name the base that it was trained with (--model), or another adapter"
        )
    if noted is not None and noted != base_checksum(base):
        raise CheckpointError(
            f"the adapter in {folder} is for another base: one of the same sizes, but with other weights than this "
            "model's. Name the base that it was trained with (--model), or another adapter"
        )
    return Adapters(layers, about["rank"], about["alpha"])


def _layer_of(name: str, path: Path) -> str:
    for end in (".lora_A.weight", ".lora_B.weight"):
        if name.startswith(_PREFIX) and name.endswith(end):
            return name.removeprefix(_PREFIX).removesuffix(end)
    raise CheckpointError(f"{path} has a tensor {name}, which is no factor of a linear layer's weight")


def _factors(
    name: str, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, int]], rank: int, path: Path
) -> LowRank:
    size, in_size = shapes[name]
    found = []
    for letter, shape in (("A", (rank, in_size)), ("B", (size, rank))):
        tensor = tensors.get(f"{_PREFIX}{name}.lora_{letter}.weight")
        if tensor is None:
            raise CheckpointError(f"{path} has only one of the two factors of {name}: copy it again")
        if tensor.shape != shape:
            raise CheckpointError(
                f"the adapter in {path.parent} is for another base: lora_{letter} of {name} is {list(tensor.shape)}, "
                f"and for this model it would be {list(shape)}. Name the base that it was trained with (--model), or "
                "another adapter"
            )
        found.append(jnp.asarray(tensor.astype(np.float32)))
    skeleton = eqx.filter_eval_shape(LowRank, in_size, size, rank, key=jax.random.key(0))
    return eqx.tree_at(lambda p: (p.down, p.up), skeleton, found)


def save_adapter(adapters: Adapters, folder: Path, base: Transformer, base_name: str) -> None:
    """Writes adapters for `peft.PeftModel.from_pretrained`, and for `load_adapter`.

    The folder is written aside and renamed into place.

    **Arguments:**

    - `folder`: to create, or to replace if it holds an adapter.
    - `base`, `base_name`: what they belong to; a checksum of some of its weights is noted beside the tensors.

    **Raises:**

    `UserError` if the folder can't be written.
    """
    if folder.exists() and not (folder / _CONFIG).is_file():
        raise UserError(f"{folder} exists and is not an adapter, so it is not replaced; give another folder")
    every, own = list(layer_shapes(base.config)), list(adapters.layers)
    short = short_names(own)
    # By their last words only if these mean no other layers; PEFT matches either.
    is_exact = all(name in adapters.layers for name in every if name.rpartition(".")[2] in short)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": adapters.rank,
        "lora_alpha": int(adapters.alpha) if adapters.alpha == int(adapters.alpha) else adapters.alpha,
        "lora_dropout": 0.0,
        "target_modules": short if is_exact else own,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    tensors = {}
    for name, part in adapters.layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(part.down)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(part.up)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir(parents=True)
        save_file(tensors, aside / _TENSORS, metadata={"format": "pt", _BASE: base_checksum(base)})
        (aside / _TENSORS).chmod(0o644)  # safetensors makes it readable for its owner alone
        (aside / _CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            old = aside.with_name(aside.name + ".old")
            folder.rename(old)
            aside.rename(folder)
            shutil.rmtree(old)
        else:
            aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} could not be written: {error}. Free some space, or choose another disk") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def base_checksum(base: Transformer) -> str:
    """A CRC-32 of the first row of each matrix, in bfloat16: the same for a base in float32 or bfloat16."""
    checksum = 0
    for leaf in jax.tree.leaves(eqx.filter(base, eqx.is_inexact_array)):
        if leaf.ndim >= 2:
            checksum = zlib.crc32(np.asarray(leaf[0]).astype(bfloat16).tobytes(), checksum)
    return f"{checksum:08x}"
