"""What speculation saved or cost over a run, in seconds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ._times import seconds_by_phase


class Comparison(NamedTuple):
    """Speculative and plain decoding, measured at the end of a run; what `comparison.json` holds.

    **Arguments:**

    - `steps`: how many steps the policy had learned for.
    - `plain`, `speculative`: tokens a second.
    - `compiling`: seconds that the programs of plain decoding took to compile, which the run had not needed.
    """

    steps: int
    plain: float
    speculative: float
    compiling: float

    @property
    def ratio(self) -> float:
        """Above 1, speculation is faster."""
        return self.speculative / self.plain


class Balance(NamedTuple):
    """Seconds that speculation saved over a run. Negative ones it cost.

    **Arguments:**

    - `rollouts`: against plain ones, compiling left out.
    - `draft`: of warming up and teaching the draft, compiling left out.
    - `compiling`: of what a run without a draft would not have compiled; without a comparison, of the warm-up and the
        draft's lessons.
    - `basis`: how the time of plain rollouts is known, in words.
    """

    rollouts: float
    draft: float
    compiling: float
    basis: str

    @property
    def total(self) -> float:
        """The sum."""
        return self.rollouts + self.draft + self.compiling


def speculation_balance(
    metrics: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]], comparison: Comparison | None
) -> Balance | None:
    """What speculation saved or cost over a run.

    Plain rollouts of the same tokens are taken to go at the rate of the comparison. That is the rate at the end of the
    run: earlier completions may have been longer or shorter. Without a comparison it is what the run itself expected,
    from its own rounds of plain decoding (`draft/seconds_saved`).

    **Arguments:**

    - `metrics`: the records of `metrics.jsonl`.
    - `starts`: those of `times.jsonl`.
    - `comparison`: if there is one.

    **Returns:**

    `None` if it can't be known: without a comparison and without rounds of plain decoding, or if not all of the run's
    times were written down.
    """
    if not starts or starts[0]["from_step"] != 1:
        return None
    phases = seconds_by_phase(starts)
    nothing = (0.0, 0.0)
    decoding, decoding_compiled = phases.get("rollout", nothing)
    warm_up, warm_up_compiled = phases.get("warm-up", nothing)
    lessons, lessons_compiled = phases.get("draft", nothing)
    draft = warm_up + lessons - warm_up_compiled - lessons_compiled
    if comparison is not None:
        tokens = sum(record["spec/tokens_per_second"] * record["time/rollout"] for record in metrics)
        saved = tokens / comparison.plain - (decoding - decoding_compiled)
        compiled = warm_up_compiled + lessons_compiled + decoding_compiled - comparison.compiling
        return Balance(saved, -draft, -max(0.0, compiled), "by the comparison")
    names = ("draft/seconds_saved", "spec/seconds_saved")  # the second in records of earlier versions
    found = [next((record[name] for name in names if record.get(name) is not None), None) for record in metrics]
    expected = [seconds for seconds in found if seconds is not None]
    if not expected:
        return None
    compiled = warm_up_compiled + lessons_compiled
    return Balance(sum(expected), -draft, -compiled, "an estimate")
