"""What a configuration names, found before anything expensive starts."""

from pathlib import Path

from .._import_spec import import_callable, is_import_spec
from ..drafts import describe_saved_draft
from ..models import could_be_downloaded, locate
from ..tasks import AbstractTask, Rewards, load_rewards, load_task
from ._config import RunConfig
from ._run_folder import check_unused


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
    if path and (Path(path).expanduser().exists() or not could_be_downloaded(path)):
        locate(path)
    if config.draft.path is not None:
        describe_saved_draft(Path(config.draft.path).expanduser())
    if config.draft.path is None and config.draft.enabled and is_import_spec(config.draft.kind):
        import_callable(config.draft.kind, "draft", "class")
    if not resume:
        check_unused(Path(config.out))
