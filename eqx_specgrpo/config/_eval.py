"""`[eval]`: how the policy is measured on items that it never learns from."""

import re
from typing import Annotated, Any

from pydantic import Field, model_validator

from ..errors import did_you_mean
from ._section import NoneWord, Section

_Count = Annotated[int, Field(ge=1)]


class EvalConfig(Section):
    """Evaluation on items that are never trained on; see `docs/evaluation.md`. Off unless `task` or `holdout` is "
    "set."""

    task: str = Field(default="", description="task of the evaluation: a file or a name, as for task.name; empty: none")
    options: dict[str, Any] = Field(
        default={},
        description="options of that task, as they would stand in [task]; they are added to those of [task] where the "
        "two tasks have the same name",
    )
    seed: Annotated[Annotated[int, Field(ge=0, lt=2**32)] | None, NoneWord] = Field(
        default=None, description="seed of the items of that task; none: that of the run"
    )
    holdout: int = Field(
        default=0, ge=0, description="number of items of the run's own task that are kept from training and measured on"
    )
    limit: Annotated[_Count | None, NoneWord] = Field(
        default=None, description="the most items of eval.task that are measured on; none: all"
    )
    every: int = Field(default=10, ge=1, description="steps between two evaluations; there is one at the end as well")
    at_start: bool = Field(default=False, description="evaluate before the first step as well")
    samples: Annotated[Annotated[int, Field(ge=1, le=2**16)] | None, NoneWord] = Field(
        default=None,
        description="number of completions of each prompt; none: grpo.num_generations, or 1 at temperature 0",
    )
    temperature: Annotated[Annotated[float, Field(ge=0)] | None, NoneWord] = Field(
        default=None, description="temperature of sampling; 0: greedy; none: grpo.temperature"
    )
    max_completion_length: Annotated[_Count | None, NoneWord] = Field(
        default=None, description="length of the longest completion, in tokens; none: grpo.max_completion_length"
    )
    functions: list[str] = Field(
        default=[], description="reward functions of the evaluation, each with a weight of 1; empty: those of the run"
    )
    threshold: float = Field(default=1.0, description="reward from which on a completion counts as right")

    @property
    def enabled(self) -> bool:
        """Whether there is anything to measure on."""
        return bool(self.task) or self.holdout > 0

    def num_samples(self, num_generations: int) -> int:
        """Completions of a prompt, of a run with so many in a group."""
        if self.samples is not None:
            return self.samples
        return 1 if self.temperature == 0 else num_generations

    @model_validator(mode="after")
    def _consistent(self):
        if self.task and self.holdout:
            raise ValueError(
                f"eval.task = {self.task!r} and eval.holdout = {self.holdout}: the evaluation has a task of its own, "
                "or items of the run's task; drop one of the two"
            )
        if self.temperature == 0 and (self.samples or 1) > 1:
            raise ValueError(
                f"eval.temperature = 0 gives the same completion eval.samples = {self.samples} times: set "
                "eval.samples=1, or a temperature"
            )
        of_task = ("options", "seed", "limit")
        for name, field in EvalConfig.model_fields.items():
            needs_task = name in of_task and not self.task
            if self.__dict__[name] != field.default and (needs_task or not self.enabled):
                either = "eval.task or eval.holdout, the items to measure on (specgrpo eval: --task)"
                way_out = "eval.task" if needs_task else either
                raise ValueError(f"eval.{name} = {self.__dict__[name]} has no effect without {way_out}")
        return self


def pass_ks(samples: int) -> tuple[int, ...]:
    """The `k` for which pass@k is told: powers of two, as far as the samples allow, and their number."""
    powers = {1 << power for power in range(samples.bit_length())}
    return tuple(sorted(powers | {samples}))


def check_best_metric(name: str, evaluation: EvalConfig, num_generations: int) -> None:
    """Raises `ValueError` if an evaluation will have no such metric, or none by which one policy is better."""
    samples = evaluation.num_samples(num_generations)
    known = ["eval/reward", *(f"eval/pass@{k}" for k in pass_ks(samples))]
    known += [f"eval/{kind}@{samples}" for kind in ("mean", "best", "maj")]
    if not evaluation.enabled:
        raise ValueError(
            f"save_best = {name!r} needs evaluations: set eval.holdout or eval.task, the items to measure on"
        )
    if name in known or re.fullmatch(r"eval/rewards/.+/mean", name):
        return
    raise ValueError(f"save_best = {name!r}: an evaluation has no such metric.{did_you_mean(name, known)}")
