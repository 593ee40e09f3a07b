"""From TOML files and overrides to a `RunConfig`, and back."""

import difflib
import importlib.resources
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..choices import Option, permitted_values
from ..drafts import DRAFT_KINDS, OWN_CLASS, describe_saved_draft, draft_options
from ..errors import CheckpointError, ConfigError, did_you_mean
from ..files import is_import_spec, user_path
from ._draft_options import LOOKUP, check_options
from ._lora import with_saved_adapter
from ._places import with_absolute_paths
from ._range import check_range
from ._renamed import with_new_names
from ._toml import parse_toml_value, toml_key, toml_value
from ._tree import DraftConfig, RunConfig, TaskConfig

_NOTES = {"grpo.num_generations": "a group of one has nothing to be compared with"}
_MAY_CHANGE = frozenset(
    {"steps", "num_train_epochs", "out", "save_steps", "save_total_limit", "compare", "reward.timeout", "tracking"}
) | {"log_completions_steps"}
_DATA = "set task.name to a file, a folder that datasets has saved, or org/name; from Python, run(..., task=dataset)"
# Names of TRL's GRPOConfig that are not near what they are here; docs/from_trl.md has them all.
_OF_TRL = {
    "steps_per_generation": "each batch of rollouts is one step, of grpo.num_iterations updates",
    "per_device_train_batch_size": "a step has grpo.prompts_per_step times grpo.num_generations completions",
    "max_steps": "set steps, the number of batches of rollouts",
    "bf16": 'set model.dtype = "bfloat16"; master weights and optimizer stay float32',
    "output_dir": "set out",
    "model_name_or_path": "set model.path",
    "model.name": "set model.path",
    "train_dataset": _DATA,
    "dataset": _DATA,
    "dataset_name": _DATA,
    "stop_strings": "set grpo.stop",
    "reward_funcs": "set reward.functions",
    "max_new_tokens": "set grpo.max_completion_length",
    "max_prompt_length": "prompts are never cut; one that leaves no room in the model's context is an error",
    "warmup_ratio": "set grpo.warmup_steps, a number of steps",
    "num_epochs": "set num_train_epochs, or steps, the number of batches of rollouts",
    "logging_steps": "every step is written to metrics.jsonl",
    "log_completions": "completions.jsonl has every completion; trackers get a table every log_completions_steps steps",
    "eval_steps": "set eval.every, with eval.task or eval.holdout",
    "eval_strategy": "set eval.task or eval.holdout, and eval.every for how often",
    "eval_dataset": "set eval.task to a file or a name, as task.name, or eval.holdout",
    "eval_on_start": "set eval.at_start",
    "num_generations_eval": "set eval.samples",
    "per_device_eval_batch_size": "an evaluation decodes as many completions at a time as a step",
    "load_best_model_at_end": "set save_best to a metric, such as eval/reward: the best policy is kept in best/",
    "metric_for_best_model": "set save_best to a metric, such as eval/reward: the best policy is kept in best/",
    "shuffle_dataset": "a task is shuffled in each epoch, by seed; see curriculum for another order",
    "dynamic_sampling": "set grpo.max_sample_batches, the most batches of prompts of a step",
    "filter_groups": "set grpo.max_sample_batches, the most batches of prompts of a step",
    "max_num_gen_batches": "set grpo.max_sample_batches, the most batches of prompts of a step",
    "report_to": 'set tracking, as in tracking = ["wandb"]; metrics.jsonl in the run folder is always written',
}


