"""What a configuration names, found before anything expensive starts."""

import math
import os
import shutil
from importlib import resources
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr

from ..drafts import DraftError, check_saved_sizes, describe_saved_draft
from ..errors import UserError
from ..files import absolute_spec, is_import_spec, user_path
from ..grpo import make_optimizer, optimizer_bytes
from ..models import Transformer, load_model_config
from ..records import check_trackers, check_unused
from ..tasks import AbstractTask, Rewards, first_items, hold_out, keep_apart, load_rewards, load_task
from ._draft_options import check_options
from ._given import NOTHING_GIVEN, Given
from ._lora import check_saved_adapter
from ._tree import DraftConfig, RunConfig


def load_task_and_rewards(config: RunConfig, given: Given = NOTHING_GIVEN) -> tuple[AbstractTask, Rewards]:
    """The task, of which the first item has been made, and its reward functions.

    **Raises:**

    `UserError` if the task, one of its options or a reward cannot be found, the task is empty, or has not a column that
    a reward needs.
    """
    task, _ = load_split(config, given)
    columns = task.at(0).columns
    rewards = given.load_rewards(config, task)
    rewards.check_columns(columns)
    return task, rewards


def load_split(config: RunConfig, given: Given = NOTHING_GIVEN) -> tuple[AbstractTask, AbstractTask | None]:
    """The task to train on, and the items to measure on, which share no prompt; `None` without `[eval]`.

    **Raises:**

    `UserError` if a task or one of its options cannot be found, one of the two is empty, or they overlap.
    """
    given.check(config)
    return split_task(config, given.load_task(config))


def split_task(config: RunConfig, task: AbstractTask) -> tuple[AbstractTask, AbstractTask | None]:
    """[`load_split`][], of a task that is there already."""
    if config.eval.holdout:
        return hold_out(task, config.eval.holdout)
    if config.eval.task:
        return keep_apart(task, _task_of_evaluation(config), config.eval.limit)
    return task, None


def load_held_out(
    config: RunConfig, given: Given = NOTHING_GIVEN, *, apart: bool = True
) -> tuple[AbstractTask, Rewards] | None:
    """The items to measure on, and the reward functions that judge; `None` without `[eval]`.

    **Arguments:**

    - `apart`: from the task to train on. Where nothing is trained, `eval.task` is all that counts.

    **Raises:**

    `UserError`, as [`load_split`][] and [`load_task_and_rewards`][].
    """
    evaluation = config.eval
    if evaluation.task and not apart:
        task = first_items(_task_of_evaluation(config), evaluation.limit)
    else:
        _, task = load_split(config, given)
    if task is None:
        return None
    if evaluation.functions:
        rewards = load_rewards(evaluation.functions, None, task, config.reward.timeout or math.inf)
    else:
        rewards = given.load_rewards(config, task)
    rewards.check_columns(task.example(0).columns)
    return task, rewards


def _task_of_evaluation(config: RunConfig) -> AbstractTask:
    evaluation = config.eval
    of_run = config.task.options if evaluation.task == config.task.name else {}
    seed = config.seed if evaluation.seed is None else evaluation.seed
    return load_task(evaluation.task, seed, {**of_run, **evaluation.options})


def with_steps_of_epochs(config: RunConfig, task: AbstractTask) -> RunConfig:
    """The configuration with as many `steps` as `num_train_epochs` comes to, if that is set.

    The last step is a whole one: it may reach into a further epoch. Dynamic sampling may take more items in a step, and
    then goes through them more often in as many steps.

    **Raises:**

    `UserError` if the task has no end.
    """
    epochs, prompts = config.num_train_epochs, config.grpo.prompts_per_step
    if epochs is None:
        return config
    if task.size is None:
        raise UserError(
            f"num_train_epochs = {epochs:g}, but the task has no end: set steps instead, or give the task a size"
        )
    return config.model_copy(update={"steps": max(1, math.ceil(epochs * task.size / prompts))})


def check_places(config: RunConfig, resume: bool) -> None:
    """What a dry run can say of the model, the draft and the run folder without loading weights. Of a model by name its
    `config.json` is downloaded, if it is not here.

    **Raises:**

    `UserError` if one of them is not there or cannot be used, the draft or `[lora]` does not fit the model, a tracker
    is not installed, the run folder is taken or cannot be written, or the disk has no room for the checkpoints.
    """
    model = load_model_config(config.model.path or default_model_path(), revision=config.model.revision)
    if config.model.adapter is not None:
        check_saved_adapter(config.model.adapter, config.lora)
    if config.draft.path is not None:
        check_saved_draft(config.draft)
        check_saved_sizes(user_path(config.draft.path), model.hidden_size, model.vocab_size)
    check_draft_options(config.draft)
    check_trackers(config.tracking)
    out = Path(config.out)
    if not resume:
        check_unused(out)
    skeleton = eqx.filter_eval_shape(Transformer if config.lora.rank == 0 else config.lora.fresh, model, key=jr.key(0))
    weights = sum(4 * array.size for array in jax.tree.leaves(skeleton))
    state = optimizer_bytes(make_optimizer(config.grpo.optim), skeleton)
    most = math.ceil(config.steps / config.save_steps)
    kept = most if config.save_total_limit is None else config.save_total_limit
    _check_room(out, (weights + state) * (1 if resume else kept + 1), kept)


_NUMBERS = {1: "one", 2: "two", 3: "three"}


def _check_room(out: Path, needed: int, kept: int) -> None:
    """Raises `UserError` if the run folder can't be made, or its disk has less than so many bytes free."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"the run folder {out} cannot be written: {place} is not writable; choose another --out")
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"the disk of the run folder {out} has {_in_words(free)} free, but this model's checkpoints need "
            f"{_in_words(needed)}: {_NUMBERS.get(kept, kept)} are kept while the next is written. Make room there, "
            "set a smaller save_total_limit, or choose another --out"
        )


def _in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def default_model_path() -> Path:
    """The folder of the embedded default model."""
    return Path(str(resources.files("eqx_specgrpo") / "assets" / "default_model"))


def default_draft_path() -> Path:
    """The folder of trained Medusa heads for the embedded default model, up to four tokens ahead."""
    return Path(str(resources.files("eqx_specgrpo") / "assets" / "default_draft"))


def check_draft_options(draft: DraftConfig) -> None:
    """Raises `UserError` if the class of a draft of the user's own can't be found, or does not take its options. Those
    of the library's kinds have been checked with the configuration."""
    if draft.path is None and draft.enabled and is_import_spec(draft.kind):
        check_options(draft.kind, draft.ngram, draft.max_length, draft.options, complete=True)


def check_saved_draft(config: DraftConfig) -> None:
    """Raises `UserError` if the folder of a saved draft is none, or holds another draft than the configuration says.
    Loads nothing."""
    assert config.path is not None
    saved = describe_saved_draft(user_path(config.path))
    kind = absolute_spec(config.kind) if is_import_spec(config.kind) else config.kind
    if saved["kind"] != kind:
        raise DraftError(
            f"the draft in {config.path} is of kind {saved['kind']!r}, but draft.kind is {config.kind!r}: set "
            f"draft.kind={saved['kind']}, or name another draft"
        )
    if saved["max_length"] != config.max_length:
        raise DraftError(
            f"the draft in {config.path} has a max_length of {saved['max_length']}, but draft.max_length is "
            f"{config.max_length}: set draft.max_length={saved['max_length']} (and a draft.length of at most that), or "
            "name another draft"
        )
