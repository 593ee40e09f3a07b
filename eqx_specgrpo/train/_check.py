"""What a configuration names, found before anything expensive starts."""

from pathlib import Path

from .._errors import CheckpointError
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
    if config.draft.path is not None and not (Path(config.draft.path) / "draft.json").is_file():
        raise CheckpointError(
            f"there is no saved draft in {config.draft.path}: name a folder that `specgrpo run` has written as draft/"
        )
    if not resume:
        check_unused(Path(config.out))