def load_config(
    path: Path | None = None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """The configuration of a run: a base, then overrides, then flags.

    The base is the file at `path`. Without one it is the packaged preset for the embedded default model, or, if a
    `model.path` is given, plain defaults. Options in `[task]` belong to the task named there, and are dropped where an
    override or a flag names another task; so are the options of a draft's kind. A saved draft in `draft.path` says its
    kind and its longest draft itself. Files and folders that are there become absolute paths.

    **Arguments:**

    - `path`: a TOML file, or `None`.
    - `overrides`: `"a.b=c"`, where `c` is a TOML value, or text that needs no quotes.
    - `flags`: dotted key to value; `None` means not given.

    **Returns:**

    A `RunConfig`.

    **Raises:**

    `ConfigError` with one line for each thing that is wrong.
    """
    overlay, given = dict[str, Any](), list[str]()
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set {text}: write it as key=value, such as --set grpo.learning_rate=1e-5")
        put(overlay, key, parse_toml_value(value.strip(), is_text=_is_text(key)))
        given.append(key)
    for key, value in (flags or {}).items():
        if value is not None:
            put(overlay, key, value)
            given.append(key)
    if [key for key in given if key in ("steps", "num_train_epochs")][-1:] == ["steps"]:
        overlay.pop("num_train_epochs", None)  # of the two the later one counts
    overlay = with_new_names(overlay)
    _check_keys(overlay)
    if path is not None:
        base = _read(path)
    elif overlay.get("model", {}).get("path"):
        base = {}
    else:
        preset = importlib.resources.files("eqx_specgrpo") / "assets" / "default.toml"
        base = tomllib.loads(preset.read_text(encoding="utf-8"))
    base = with_new_names(base)
    _check_keys(base)
    name = overlay.get("task", {}).get("name")
    if name is not None and name != base.get("task", {}).get("name", TaskConfig().name):
        base = {**base, "task": {}}
    if "steps" in overlay and "num_train_epochs" not in overlay:  # as TRL's max_steps goes before its epochs
        base = {key: value for key, value in base.items() if key != "num_train_epochs"}
    merged = _merge(_without_options(_of_saved(base), overlay), _of_saved(overlay))
    return validated(with_saved_adapter(merged))


def validated(tree: dict[str, Any]) -> RunConfig:
    """The configuration of nested dictionaries; raises `ConfigError`."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        said = "\n".join(_explain(detail) for detail in error.errors())
        # What was given may be of any length.
        raise ConfigError(re.sub(r"\S{200,}", lambda found: f"{found[0][:100]}...", said)) from None
    check_range(leaves(config))
    draft = config.draft
    if draft.options and is_import_spec(draft.kind):
        check_options(draft.kind, draft.ngram, draft.max_length, draft.options, complete=False)
    return with_absolute_paths(config)


def draft_flags(text: str) -> dict[str, Any]:
    """What `--draft` sets: the folder of a saved draft, one of the kinds, or a class of the user's own.

    **Raises:**

    `ConfigError` if it is none of these.
    """
    if text in DRAFT_KINDS or is_import_spec(text):
        return {"draft.kind": text, "draft.path": "none"}
    folder = user_path(text)
    if (folder / "draft.json").is_file():
        return {"draft.path": text}
    if folder.is_dir():
        raise ConfigError(
            f"there is no saved draft in the folder {text}, for it has no {folder / 'draft.json'}: name a folder that "
            "`specgrpo distill` has written, or draft/ of a run"
        )
    if folder.suffix == ".py" and folder.is_file():
        raise ConfigError(f"{text} is a file of Python: say which class of it is the draft, as in {text}:MyDraft")
    raise ConfigError(
        f"there is no saved draft in {text!r}, and no such kind of draft."
        f"{did_you_mean(text, DRAFT_KINDS)} (Or {OWN_CLASS}.)"
    )


def draft_config(text: str) -> DraftConfig:
    """The configuration of a draft that `--draft` names, all else at its default."""
    tree: dict[str, Any] = {}
    for key, value in draft_flags(text).items():
        put(tree, key, value)
    return validated(_of_saved(tree)).draft


def _of_saved(tree: dict[str, Any]) -> dict[str, Any]:
    """Completed by what a saved draft says of itself, where the same layer says nothing else."""
    draft = tree.get("draft", {})
    path = draft.get("path")
    if not isinstance(path, str) or path in ("none", "None"):
        return tree
    try:
        saved = describe_saved_draft(user_path(path))
    except CheckpointError:
        return tree  # Whoever loads it says what is wrong.
    shorter = {"length": saved["max_length"]} if saved["max_length"] < DraftConfig().length else {}
    return {**tree, "draft": {**saved, **shorter, **draft}}


def _without_options(base: dict[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Without the options of a kind of draft, where the overlay names another draft."""
    draft, over = base.get("draft", {}), overlay.get("draft", {})
    if not over.keys() & {"kind", "path"} or over.get("kind", "") == draft.get("kind", DraftConfig().kind):
        return base
    return {**base, "draft": {key: value for key, value in draft.items() if key not in ("options", "ngram")}}


def dump_config(config: RunConfig) -> str:
    """The configuration as TOML with a comment a key. `load_config` reads it back to an equal one."""
    top: list[str] = []
    sections: list[str] = []
    for key, field in RunConfig.model_fields.items():
        value = config.__dict__[key]
        if not isinstance(value, BaseModel):
            top.append(_line(key, value, field))
            continue
        sections += ["", f"[{key}]"]
        fields = type(value).model_fields
        for name, item in _items(value):
            if name != "options" or key != "draft":
                sections.append(_line(name, item, fields.get(name)))
    if config.draft.options:
        described = {option.name: option.description for option in _known_options(config.draft)}
        sections += ["", "[draft.options]"]
        sections += [_commented(name, item, described.get(name)) for name, item in config.draft.options.items()]
    return "\n".join(top + sections) + "\n"


def check_resume(old: RunConfig, new: RunConfig) -> None:
    """A run may be resumed with more steps or in a folder that was moved, and with no other change.

    **Raises:**

    `ConfigError` naming the first key that differs, with both values.
    """
    was, is_ = dict(leaves(old)), dict(leaves(new))
    if old.grpo.beta != 0 and "use_bias_correction_kl" not in old.grpo.model_fields_set:
        was["grpo.use_bias_correction_kl"] = False  # begun by a version that had no such key, and did without the ratio
    for key in [*was, *(key for key in is_ if key not in was)]:
        if key not in _MAY_CHANGE and was.get(key) != is_.get(key):
            raise ConfigError(
                f"{key} was {_show(was.get(key))} in the run to be resumed and is {_show(is_.get(key))} now: resume "
                "with the old value (only steps may rise), or start a new run with another --out"
            )


def _known_options(draft: DraftConfig) -> list[Option]:
    kinds = [draft.kind, *([LOOKUP] if draft.ngram else [])]
    return [option for kind in reversed(kinds) if kind in DRAFT_KINDS for option in draft_options(kind).known]


def _items(section: BaseModel) -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        yield name, section.__dict__[name]
    yield from (section.__pydantic_extra__ or {}).items()


def leaves(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value; options of a draft one by one."""
    for key, value in _items(config):
        if isinstance(value, BaseModel):
            for name, item in _items(value):
                if f"{key}.{name}" == "draft.options":
                    yield from ((f"draft.options.{option}", chosen) for option, chosen in item.items())
                else:
                    yield f"{key}.{name}", item
        else:
            yield key, value


def _show(value: Any) -> str:
    return "unset" if value is None else toml_value(value)


def _line(key: str, value: Any, field: FieldInfo | None) -> str:
    if value is None and field is not None and field.default is not None:
        value = "none"  # else it would be read back as the default
    return _commented(key, value, None if field is None else field.description)


def _commented(key: str, value: Any, comment: str | None) -> str:
    # TOML has no null: an unset key is shown, as a comment.
    line = f"# {toml_key(key)} =" if value is None else f"{toml_key(key)} = {toml_value(value)}"
    return line if not comment else f"{line}  # {comment}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}: check the path, or leave it out") from None
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of thousands of digits, deep nesting
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested dictionaries."""
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {parent} holds a value, so there is no {key} below it")
    tree[last] = value


def _merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overlay.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _sections() -> dict[str, type[BaseModel]]:
    return {
        key: field.annotation
        for key, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _field(key: str) -> FieldInfo | None:
    section, _, name = key.rpartition(".")
    model = _sections().get(section) if section else RunConfig
    return None if model is None else model.model_fields.get(name)


def _is_text(key: str) -> bool:
    field = _field(key)
    return field is not None and field.annotation in (str, str | None)


def _check_keys(tree: Mapping[str, Any]) -> None:
    sections = _sections()
    for key, value in tree.items():
        if key not in RunConfig.model_fields:
            raise ConfigError(_unknown(f"{key}.{next(iter(value))}" if isinstance(value, dict) and value else key))
        if key not in sections:
            if isinstance(value, dict):
                raise ConfigError(f"{key} is a single value, not a section: write {key} = {toml_value(_default(key))}")
            continue
        if not isinstance(value, dict):
            first = next(iter(sections[key].model_fields))
            raise ConfigError(f"{key} is a section: set one of its keys, such as {key}.{first}")
        if sections[key] is TaskConfig:
            continue
        for name in value:
            if name not in sections[key].model_fields:
                raise ConfigError(_unknown(f"{key}.{name}"))


def _default(key: str) -> Any:
    return "none" if (default := RunConfig.model_fields[key].default) is None else default


def _unknown(key: str) -> str:
    """One sentence with the nearest valid name: what TRL's name is here, the same word in another section, or a similar
    word."""
    sections = _sections()
    known = [name for name in RunConfig.model_fields if name not in sections]
    known += [f"{section}.{name}" for section, model in sections.items() for name in model.model_fields]
    known += dict.fromkeys(f"draft.options.{name}" for kind in DRAFT_KINDS for name in draft_options(kind).names)
    section, _, word = key.rpartition(".")
    if key in _OF_TRL or word in _OF_TRL:
        return f"unknown configuration key {key}: {_OF_TRL.get(key, _OF_TRL.get(word))}"
    near = [name for name in known if name.rpartition(".")[2] == word]
    if not near and section in sections:
        near = [f"{section}.{name}" for name in _most_alike(word, sections[section].model_fields)]
    if not near:
        leaves = _most_alike(word, [name.rpartition(".")[2] for name in known] + ([] if section else [*sections]))
        near = [name for name in [*known, *sections] if name.rpartition(".")[2] in leaves]
    if near:
        return f"unknown configuration key {key}: did you mean {' or '.join(near)}?"
    names = sections[section].model_fields if section in sections else RunConfig.model_fields
    return f"unknown configuration key {key}: the keys there are {', '.join(names)}"


def _most_alike(word: str, names: Iterable[str]) -> list[str]:
    """The name that is most like a word, if any is like it."""
    best = max(names, key=lambda name: _alike(word, name))
    return [best] if _alike(word, best) >= 0.7 else []


def _alike(word: str, name: str) -> float:
    """How alike two names are where they differ, from 0 to 1: `eval_steps` is not like `warmup_steps`, for what both
    have says nothing."""
    ours, theirs = word.split("_"), name.split("_")
    left = "_".join(part for part in ours if part not in theirs)
    right = "_".join(part for part in theirs if part not in ours)
    if not left or not right:
        left, right = "_".join(sorted(ours)), "_".join(sorted(theirs))
    elif min(len(left), len(right)) >= 4 and (left.startswith(right) or right.startswith(left)):
        return 0.9
    return difflib.SequenceMatcher(None, left, right).ratio()


def _explain(detail: Any) -> str:
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    places = [str(place) for place in detail["loc"]]
    key = ".".join(places[:2]) if places[0] in _sections() else places[0]
    field = _field(key)
    if field is None:
        return f"{key}: {detail['msg']}"
    note = f" ({_NOTES[key]})" if key in _NOTES else ""
    try:
        value = _show(detail["input"])
    except ConfigError:
        value = repr(detail["input"])
    item = f"[{detail['loc'][-1]}]" if isinstance(detail["loc"][-1], int) else ""
    return f"{key}{item} = {value}: it must be {permitted_values(field.annotation, field.metadata)}{note}"
