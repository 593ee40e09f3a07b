"""A reward function of one's own, with TRL's signature.

From the command line:

    specgrpo run --reward arithmetic --reward examples/custom_reward.py:digits_reward --set reward.weights=[1.0,0.2]

or from Python:

    python examples/custom_reward.py --steps 20

A reward function is called with keyword arguments: `prompts`, `completions`, `completion_ids` and every column of the
task. It names those it needs, and returns one number a completion, or `None` for one that it doesn't apply to.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from eqx_specgrpo.config import load_config
from eqx_specgrpo.runtime import keep_freed_memory
from eqx_specgrpo.tasks import completion_text
from eqx_specgrpo.train import run


def digits_reward(completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """The share of digits among the characters that aren't spaces; it doesn't apply where there are none."""
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
    keep_freed_memory()  # as the command line does: on a CPU, updates are faster by it
    settings = {
        "steps": arguments.steps,
        "out": arguments.out,
        "reward.functions": ["arithmetic", f"{__file__}:digits_reward"],
        "reward.weights": [1.0, 0.2],
    }
    run(load_config(flags=settings))
