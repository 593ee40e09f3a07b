"""What a script hands over in place of names, and the configuration in which it is named."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ..drafts import AbstractDraft, NoDraft
from ..errors import ConfigError, UserError
from ..models import Tokenizer, Transformer, check_tokenizer
from ..tasks import AbstractTask, Rewards, given_options, given_task, load_rewards, load_task
from ._given_names import given_name, is_given, reward_name
from ._load import draft_flags, leaves, load_config, put, validated
from ._tree import DraftConfig, RunConfig

ConfigLike: TypeAlias = RunConfig | Mapping[str, Any] | str | Path
RewardLike: TypeAlias = str | Callable[..., Any]
Policy: TypeAlias = tuple[Transformer, Tokenizer]


class Given(NamedTuple):
    """Objects that are used in place of what a configuration names; `None`: what it names.

    **Arguments:**

    - `task`: a task, a sequence of dictionaries, or what gives rows by number.
    - `rewards`: functions and names.
    - `policy`: a model and its tokenizer.
    - `draft`: a draft module.
    """

    task: Any = None
    rewards: tuple[RewardLike, ...] | None = None
    policy: Policy | None = None
    draft: AbstractDraft | None = None

    def check(self, config: RunConfig) -> None:
        """Raises `UserError` if the configuration names an object that was not handed over, and says what to do."""
        held = dict(zip(_ARGUMENTS, (self.task, self.rewards, self.policy, self.draft), strict=True))
        missing = {key: name for key, name in given_keys(config).items() if held[key] is None}
        if missing:
            what = ", ".join(f"{key} is {name!r}" for key, name in missing.items())
            raise UserError(
                f"{what}: handed over by a script, and not found by name. Go on from Python, and hand it over again: "
                f"{resume_command(config)}"
            )

    def load_task(self, config: RunConfig) -> AbstractTask:
        """The task that was handed over, or that is named."""
        if self.task is None:
            return load_task(config.task.name, config.seed, config.task.options)
        return given_task(self.task, config.seed, config.task.options, config.task.name)

    def load_rewards(self, config: RunConfig, task: AbstractTask) -> Rewards:
        """The rewards that were handed over, or that are named."""
        reward = config.reward
        functions = reward.functions if self.rewards is None else self.rewards
        return load_rewards(functions, reward.weights, task, reward.timeout or math.inf)

    def start_policy(self, dtype: str, *, copy: bool = True) -> Policy:
        """The policy that was handed over, with its matrices in `dtype`.

        **Arguments:**

        - `copy`: make a copy in any case, for a run whose updates take the weights for their own.
        """
        assert self.policy is not None
        model, tokenizer = self.policy
        check_tokenizer(model, tokenizer)

        def copied(x: Any) -> Any:
            if not isinstance(x, jax.Array):
                return x
            is_matrix = jnp.issubdtype(x.dtype, jnp.inexact) and x.ndim >= 2
            return jnp.array(x, dtype if is_matrix else x.dtype, copy=copy)

        return jax.tree.map(copied, model), tokenizer

    def start_draft(self) -> AbstractDraft | None:
        """A copy of the draft that was handed over, if one was."""
        return jax.tree.map(lambda x: jnp.array(x, copy=True) if isinstance(x, jax.Array) else x, self.draft)


NOTHING_GIVEN = Given()

_ARGUMENTS = {"task.name": "task", "reward.functions": "rewards", "model.path": "policy", "draft.kind": "draft"}


def given_keys(config: RunConfig) -> dict[str, str]:
    """The keys that name an object of a script, each with (the first of) its names."""
    functions = [name for name in config.reward.functions if is_given(name)]
    names = {
        "task.name": config.task.name,
        "reward.functions": functions[0] if functions else "",
        "model.path": config.model.path,
        "draft.kind": config.draft.kind if config.draft.enabled else "",
    }
    return {key: name for key, name in names.items() if is_given(name)}


def resume_command(config: RunConfig) -> str:
    """How to go on with a run: on the command line, or from Python if it was handed objects."""
    given = given_keys(config)
    if not given:
        return f"specgrpo run --resume --out {shlex.quote(config.out)}"
    arguments = "".join(f"{_ARGUMENTS[key]}=..., " for key in given)
    return f"eqx_specgrpo.run({{'out': {config.out!r}}}, {arguments}resume=True)"


def given_and_named(
    config: Any,
    *,
    task: Any = None,
    rewards: Any = None,
    policy: Any = None,
    draft: Any = None,
    resume: bool = False,
) -> tuple[RunConfig, Given]:
    """A configuration that names all of these, and those that a name does not lead to. Checks what they are.

    **Arguments:**

    - `config`: a `RunConfig`; a dictionary of its keys, nested or dotted, over the defaults of `load_config`; or the
        path of a TOML file.
    - `task`, `rewards`, `policy`, `draft`: objects, or names as the configuration has them.
    - `resume`: a dictionary is then over the configuration of the run in its `out`.

    **Raises:**

    `UserError` for an argument of the wrong type, `ConfigError` for a configuration that cannot be.
    """
    names: dict[str, Any] = {}
    given = Given(
        task=None if isinstance(task, str) else task,
        rewards=_as_tuple(rewards),
        policy=_checked_policy(policy),
        draft=None if isinstance(draft, str) else _checked_draft(draft),
    )
    if task is not None:
        names["task.name"] = task if isinstance(task, str) else given_name(task)
    if given.rewards is not None:
        names["reward.functions"] = [reward_name(function) for function in given.rewards]
    if given.policy is not None:
        names["model.path"] = given_name(given.policy[0])
    if isinstance(draft, str):
        names |= draft_flags(draft)
    elif isinstance(draft, NoDraft):
        names |= {"draft.kind": "none", "draft.path": "none"}
    elif draft is not None:
        names |= {"draft.kind": given_name(draft), "draft.path": "none", "draft.max_length": draft.max_length}
    return _named(config, names, given, resume), given


def _named(config: Any, names: dict[str, Any], given: Given, resume: bool) -> RunConfig:
    if isinstance(config, RunConfig):
        return _with_names(config, names, given) if names else config
    if isinstance(config, Mapping):
        flat = dict(_flat(config, ""))
        path = Path(flat.get("out", RunConfig().out)) / "config.toml" if resume else None
        return load_config(path, flags=_with_shorter_draft(flat, given) | names)
    if isinstance(config, str | Path):
        return load_config(Path(config), flags=names)
    raise UserError(
        f"config is of type {type(config).__name__}: give the path of a TOML file, a dictionary of keys, or what "
        "load_config returns"
    )


def _with_names(config: RunConfig, names: Mapping[str, Any], given: Given) -> RunConfig:
    """The configuration with other names. Options of what was named before are dropped."""
    tree: dict[str, Any] = {}
    kept = {f"task.{name}" for name in ("name", *given_options("task").names)}
    for key, value in leaves(config):
        dropped = ("task.name" in names and key.startswith("task.") and key not in kept) or (
            "draft.kind" in names and key.startswith("draft.options.")
        )
        if not dropped and value is not None:
            put(tree, key, value)
    for key, value in names.items():
        put(tree, key, None if value == "none" and key == "draft.path" else value)
    return validated(tree)


def _with_shorter_draft(flat: dict[str, Any], given: Given) -> dict[str, Any]:
    """With a draft length that the draft can make, where none is asked for."""
    draft = given.draft
    if draft is None or "draft.length" in flat or not 0 < draft.max_length < DraftConfig().length:
        return flat
    return flat | {"draft.length": draft.max_length}


def _flat(tree: Mapping[Any, Any], above: str) -> list[tuple[str, Any]]:
    """The leaves of nested dictionaries, by dotted keys, as TOML would have read them."""
    found = []
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ConfigError(f"the configuration has the key {key!r}: keys are text, such as 'grpo.learning_rate'")
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{above}{key}.")
        else:
            found.append((f"{above}{key}", _as_toml(value)))
    return found


def _as_toml(value: Any) -> Any:
    match value:
        case None:
            return "none"
        case list() | tuple():
            return [_as_toml(item) for item in value]
        case Mapping():
            return {key: _as_toml(item) for key, item in value.items()}
        case Path():
            return str(value)
        case np.generic():
            return value.item()
        case _:
            return value


def _as_tuple(rewards: Any) -> tuple[RewardLike, ...] | None:
    if rewards is None:
        return None
    every = tuple(rewards) if isinstance(rewards, Sequence) and not isinstance(rewards, str) else (rewards,)
    if not every:
        raise UserError("rewards is empty: give at least one function or name, or leave it out for the task's own")
    for reward in every:
        if not isinstance(reward, str) and not callable(reward):
            raise UserError(f"rewards has {reward!r}, which can't be called: give functions, or names as text")
    return every


def _checked_policy(policy: Any) -> Policy | None:
    if policy is None:
        return None
    match policy:
        case (Transformer() as model, Tokenizer() as tokenizer):
            return model, tokenizer
    raise UserError(
        f"policy is {_types(policy)}: give a model and its tokenizer, as load_pretrained returns them: policy=(model, "
        "tokenizer). A name belongs into model.path"
    )


def _checked_draft(draft: Any) -> AbstractDraft | None:
    if draft is None or isinstance(draft, AbstractDraft):
        return draft
    raise UserError(f"draft is {_types(draft)}: give a draft module, such as MedusaHeads.fresh(...), or a name")


def _types(value: Any) -> str:
    names = [type(item).__name__ for item in value] if isinstance(value, tuple | list) else [type(value).__name__]
    return f"of type {', '.join(names)}"
