"""From rewards to advantages. On the host: a few hundred numbers a step, in float64."""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Literal

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..errors import UserError

ScaleRewards = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Float[np.ndarray | Array, " rows"],
    group: Int[np.ndarray | Array, " rows"],
    num_groups: int,
    scale_rewards: ScaleRewards = "group",
    eps: float = 1e-4,
) -> Float[np.ndarray, " rows"]:
    """Computes advantages: rewards minus the mean of their group, divided by a standard deviation.

    ??? cite

        DeepSeekMath (GRPO), [arXiv:2402.03300](https://arxiv.org/abs/2402.03300); without the division,
        Dr. GRPO, [arXiv:2503.20783](https://arxiv.org/abs/2503.20783); with the batch's deviation,
        Lite-PPO, [arXiv:2508.08221](https://arxiv.org/abs/2508.08221).

    **Arguments:**

    - `rewards`: one per row. NaN means that no reward function applied. Such a row is left out of means and deviations,
        and its advantage is 0.
    - `group`: for each row, the index of its group (rows of a group need not be neighbours).
    - `num_groups`: number of groups.
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
    advantages = (rewards - mean[group]) / _scale(rewards, group, valid, deviation, scale_rewards, eps)
    return np.where(valid & ~flat[group], advantages, 0.0).astype(np.float32)


def leave_one_out_advantages(
    rewards: Float[np.ndarray | Array, " rows"], group: Int[np.ndarray | Array, " rows"], num_groups: int
) -> Float[np.ndarray, " rows"]:
    """Computes advantages: rewards minus the mean of the *other* rows of their group (RLOO).

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


def max_rl_advantages(
    rewards: Float[np.ndarray | Array, " rows"], group: Int[np.ndarray | Array, " rows"], num_groups: int
) -> Float[np.ndarray, " rows"]:
    """Computes advantages: rewards minus the mean of their group, divided by that mean. Hard prompts weigh more
    (MaxRL).

    ??? cite

        Maximum likelihood reinforcement learning, [arXiv:2602.02710](https://arxiv.org/abs/2602.02710).

    **Arguments:** as for [`eqx_specgrpo.grpo.group_advantages`][].

    **Returns:**

    One advantage a row, float32; 0 in a group whose rewards are all equal, all 0 for instance.

    **Raises:**

    `UserError` for a negative reward, because the mean stands for a success rate.
    """
    rewards, group, valid = _checked(rewards, group, num_groups)
    if (rewards[valid] < 0).any():
        raise UserError(
            f"a reward is {rewards[valid].min():g}, but max_rl divides by a group's mean reward, as by a rate of "
            "success: use rewards of 0 and more, or grpo.advantage_estimator=group"
        )
    mean, _, flat, _ = _group_statistics(rewards, group, valid, num_groups)
    # Not flat and not negative: the mean is positive.
    advantages = (rewards - mean[group]) / np.where(flat, 1.0, mean)[group]
    return np.where(valid & ~flat[group], advantages, 0.0).astype(np.float32)


def pass_at_k_advantages(
    rewards: Float[np.ndarray | Array, " rows"],
    group: Int[np.ndarray | Array, " rows"],
    num_groups: int,
    scale_rewards: ScaleRewards = "group",
    eps: float = 1e-4,
) -> Float[np.ndarray, " rows"]:
    """Computes advantages for the maximum of a group: the best row gets its lead over the second best, all others get
    0.

    ??? cite

        [arXiv:2503.19595](https://arxiv.org/abs/2503.19595), with as many samples as the group has; verl's
        `grpo_passk`.

    **Arguments:** as for [`eqx_specgrpo.grpo.group_advantages`][].

    **Returns:**

    One advantage a row, float32; all 0 in a group with two best completions or with fewer than two valid rows.
    """
    rewards, group, valid = _checked(rewards, group, num_groups)
    _, deviation, flat, _ = _group_statistics(rewards, group, valid, num_groups)
    advantages = np.zeros_like(rewards)
    for number in np.flatnonzero(~flat):
        rows = np.flatnonzero(valid & (group == number))
        second, best = rows[np.argsort(rewards[rows], kind="stable")[-2:]]
        advantages[best] = rewards[best] - rewards[second]
    advantages /= _scale(rewards, group, valid, deviation, scale_rewards, eps)
    return np.where(valid & ~flat[group], advantages, 0.0).astype(np.float32)


