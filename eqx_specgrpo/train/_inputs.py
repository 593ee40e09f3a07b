"""What a run is computed from and does not keep: fingerprinted at each start, and compared when it goes on."""

import inspect
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import NOTHING_GIVEN, Given, RunConfig, default_model_path, draft_spec
from ..errors import UserError
from ..files import is_import_spec, user_path
from ..models import locate
from ..records import AbstractRunFolder, changed_inputs, checkpointed_steps, fingerprint_file
from ..tasks import AbstractTask
from ._given_inputs import GIVEN_WEIGHTS, given_inputs

_TOKENIZER = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
    "tokenizer.model",
)  # fmt: skip
_MODEL, _WEIGHTS, _HELD_OUT = "model: ", ".safetensors", "evaluation"


class ChangedInputWarning(UserWarning):
    """Something that a resumed run is computed from is not what it was."""


def run_inputs(
    config: RunConfig, task: AbstractTask, held_out: AbstractTask | None = None, given: Given = NOTHING_GIVEN
) -> dict[str, dict[str, Any]]:
    """Fingerprints, by name, of the task, of the items that are measured on, of the files of reward functions and of a
    draft class, and of the files of the starting model. What such a file imports is not among them. Of what a script
    has handed over: of the source of its functions, and of its model's tokenizer and weights."""
    inputs: dict[str, dict[str, Any]] = {
        "task": {"path": config.task.name, "items": task.size, "digest": task.fingerprint()}
    }
    if held_out is not None:
        place = config.eval.task or config.task.name
        inputs[_HELD_OUT] = {"path": place, "items": held_out.size, "digest": held_out.fingerprint()}
    # By number: how a file is written may change with the folder that a run is resumed from.
    specs = {f"reward {number}": spec for number, spec in enumerate(config.reward.functions, 1)}
    own_draft = draft_spec(config.draft) if config.draft.enabled else None
    if own_draft is not None:
        specs["draft"] = own_draft
    for name, spec in specs.items():
        source = _source(spec)
        if source is not None:
            inputs[name] = fingerprint_file(source)
    inputs |= given_inputs(config, given)
    for path in _model_files(config) if given.policy is None else []:
        inputs[_MODEL + path.name] = fingerprint_file(path)
    if config.model.adapter is not None:
        for path in sorted(user_path(config.model.adapter).glob("adapter_*")):
            inputs[_MODEL + path.name] = fingerprint_file(path)
    return inputs


def _model_files(config: RunConfig) -> list[Path]:
    place = locate(config.model.path, config.model.revision) if config.model.path else default_model_path()
    if place.is_file():
        return [place]
    return [path for path in sorted(place.iterdir()) if path.name in _TOKENIZER or path.suffix == _WEIGHTS]


def check_inputs(
    folder: AbstractRunFolder, config: RunConfig, now: Mapping[str, Mapping[str, Any]], *, accept: bool
) -> None:
    """Compares what a resumed run would be computed from with what its steps up to now were.

    **Arguments:**

    - `now`: from [`run_inputs`][].
    - `accept`: warn where there would be an error.

    **Raises:**

    `UserError` where going on would give something else than the run has begun: with another number of items, whose
    order depends on it; another tokenizer or configuration of the model; other starting weights, if the KL is measured
    from them. Other changes (of an item, a reward, a draft's class) are a [`ChangedInputWarning`][]: they are what
    mending something looks like.
    """
    steps = checkpointed_steps(folder.path)
    if steps == 0:
        return  # Nothing is kept that anything could differ from.
    then = folder.read_inputs(steps)
    if then is None:
        warnings.warn(
            f"{folder.path} does not say what its first {steps} steps were computed from (an earlier version began "
            "it): whether the task's data, the rewards or the starting model have changed since is not known",
            ChangedInputWarning,
            stacklevel=2,
        )
        return
    errors = []
    for name in changed_inputs(then, now):
        text, grave = _explain(name, then.get(name, {}), now.get(name, {}), steps, config)
        if grave and not accept:
            errors.append(text)
        else:
            warnings.warn(text, ChangedInputWarning, stacklevel=2)
    if errors:
        errors.append(
            "put back what was there, start a new run with another --out, or go on all the same with --accept-changes"
        )
        raise UserError("\n".join(errors))


def _explain(
    name: str, then: Mapping[str, Any], now: Mapping[str, Any], steps: int, config: RunConfig
) -> tuple[str, bool]:
    """What a change means, and whether going on is an error."""
    place = now.get("path") or then.get("path")
    since = f"since the run did its first {steps} steps"
    if name == "task":
        if then.get("items") != now.get("items"):
            return (
                f"the task {place} had {then.get('items')} items and has {now.get('items')} now: the order of all "
                "items depends on their number, so the run would see items of this epoch again, and miss others",
                True,
            )
        return f"the items of the task {place} have changed {since}; their order is as it was", False
    if name == _HELD_OUT:
        return (
            f"the items of the evaluation, of {place}, have changed {since}: its figures from here on cannot be "
            "compared with those before",
            False,
        )
    if not name.startswith(_MODEL):
        return f"the file of {name}, {place}, has changed {since}: from here on the new one counts", False
    how = "has changed" if then and now else "is new" if now else "is gone"
    if not name.endswith((_WEIGHTS, GIVEN_WEIGHTS)):
        return f"{place}, of the starting model, {how} {since}: tokens or prompts may mean something else now", True
    if config.lora.rank > 0:
        return f"{place}, of the starting model, {how} {since}: the adapters would be put on another base", True
    if config.grpo.beta != 0:
        return f"{place}, of the starting model, {how} {since}: the KL would be measured from another model", True
    return (
        f"{place}, of the starting model, {how} {since}; without grpo.beta only the checkpoint's weights count",
        False,
    )


def _source(spec: str) -> Path | None:
    """The file of a function or class of the user's own that has been imported; `None` for what has none."""
    if not is_import_spec(spec):
        return None
    source = spec.rpartition(":")[0]
    if source.endswith(".py"):
        return user_path(source)
    try:
        found = inspect.getsourcefile(sys.modules[source.rpartition("/")[2]])
    except (KeyError, TypeError):
        return None
    return None if found is None else Path(found)
