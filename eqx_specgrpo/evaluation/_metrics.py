"""From the rewards of an evaluation to its metrics."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from .._types import DecodeStatistics, StopReason
from ._estimates import bootstrap_intervals, majority_value, nan_mean, pass_at_k

# The column under which a reward function tells, with `log_extra`, what a completion answers, as TRL's own examples
# do; and how they write that it answers nothing.
ANSWER_COLUMN, NO_ANSWER = "extracted_answer", "[none]"


def reward_metrics(
    rewards: Float[np.ndarray, "prompts samples"],
    correct: Bool[np.ndarray, "prompts samples"],
    answers: Sequence[Sequence[Hashable | None]] | None,
    ks: Sequence[int],
    seed: int,
) -> dict[str, float]:
    """What the rewards say, each metric with its 95 % interval as `.../low` and `.../high`.

    **Arguments:**

    - `rewards`: NaN where no function applied. Prompts without any reward are left out of everything.
    - `correct`: which completions are right.
    - `answers`: of each prompt's completions, for the majority; `None` if they are not known.
    - `ks`: for pass@k.
    - `seed`: of the intervals.
    """
    judged = (~np.isnan(rewards)).any(axis=1)
    samples = rewards.shape[1]
    known, right = rewards[judged], correct[judged].sum(axis=1)
    columns = {"eval/reward": np.array([nan_mean(row) for row in known])}
    columns |= {f"eval/pass@{k}": pass_at_k(right, samples, k) for k in ks}
    columns[f"eval/mean@{samples}"] = columns["eval/reward"]
    columns[f"eval/best@{samples}"] = np.array([np.nanmax(row) for row in known])
    if answers is not None:
        given = [answers[prompt] for prompt in np.flatnonzero(judged).tolist()]
        columns[f"eval/maj@{samples}"] = np.array([majority_value(*pair) for pair in zip(given, known, strict=True)])
    if not judged.any():
        return dict.fromkeys(columns, float("nan"))
    low, high = bootstrap_intervals(np.stack(list(columns.values()), axis=1), seed)
    metrics = {}
    for number, (name, values) in enumerate(columns.items()):
        metrics |= {name: nan_mean(values), f"{name}/low": float(low[number]), f"{name}/high": float(high[number])}
    return metrics


def function_metrics(per_function: Float[np.ndarray, "rows functions"], names: Sequence[str]) -> dict[str, float]:
    """The mean of each reward function, over the completions that it applied to."""
    return {f"eval/rewards/{name}/mean": nan_mean(column) for name, column in zip(names, per_function.T, strict=True)}


def completion_metrics(
    lengths: Int[np.ndarray, " rows"], stop_reasons: Int[np.ndarray, " rows"], statistics: Sequence[DecodeStatistics]
) -> dict[str, float]:
    """Lengths, and how the completions were decoded; names as of a step's."""
    forwards = sum(int(found.target_forwards.sum()) for found in statistics)
    emitted = sum(int(found.emitted.sum()) for found in statistics)
    return {
        "eval/completions/mean_length": float(lengths.mean()),
        "eval/completions/max_length": float(lengths.max()),
        "eval/completions/clipped_ratio": float((stop_reasons != StopReason.EOS).mean()),
        "eval/spec/acceptance_length": emitted / max(forwards, 1),
    }


def evaluation_line(metrics: Mapping[str, float]) -> str:
    """The metrics on one line, for a log."""
    low, high = metrics["eval/reward/low"], metrics["eval/reward/high"]
    told = [f"reward {metrics['eval/reward']:.3f} ({low:.3f} to {high:.3f})"]
    for name, value in metrics.items():
        if name.startswith(("eval/pass@", "eval/maj@")) and name.count("/") == 1:
            told.append(f"{name.removeprefix('eval/')} {value:.3f}")
    told.append(f"acceptance length {metrics['eval/spec/acceptance_length']:.2f}")
    return "  ".join([*told, f"{metrics['eval/runtime']:.1f} s"])
