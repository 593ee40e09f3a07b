"""The reward for thinking first."""

import re
from collections.abc import Sequence
from typing import Any

from ._kind import RewardKind
from ._rewards import completion_text


def think_format_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """1 for a completion of the form `<think>...</think>...`, once each and with neither part blank, else 0."""
    del kwargs
    rewards = []
    for completion in completions:
        match = re.fullmatch(r"\s*<think>(.*?)</think>(.*)", completion_text(completion), re.DOTALL)
        parts = match.groups() if match else ("",)
        rewards.append(float(all(part.strip() and not re.search("</?think>", part) for part in parts)))
    return rewards


REWARD = RewardKind(
    think_format_reward,
    "1 for `<think>...</think>...` with neither part blank, else 0",
)
