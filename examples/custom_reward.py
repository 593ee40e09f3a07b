"""A reward function of one's own, with TRL's signature.

From the command line:

    specgrpo run --reward examples/custom_reward.py:digits_reward

A reward function is called with keyword arguments: `prompts`, `completions`, `completion_ids` and every column of the
task. It names those it needs, and returns one number a completion, or `None` for one that it doesn't apply to.
"""

from collections.abc import Sequence
from typing import Any

from eqx_specgrpo.tasks import completion_text


def digits_reward(completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """The share of digits among the characters that aren't spaces; it doesn't apply where there are none."""
    rewards: list[float | None] = []
    for completion in completions:
        characters = [character for character in completion_text(completion) if not character.isspace()]
        digits = sum(character in "0123456789" for character in characters)
        rewards.append(digits / len(characters) if characters else None)
    return rewards