def normalize_then_sum_advantages(
    rewards: Float[np.ndarray | Array, "rows functions"],
    weights: Float[np.ndarray | Array, " functions"],
    group: Int[np.ndarray | Array, " rows"],
    num_groups: int,
    eps: float = 1e-4,
) -> Float[np.ndarray, " rows"]:
    """Computes advantages of several reward functions, none of which dominates because its numbers are larger (GDPO).

    The rewards of each function are normalised within their group (mean and standard deviation), then summed with their
    weights, and the sum is divided by its standard deviation over the batch.

    ??? cite

        GDPO, [arXiv:2601.05242](https://arxiv.org/abs/2601.05242).

    **Arguments:**

    - `rewards`: one column per function; NaN where it does not apply.
    - `weights`: one per function.
    - `group`, `num_groups`, `eps`: as for [`eqx_specgrpo.grpo.group_advantages`][].

    **Returns:**

    One advantage a row, float32. Exactly 0 where no function applies, or none has a spread in the row's group.
    """
    rewards = np.asarray(rewards, np.float64)
    columns = [group_advantages(column, group, num_groups, "group", eps).astype(np.float64) for column in rewards.T]
    total = np.stack(columns, 1) @ np.asarray(weights, np.float64)
    valid = ~np.isnan(rewards).all(1)
    # The mean of the sums is 0, for that of each function is, in each group.
    deviation = total[valid].std(ddof=1) if valid.sum() > 1 else 0.0
    return np.where(valid, total / (deviation + eps), 0.0).astype(np.float32)


AdvantageEstimator = Literal["group", "rloo", "max_rl", "pass_at_k"]
ADVANTAGE_ESTIMATORS = MappingProxyType[AdvantageEstimator, Callable[..., np.ndarray]](
    {
        "group": group_advantages,
        "rloo": lambda rewards, group, num_groups, _: leave_one_out_advantages(rewards, group, num_groups),
        "max_rl": lambda rewards, group, num_groups, _: max_rl_advantages(rewards, group, num_groups),
        "pass_at_k": pass_at_k_advantages,
    }
)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimates the probability that one of `k` completions is right, without bias: `1 - C(n - c, k) / C(n, k)`.

    ??? cite

        Chen et al. 2021, [arXiv:2107.03374](https://arxiv.org/abs/2107.03374), equation 1.

    **Arguments:**

    - `num_samples`: `n`, the number of completions of the prompt.
    - `num_correct`: `c`, the number of right ones.
    - `k`: at most `num_samples`.

    **Raises:**

    `ValueError` if `k` or `num_correct` is out of range.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}: with {num_samples} samples of a prompt it must lie between 1 and {num_samples}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct is {num_correct}, of {num_samples} samples: it must lie between the two")
    wrong = num_samples - num_correct
    return 1.0 - math.comb(wrong, k) / math.comb(num_samples, k)


def frac_reward_zero_std(
    rewards: Float[np.ndarray | Array, " rows"], group: Int[np.ndarray | Array, " rows"], num_groups: int
) -> float:
    """Computes the share of groups that teach nothing: all their rewards are equal, or fewer than two are valid.

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


def _scale(
    rewards: Float[np.ndarray, " rows"],
    group: Int[np.ndarray, " rows"],
    valid: Bool[np.ndarray, " rows"],
    deviation: Float[np.ndarray, " groups"],
    scale_rewards: str,
    eps: float,
) -> Float[np.ndarray, " rows"]:
    """What the advantages are divided by."""
    match scale_rewards:
        case "group":
            return deviation[group] + eps
        case "batch":
            batch_deviation = rewards[valid].std(ddof=1) if valid.sum() > 1 else 0.0
            return np.full(len(rewards), batch_deviation + eps)
        case "none":
            return np.ones(len(rewards))
        case _:
            raise ValueError(f"scale_rewards is {scale_rewards!r}: use 'group', 'batch' or 'none'")


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
