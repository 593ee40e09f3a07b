"""What a configuration names, found before anything expensive starts."""

from ..tasks import AbstractTask, Rewards, load_rewards, load_task
from ._config import RunConfig


def load_task_and_rewards(config: RunConfig) -> tuple[AbstractTask, Rewards]:
    """The task, of which the first item has been made, and its reward functions.

    **Raises:**

    `UserError` if the task, one of its options or a reward cannot be found, or the task is empty.
    """
    task = load_task(config.task.name, config.seed, config.task.options)
    task.at(0)
    return task, load_rewards(config.reward.functions, config.reward.weights, task)
