"""From rewards to advantages. On the host: a few hundred numbers a step, in float64."""

from typing import Literal

import numpy as np
from jaxtyping import Array, Bool, Float, Int


def group_advantages(
    rewards: Float[np.ndarray | Array, " rows"],
    group: Int[np.ndarray | Array, " rows"],
    num_groups: int,
    scale_rewards: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
) -> Float[np.ndarray, " rows"]:
    """Rewards relative to the mean of their group, divided by a standard deviation.

    ??? cite

        DeepSeekMath (GRPO), [arXiv:2402.03300](https://arxiv.org/abs/2402.03300); without the division,
        Dr. GRPO, [arXiv:2503.20783](https://arxiv.org/abs/2503.20783); with the batch's deviation,
        Lite-PPO, [arXiv:2508.08221](https://arxiv.org/abs/2508.08221).

    **Arguments:**

    - `rewards`: one a row. NaN says that no reward function applied: such a row takes no part in means and deviations,
        and its advantage is 0.
    - `group`: for each row, the index of its group (rows of a group need not be neighbours).
    - `num_groups`: how many groups there are.
    - `scale_rewards`: divide by the deviation of the row's group, by that of all rewards of the batch, or not at all.
        Deviations are the unbiased estimate (`ddof=1`).
    - `eps`: added to the deviation.

    **Returns:**

    One advantage a row, float32. Exactly 0 in a group with fewer than two valid rows or whose rewards are all equal.

    **Raises:**

    `ValueError` if an infinite reward, a group index out of range or an unknown `scale_rewards` is given.
    """
    rewards, group, valid = _checked(rewards, group, num_groups)
    mean, deviation, flat, _ = _group_statistics(rewards, group, valid, num_groups)
    advantages = rewards - mean[group]
    match scale_rewards:
        case "group":
            advantages = advantages / (deviation[group] + eps)
        case "batch":
            batch_deviation = rewards[valid].std(ddof=1) if valid.sum() > 1 else 0.0
            advantages = advantages / (batch_deviation + eps)
        case "none":
            pass
        case _:
            raise ValueError(f"scale_rewards is {scale_rewards!r}: use 'group', 'batch' or 'none'")
    return np.where(valid & ~flat[group], advantages, 0.0).astype(np.float32)


def leave_one_out_advantages(
    rewards: Float[np.ndarray | Array, " rows"], group: Int[np.ndarray | Array, " rows"], num_groups: int
) -> Float[np.ndarray, " rows"]:
    """Rewards relative to the mean of the *other* rows of their group (RLOO).

    ??? cite

        Back to Basics, [arXiv:2402.14740](https://arxiv.org/abs/2402.14740).

    **Arguments:** as for [`eqx_specgrpo.grpo.group_advantages`][].

    **Returns:**

    One advantage a row, float32; 0 where the reward is NaN or no other row of the group has one.
    """
    rewards, group, valid = _checked(rewards, group, num_groups)
    mean, _, flat, count = _group_statistics(rewards, group, valid, num_groups)
    # r - (sum - r) / (n - 1) = (r - mean) * n / (n - 1)
    factor = count / np.maximum(count - 1, 1)
    advantages = (rewards - mean[group]) * factor[group]
    return np.where(valid & ~flat[group], advantages, 0.0).astype(np.float32)


def frac_reward_zero_std(
    rewards: Float[np.ndarray | Array, " rows"], group: Int[np.ndarray | Array, " rows"], num_groups: int
) -> float:
    """Share of groups that teach the policy nothing: all their rewards are equal, or fewer than two are valid.

    **Arguments:** as for [`eqx_specgrpo.grpo.group_advantages`][].

    **Returns:**

    A number between 0 and 1.
    """
    rewards, group, valid = _checked(rewards, group, num_groups)
    _, _, flat, _ = _group_statistics(rewards, group, valid, num_groups)
    return float(flat.mean())


def _checked(
    rewards: Float[np.ndarray | Array, " rows"], group: Int[np.ndarray | Array, " rows"], num_groups: int
) -> tuple[Float[np.ndarray, " rows"], Int[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
    if num_groups < 1:
        raise ValueError(f"num_groups is {num_groups}: there must be at least one group")
    rewards = np.asarray(rewards, np.float64)
    group = np.asarray(group)
    if np.isinf(rewards).any():
        raise ValueError(
            f"the reward of row {int(np.argmax(np.isinf(rewards)))} is infinite: rewards must be finite numbers, or "
            "NaN where no reward function applies"
        )
    if group.size and (group.min() < 0 or group.max() >= num_groups):
        raise ValueError(
            f"group holds indices from {group.min()} to {group.max()}, but num_groups is {num_groups}: every index "
            "must lie between 0 and num_groups - 1"
        )
    return rewards, group, ~np.isnan(rewards)


def _group_statistics(
    rewards: Float[np.ndarray, " rows"],
    group: Int[np.ndarray, " rows"],
    valid: Bool[np.ndarray, " rows"],
    num_groups: int,
) -> tuple[
    Float[np.ndarray, " groups"], Float[np.ndarray, " groups"], Bool[np.ndarray, " groups"], Int[np.ndarray, " groups"]
]:
    """Mean, standard deviation, whether there is no spread, and the number of valid rows, of each group."""
    rewards, group = rewards[valid], group[valid]
    count = np.bincount(group, minlength=num_groups)
    mean = np.bincount(group, rewards, num_groups) / np.maximum(count, 1)
    variance = np.bincount(group, (rewards - mean[group]) ** 2, num_groups) / np.maximum(count - 1, 1)
    # Equality is judged on the rewards: three times 0.1 have a rounded mean, and a deviation that is not quite 0.
    low, high = np.full(num_groups, np.inf), np.full(num_groups, -np.inf)
    np.minimum.at(low, group, rewards)
    np.maximum.at(high, group, rewards)
    return mean, np.sqrt(variance), high <= low, count
