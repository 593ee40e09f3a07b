"""What a step's rollouts say of themselves, for the records of a run."""

import math
from typing import Any

import numpy as np

from .._types import Rollouts, ScoredRollouts, StopReason
from ..drafts import AbstractDraft, completion_tokens, coverage, draft_vocabulary
from ..grpo import frac_reward_zero_std
from ..tasks import Example


def rollout_metrics(scored: ScoredRollouts, reward_names: tuple[str, ...]) -> dict[str, float]:
    """What the rollouts themselves say: rewards, lengths, acceptance. TRL's names where it has them."""
    rollouts, rewards = scored.rollouts, scored.rewards
    lengths, ended = rollouts.lengths, rollouts.stop_reasons == StopReason.EOS
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
    step: int, examples: list[Example], scored: ScoredRollouts, texts: list[str], reward_names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """One JSON-able object a completion, for `completions.jsonl`."""
    rollouts = scored.rollouts
    return [
        {
            "step": step,
            "prompt": examples[prompt].prompt,
            "completion": texts[row],
            "length": int(rollouts.lengths[row]),
            "stop_reason": StopReason(int(rollouts.stop_reasons[row])).name.lower(),
            **{name: float(scored.rewards_per_function[row, i]) for i, name in enumerate(reward_names)},
            "reward": float(scored.rewards[row]),
            "advantage": float(scored.advantages[row]),
        }
        for row, prompt in enumerate(rollouts.group)
    ]


def vocabulary_metrics(draft: AbstractDraft, rollouts: Rollouts) -> dict[str, float]:
    """How much of the policy's completions a draft of a reduced vocabulary could have said; nothing for others."""
    vocabulary = draft_vocabulary(draft)
    if vocabulary.size == 0:
        return {}
    return {"draft/coverage": coverage(vocabulary, completion_tokens(rollouts))}
