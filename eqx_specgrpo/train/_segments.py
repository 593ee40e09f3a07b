"""What a run knows of its decoding segments: the length controller's memory, and the figures of a step."""

from typing import Any

import numpy as np
from jaxtyping import Array, Float

from ..decoding import AbstractLengthController, SegmentObservation


class SegmentLog:
    """Collects the segments of a step, and keeps the state of the length controller for the next step.

    It is on the host, and is not saved in checkpoints, because it holds times of this machine.

    **Attributes:**

    - `length_state`: the controller's, or `None` before it was told anything.
    """

    length_state: Any

    def __init__(self):
        self.length_state = None
        self._segments: list[SegmentObservation] = []
        self._plain: dict[int, tuple[int, float]] = {}  # rounds of plain decoding and their seconds, by rows

    def __call__(self, observation: SegmentObservation, length_state: Any) -> None:
        self._segments.append(observation)
        self.length_state = length_state

    def after_training(
        self, length: AbstractLengthController, max_length: int, acceptance: Float[Array, " draft"]
    ) -> None:
        """Tells the length controller that policy and draft were updated.

        **Arguments:**

        - `length`, `max_length`: the controller, and the draft's greatest length.
        - `acceptance`: `RunState.draft_acceptance`: zeros before the draft's first update.
        """
        state = length.init(max_length) if self.length_state is None else self.length_state
        found = np.asarray(acceptance, np.float64)
        self.length_state = length.after_training(state, found.tolist() if found.any() else None)

    def metrics(self) -> dict[str, float]:
        """Of the segments since the last call: rounds by draft length, what was expected against what came, and what
        speculation saved.

        Segments in which a program was compiled, and those of which nothing was expected, count for the rounds only.
        """
        segments, self._segments = self._segments, []
        metrics: dict[str, float] = {}
        for segment in segments:
            name = f"spec/rounds_length_{segment.plan.length}"
            metrics[name] = metrics.get(name, 0.0) + segment.rounds
        judged = [s for s in segments if s.plan.expected is not None and s.seconds is not None and s.active_rounds > 0]
        if judged:
            rounds, active = sum(s.rounds for s in judged), sum(s.active_rounds for s in judged)
            expected_seconds = sum(s.rounds * _expected(s).seconds_per_round for s in judged)
            expected_tokens = sum(s.active_rounds * _expected(s).tokens_per_round for s in judged)
            metrics |= {
                "spec/expected_seconds_per_round": expected_seconds / rounds,
                "spec/seconds_per_round": sum(s.seconds or 0.0 for s in judged) / rounds,
                "spec/expected_acceptance_length": expected_tokens / active,
                "spec/judged_acceptance_length": sum(s.tokens for s in judged) / active,
            }
        return metrics | self._saved(segments)

    def _saved(self, segments: list[SegmentObservation]) -> dict[str, float]:
        """Seconds that the segments with a draft took less than plain rounds would have, by the plain rounds with as
        many rows that were seen so far; nothing where there were none, as with a fixed length."""
        timed = [s for s in segments if s.seconds is not None and s.active_rounds > 0]
        for segment in timed:
            if segment.plan.length == 0:
                rounds, seconds = self._plain.get(segment.rows, (0, 0.0))
                self._plain[segment.rows] = rounds + segment.rounds, seconds + (segment.seconds or 0.0)
        if not self._plain:
            return {}
        saved = 0.0
        for segment in timed:
            if segment.plan.length > 0 and segment.rows in self._plain:
                rounds, seconds = self._plain[segment.rows]
                plain_rounds = segment.rounds * segment.tokens / segment.active_rounds
                saved += plain_rounds * seconds / rounds - (segment.seconds or 0.0)
        return {"spec/seconds_saved": saved}


def _expected(segment: SegmentObservation):
    assert segment.plan.expected is not None
    return segment.plan.expected
