"""What a step leaves in the records: the metrics of its rollouts, and a line for each completion."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._types import Rollouts, ScoredRollouts, StopReason
from ..drafts import AbstractDraft, completion_tokens, coverage, draft_vocabulary
from ..grpo import frac_reward_zero_std
from ..tasks import Example, RewardError, RewardLog

# What records hold besides what reward functions log.
_COLUMNS = frozenset({"step", "prompt", "completion", "length", "stop_reason", "reward", "advantage"})
_METRICS = frozenset({"step", "num_tokens", "loss", "learning_rate", "entropy", "kl"})
_FAMILIES = ("reward", "grad_norm", "frac_", "completions/", "clip_ratio/", "sampling/", "spec/", "draft/", "time/",
             "compile/")  # fmt: skip


def check_names(log: RewardLog, reward_names: Sequence[str]) -> None:
    """Raises `RewardError` if a reward function has logged something under a name of the run's own."""
    for column in log.extra:
        if column in _COLUMNS or column in reward_names:
            raise RewardError(f"log_extra was given the column {column!r}, which the records have already: rename it")
    for name in log.metrics:
        if name in _METRICS or name.startswith(_FAMILIES):
            raise RewardError(f"log_metric was given the name {name!r}, which is for the run's own: rename it")


def rollout_metrics(scored: ScoredRollouts, reward_names: tuple[str, ...]) -> dict[str, float]:
    """What the rollouts themselves say: rewards, lengths, acceptance. TRL's names where it has them."""
    rollouts, rewards = scored.rollouts, scored.rewards
    lengths, ended = rollouts.lengths, rollouts.stop_reasons != StopReason.LENGTH
    groups = len(rollouts.prompts.lengths)
    valid = ~np.isnan(rewards)
    per_group = [rewards[(rollouts.group == g) & valid] for g in range(groups)]
    metrics = {
        "reward": float(rewards[valid].mean()) if valid.any() else math.nan,
        "reward_std": float(np.mean([r.std(ddof=1) if len(r) > 1 else 0.0 for r in per_group])),
        "frac_reward_zero_std": frac_reward_zero_std(rewards, rollouts.group, groups),
    }
    for name, column in zip(reward_names, scored.rewards_per_function.T, strict=True):
        applied = column[~np.isnan(column)]
        metrics[f"rewards/{name}/mean"] = float(applied.mean()) if len(applied) else math.nan
        metrics[f"rewards/{name}/std"] = float(applied.std(ddof=1)) if len(applied) > 1 else 0.0
    metrics |= {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": float(lengths[ended].mean()) if ended.any() else 0.0,
        "completions/clipped_ratio": float((~ended).mean()),
    }
    statistics = rollouts.statistics
    metrics |= {
        "spec/acceptance_length": statistics.acceptance_length,
        "spec/acceptance_rate": statistics.acceptance_rate,
        "spec/draft_length": float(statistics.drafted.sum() / max(statistics.target_forwards.sum(), 1)),
        "spec/target_forwards": float(statistics.target_forwards.sum()),
    }
    for position, rate in enumerate(statistics.acceptance_rate_by_position):
        if statistics.drafted[:, position].any():
            metrics[f"spec/acceptance_rate_pos_{position}"] = rate
    return metrics


def completion_records(
    step: int,
    examples: list[Example],
    scored: ScoredRollouts,
    texts: list[str],
    reward_names: tuple[str, ...],
    extra: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:
    """One JSON-able object a completion, for `completions.jsonl`; `extra` are further columns, one value a row.

    A reward that is called like one of our keys is there as `rewards/NAME`.
    """
    rollouts = scored.rollouts
    keys = ["rewards/" + name if name in _COLUMNS else name for name in reward_names]
    return [
        {
            "step": step,
            "prompt": examples[prompt].prompt,
            "completion": texts[row],
            "length": int(rollouts.lengths[row]),
            "stop_reason": StopReason(int(rollouts.stop_reasons[row])).name.lower(),
            **{name: float(scored.rewards_per_function[row, i]) for i, name in enumerate(keys)},
            "reward": float(scored.rewards[row]),
            "advantage": float(scored.advantages[row]),
            **{name: values[row] for name, values in extra.items()},
        }
        for row, prompt in enumerate(rollouts.group)
    ]


def vocabulary_metrics(draft: AbstractDraft, rollouts: Rollouts) -> dict[str, float]:
    """How much of the policy's completions a draft of a reduced vocabulary could have said; nothing for others."""
    vocabulary = draft_vocabulary(draft)
    if vocabulary.size == 0:
        return {}
    return {"draft/coverage": coverage(vocabulary, completion_tokens(rollouts))}
