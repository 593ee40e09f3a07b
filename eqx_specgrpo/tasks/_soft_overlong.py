"""The punishment of completions that are too long."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ._kind import RewardKind
from ._reward_call import RewardFunction


def soft_overlong(max_completion_length: int, soft_punish_cache: int) -> RewardFunction:
    """The soft punishment of overlong completions of DAPO, in tokens.

    Zero up to `max_completion_length - soft_punish_cache` tokens, from there linearly down to -1.

    ??? cite "Reference"

        Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv:2503.14476, equation 13.

    **Arguments:**

    - `max_completion_length`: from how many tokens on the punishment is -1.
    - `soft_punish_cache`: over how many tokens it builds up.

    **Returns:**

    A reward function.
    """
    if not 0 < soft_punish_cache <= max_completion_length:
        raise UserError(
            f"soft_overlong({max_completion_length}, {soft_punish_cache}): give the maximal completion length, then "
            "over how many of its last tokens the punishment builds up, at least 1 and at most all"
        )

    def soft_overlong_reward(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
        del kwargs
        free = max_completion_length - soft_punish_cache
        return [float(np.clip((free - len(ids)) / soft_punish_cache, -1.0, 0.0)) for ids in completion_ids]

    return soft_overlong_reward


REWARD = RewardKind(
    soft_overlong,
    "0 up to `L - C` tokens, from there linearly down to -1 at `L` (DAPO, equation 13)",
    numbers=("max length", "cache"),
)
