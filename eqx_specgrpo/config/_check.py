"""What a configuration names, found before anything expensive starts."""

from pathlib import Path

from ..drafts import DraftError, describe_saved_draft
from ..files import import_callable, is_import_spec, user_path
from ..models import could_be_downloaded, locate
from ..records import check_unused
from ..tasks import AbstractTask, Rewards, load_rewards, load_task
from ._tree import DraftConfig, RunConfig


def load_task_and_rewards(config: RunConfig) -> tuple[AbstractTask, Rewards]:
    """The task, of which the first item has been made, and its reward functions.

    **Raises:**

    `UserError` if the task, one of its options or a reward cannot be found, or the task is empty.
    """
    task = load_task(config.task.name, config.seed, config.task.options)
    task.at(0)
    return task, load_rewards(config.reward.functions, config.reward.weights, task)


def check_places(config: RunConfig, resume: bool) -> None:
    """What a dry run can say of the model, the draft and the run folder without loading or downloading anything.

    **Raises:**

    `UserError` if one of them is not there, or the run folder is taken.
    """
    path = config.model.path
    if path and (user_path(path).exists() or not could_be_downloaded(path)):
        locate(path)
    if config.draft.path is not None:
        check_saved_draft(config.draft)
    if config.draft.path is None and config.draft.enabled and is_import_spec(config.draft.kind):
        import_callable(config.draft.kind, "draft", "class")
    if not resume:
        check_unused(Path(config.out))


def check_saved_draft(config: DraftConfig) -> None:
    """Raises `UserError` if the folder of a saved draft is none, or holds another draft than the configuration says.
    Loads nothing."""
    assert config.path is not None
    saved = describe_saved_draft(user_path(config.path))
    if saved["kind"] != config.kind:
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
