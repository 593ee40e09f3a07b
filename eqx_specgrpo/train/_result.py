"""What a finished run hands back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ..drafts import AbstractDraft
from ..models import AbstractLanguageModel, Tokenizer
from ..records import read_steps


@dataclass(frozen=True, repr=False)
class RunResult:
    """The outcome of a finished run.

    **Arguments:**

    - `folder`: the run folder.
    - `metrics`: arrays by name, with one value per step, as a data frame takes them. NaN where a step has none.
    - `policy`: the trained model, in float32; with a `lora.rank`, the base with its adapters.
    - `tokenizer`: the policy's.
    - `draft`: the trained draft.
    """

    folder: Path
    metrics: Mapping[str, Float[np.ndarray, " steps"]]
    policy: AbstractLanguageModel
    tokenizer: Tokenizer
    draft: AbstractDraft

    def __repr__(self) -> str:
        steps, rewards = len(self.metrics["step"]), self.metrics["reward"]
        return (
            f"RunResult({str(self.folder)!r}, {steps} steps, reward {rewards[0]:.3f} to {rewards[-1]:.3f}, "
            f"policy {type(self.policy).__name__}, draft {type(self.draft).__name__})"
        )


def metric_columns(path: Path) -> dict[str, Float[np.ndarray, " steps"]]:
    """The numbers of a `metrics.jsonl` by name, in the order in which the names first occur."""
    steps = read_steps(path)
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: np.array([_number(step.get(name)) for step in steps]) for name in names}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan
