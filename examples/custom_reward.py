"""A reward function of one's own, with TRL's signature.

From the command line:

    specgrpo run --reward arithmetic --reward examples/custom_reward.py:digits_reward --set reward.weights=[1.0,0.2]

or from Python:

    python examples/custom_reward.py --steps 20

A reward function is called with keyword arguments: `prompts`, `completions`, `completion_ids`, `trainer_state`,
`log_extra`, `log_metric` and every column of the task. It names those it needs, and returns one number a completion, or
`None` for one that it doesn't apply to.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import eqx_specgrpo as sg
from eqx_specgrpo.tasks import completion_text


def digits_reward(
    completions: Sequence[Any], log_extra: Callable[..., None], log_metric: Callable[..., None], **kwargs: Any
) -> list[float | None]:
    """The share of digits among the characters that aren't spaces; it doesn't apply where there are none.

    How many characters there are goes into `completions.jsonl`, the most of them into `metrics.jsonl`.
    """
    lengths = [len(completion_text(completion)) for completion in completions]
    log_extra("characters", lengths)
    log_metric("most_characters", max(lengths))
    rewards: list[float | None] = []
    for completion in completions:
        characters = [character for character in completion_text(completion) if not character.isspace()]
        digits = sum(character in "0123456789" for character in characters)
        rewards.append(digits / len(characters) if characters else None)
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Right answers first, and fewer words around them.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/custom_reward")
    arguments = parser.parse_args()
    # As the command line does: a second start is quick, and on a CPU updates are faster.
    sg.keep_compiled_programs()
    sg.keep_freed_memory()
    settings = {"steps": arguments.steps, "out": arguments.out, "reward.weights": [1.0, 0.2]}
    sg.run(settings, rewards=["arithmetic", digits_reward])
