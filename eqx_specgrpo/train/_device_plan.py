"""What each device of a run will hold, from shapes alone: no weights are read, and nothing is compiled."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from ..config import RunConfig, default_model_path, make_draft, make_policy_optimizer
from ..drafts import AbstractDraft
from ..errors import UserError
from ..grpo import UpdateBudget, UpdateChoice, choose_update, make_optimizer, padded_width, trained_part, update_bytes
from ..layout import DATA, MODEL, Layout, parameter_spec, parameter_specs, path_name
from ..models import (
    AbstractLanguageModel,
    AdaptedTransformer,
    Transformer,
    cast_weights,
    default_cache_dtype,
    load_model_config,
    load_tokenizer,
)
from ..runtime import Memory, device_memory

_FEATURES = 2 * 4  # float32, of each micro-batch and of all of them


class ParameterPlan(NamedTuple):
    """Arrays that are alike.

    **Arguments:**

    - `path`: theirs, with a star for the number of a layer.
    - `number`: how many there are.
    - `shape`: of one.
    - `master`, `copy`: along which axes of the mesh each of its axes is divided, where it is updated and where rollouts
        are decoded.
    """

    path: str
    number: int
    shape: tuple[int, ...]
    master: PartitionSpec
    copy: PartitionSpec


class DevicePlan(NamedTuple):
    """What a device holds.

    **Arguments:**

    - `data`, `model`: sizes of the mesh's axes.
    - `parameters`: of the policy and of the draft.
    - `kept`: bytes all the time, by name.
    - `rollout`, `update`: bytes besides while rollouts are decoded, and while the policy is updated. Estimates.
    - `memory`: of the device; `None` if it is not known.
    - `choice`: how the update goes about its memory.
    """

    data: int
    model: int
    parameters: list[ParameterPlan]
    kept: dict[str, int]
    rollout: dict[str, int]
    update: dict[str, int]
    memory: int | None
    choice: UpdateChoice

    @property
    def peak(self) -> int:
        """Of the larger phase, in bytes."""
        return sum(self.kept.values()) + max(sum(self.rollout.values()), sum(self.update.values()))


def plan_devices(
    config: RunConfig, *, count: int | None = None, memory: int | None = None, prompt_length: int = 256
) -> DevicePlan:
    """Plans a run on devices that are there, or on others.

    **Arguments:**

    - `count`: how many devices there are; by default those of JAX.
    - `memory`: bytes that each has; by default what the first one says, where `count` is not given either.
    - `prompt_length`: tokens of a prompt.

    **Raises:**

    `UserError` if the devices can't be divided as `devices.model` says, or the model or draft can't be loaded.
    """
    here = count is None
    count = jax.device_count() if count is None else count
    model_axis = config.devices.model
    if count % model_axis:
        raise UserError(
            f"devices.model = {model_axis}, but there are {count} devices, which can't be divided into groups of so "
            f"many: set devices.model to one of {[n for n in range(1, count + 1) if count % n == 0]}"
        )
    data = count // model_axis
    found = device_memory() if here and memory is None else None
    if found is not None:
        memory = found.total // count if found.is_shared else found.total
    policy, draft = _shapes(config)
    grpo, dtype = config.grpo, jnp.dtype(config.model.dtype)

    def held(tree: PyTree, layout: Layout) -> int:
        return _bytes_of_device(tree, data, model_axis, layout)

    def state(optimizer: Any, trained: PyTree) -> PyTree:
        return eqx.filter_eval_shape(optimizer.init, eqx.filter(trained, _is_inexact))

    target, drafting = (eqx.filter_eval_shape(cast_weights, _whole(one), dtype) for one in (policy, draft))
    learning = config.draft.enabled and config.draft.learns
    trained = trained_part(policy)
    kept = {
        "policy": held(policy, Layout.MASTER),
        "its optimizer": held(state(make_policy_optimizer(grpo), trained), Layout.MASTER),
        "draft": held(draft, Layout.MASTER),
        "its optimizer ": held(state(make_optimizer(), draft), Layout.MASTER) if learning else 0,
        "weights to compute with": held(target, Layout.MASTER),
    }
    shard_rows = -(-grpo.prompts_per_step // data) * grpo.num_generations
    at_once = shard_rows if grpo.max_rows is None else min(shard_rows, max(1, -(-grpo.max_rows // data)))
    positions = prompt_length + grpo.max_completion_length
    rollout = {
        "copies of the weights": held((target, drafting), Layout.COPY) if count > 1 else 0,
        "keys and values of the rows": _cache_bytes(target, at_once, positions, model_axis),
    }
    features = (1 + len(draft.layers)) * _FEATURES * shard_rows * positions * policy.hidden_size
    whole = sum(_size(x) for x in jax.tree.leaves(target)) // model_axis
    update = {
        "gradients": 2 * held(jax.tree.map(_as_float32, trained), Layout.MASTER),
        "weights gathered at use": 0 if data == 1 else whole,
        "features for the draft": features,
    }
    budget = None
    if memory is not None:
        budget = UpdateBudget.of(Memory(memory, memory, False), sum(kept.values()) + sum(update.values()))
    auto = grpo.gradient_checkpointing == "auto"
    longest = padded_width(grpo.max_completion_length) + prompt_length
    choice = choose_update(
        target,
        longest,
        budget,
        dtype=config.model.dtype,
        chunk=grpo.logprob_chunk,
        gradient_checkpointing=None if auto else bool(grpo.gradient_checkpointing),
        max_tokens=grpo.max_tokens_per_micro_batch,
    )
    most = min(choice.max_tokens or shard_rows * longest, shard_rows * longest)
    again = choice.gradient_checkpointing
    needed = update_bytes(
        target, max(most, longest), dtype=config.model.dtype, chunk=grpo.logprob_chunk, gradient_checkpointing=again
    )
    update["values of the layers"] = needed or 0
    parameters = list(_parameters({"policy": policy, "draft": draft}, data, model_axis))
    return DevicePlan(data, model_axis, parameters, kept, rollout, update, memory, choice)


def _shapes(config: RunConfig) -> tuple[AbstractLanguageModel, AbstractDraft]:
    """Policy and draft as a run has them, of shapes alone."""
    path = config.model.path or default_model_path()
    model_config = load_model_config(path, revision=config.model.revision)
    tokenizer = load_tokenizer(path, revision=config.model.revision)

    base = eqx.filter_eval_shape(Transformer, model_config, key=jr.key(0))
    draft = make_draft(config.draft, base, config.seed, tokenizer)  # small beside the policy
    draft = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x, draft)
    if config.lora.rank == 0:
        return base, draft
    base = eqx.filter_eval_shape(cast_weights, base, jnp.dtype(config.model.base_dtype))
    adapters = eqx.filter_eval_shape(lambda: config.lora.fresh(model_config, key=jr.key(0)))
    return eqx.filter_eval_shape(AdaptedTransformer, base, adapters), draft


def _whole(module: Any) -> Any:
    return module.base if isinstance(module, AdaptedTransformer) else module


def _is_inexact(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct) and jnp.issubdtype(x.dtype, jnp.inexact)


def _as_float32(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32) if _is_inexact(x) else None


def _size(x: Any) -> int:
    if not isinstance(x, jax.ShapeDtypeStruct) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return 0
    return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize


def _bytes_of_device(tree: PyTree, data: int, model: int, layout: Layout) -> int:
    sizes = {DATA: data, MODEL: model}

    def one(x: Any, spec: PartitionSpec | None) -> int:
        return 0 if spec is None else _size(x) // math.prod(sizes[axis] for axis in spec if axis is not None)

    specs = parameter_specs(tree, data, model, layout)
    return sum(jax.tree.leaves(jax.tree.map(one, tree, specs)))


def _cache_bytes(target: AbstractLanguageModel, rows: int, positions: int, model: int) -> int:
    dtype = default_cache_dtype(target)
    cache = eqx.filter_eval_shape(target.init_cache, rows, positions, dtype)
    divided = model if isinstance(target, Transformer) and target.config.num_kv_heads % model == 0 else 1
    return sum(_size(x) for x in jax.tree.leaves(cache)) // divided


def _parameters(tree: PyTree, data: int, model: int) -> Iterator[ParameterPlan]:
    """Arrays of the same path, but for the number of their layer, and of the same shape together."""
    found: dict[tuple[str, tuple[int, ...]], ParameterPlan] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            continue
        master, copy = (
            parameter_spec(path_name(path), leaf.shape, data, model, layout) for layout in (Layout.MASTER, Layout.COPY)
        )
        name = re.sub(r"\.\d+(?=\.|$)", ".*", path_name(path))
        before = found.get((name, leaf.shape))
        number = 1 if before is None else before.number + 1
        found[name, leaf.shape] = ParameterPlan(name, number, leaf.shape, master, copy)
    yield from found.values()
