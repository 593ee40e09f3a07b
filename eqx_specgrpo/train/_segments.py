"""What a run knows of its decoding segments: the length controller's memory, and the figures of a step."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from ..decoding import AbstractCompiler, AbstractLengthController, CompileAtOnce, SegmentObservation, plain_seconds


class SegmentLog:
    """Collects the segments of a step, and keeps the state of the length controller for the next step.

    It is on the host, and is not saved in checkpoints, because it holds times of this machine.

    **Arguments:**

    - `length`: the controller of the run.
    - `compiler`: of the programs of the run's rollouts; by default `CompileAtOnce`.

    **Attributes:**

    - `length_state`: the controller's, or `None` before it was told anything.
    - `seconds`: that the segments of the last `metrics` took, compiling left out.
    """

    length_state: Any
    compiler: AbstractCompiler
    seconds: float

    def __init__(self, length: AbstractLengthController, compiler: AbstractCompiler | None = None):
        self.length_state, self.seconds = None, 0.0
        self.compiler = CompileAtOnce() if compiler is None else compiler
        self._length = length
        self._segments: list[SegmentObservation] = []
        self._measured: dict[tuple[int, int], tuple[int, float]] = {}  # rounds and seconds, by rows and draft length
        self._found: list[float] | None = None  # by the last step's first lesson
        self._decoded: list[tuple[Int[np.ndarray, " rows"], int, int | None]] = []

    def __call__(self, observation: SegmentObservation, length_state: Any) -> None:
        self._segments.append(observation)
        self.length_state = length_state

    def decoded(self, lengths: Int[np.ndarray, " rows"], smallest_batch: int, max_rows: int | None) -> None:
        """A decoding has ended.

        **Arguments:**

        - `lengths`: of its completions.
        - `smallest_batch`, `max_rows`: how it was batched.
        """
        self._decoded.append((lengths, smallest_batch, max_rows))

    def learned(self, acceptance: Sequence[float]) -> None:
        """A step's first lesson has found so much accepted at each draft position. `after_training` tells it on; a step
        without lessons has nothing to tell."""
        self._found = list(acceptance) or None

    def after_training(self, max_length: int, acceptance: Float[Array, " draft"], done: int = 0, left: int = 0) -> None:
        """Tells the length controller that policy and draft have moved.

        **Arguments:**

        - `max_length`: the draft's greatest length.
        - `acceptance`: `RunState.draft_acceptance`: zeros before the draft's first update. It counts at a run's start,
            when no lesson was told.
        - `done`, `left`: steps of this start of the run, and steps that are to come.
        """
        state, found = self.length_state, self._found
        if state is None:
            at_start = np.asarray(acceptance, np.float64)
            state = self._length.init(max_length)
            found = at_start.tolist() if at_start.any() else None
        self._found = None
        state = self._length.after_training(state, found)
        self.length_state = self._length.with_future(state, left / max(done, 1))

    def metrics(self) -> dict[str, float]:
        """Of the segments since the last call: rounds by draft length, seconds by rows and of compiling, what was
        expected against what came, and what speculation saved.

        Segments in which a program was compiled, and those of which nothing was expected, are left out of what was
        expected.
        """
        segments, self._segments = self._segments, []
        self.seconds = sum(segment.elapsed - segment.compile_seconds for segment in segments)
        metrics: dict[str, float] = {}
        for segment in segments:
            for name, value in (
                (f"spec/rounds_length_{segment.plan.length}", float(segment.rounds)),
                (f"spec/seconds_rows_{segment.rows}", segment.elapsed - segment.compile_seconds),
            ):
                metrics[name] = metrics.get(name, 0.0) + value
        if segments:
            metrics["spec/seconds_compiling"] = sum(segment.compile_seconds for segment in segments)
        if self.length_state is not None:
            metrics |= self._length.metrics(self.length_state)
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
        """Seconds by which the decodings were shorter than plain ones of the same completions would have been, by the
        run's own costs of rounds; nothing where these are not known, as with a fixed length.

        Both are sums of rounds times what such a round costs with such a context, at the pace that the machine had in
        these segments: so what is common to all rounds, as a busy machine, is in both. What was waited for compilers is
        left out.
        """
        decoded, self._decoded = self._decoded, []
        timed = [segment for segment in segments if segment.seconds is not None and segment.rounds > 0]
        for segment in timed:
            kind = segment.rows, segment.plan.length
            rounds, seconds = self._measured.get(kind, (0, 0.0))
            self._measured[kind] = rounds + segment.rounds, seconds + segment.elapsed
        used = {segment.plan.length for segment in segments}
        if not decoded or any(self._round_seconds(1, length, 0.0) is None for length in {0} | used):
            return {}
        if not timed or used == {0}:
            return {"draft/seconds_saved": 0.0}

        def known(rows: int, context: float, length: int = 0) -> float:
            seconds = self._round_seconds(rows, length, context)
            assert seconds is not None
            return seconds

        def all_of(some: list[SegmentObservation]) -> float:
            return sum(s.rounds * known(s.rows, s.context, s.plan.length) for s in some)

        pace = sum(segment.elapsed for segment in timed) / all_of(timed)
        plain = sum(plain_seconds(lengths, smallest, known, most) for lengths, smallest, most in decoded)
        return {"draft/seconds_saved": pace * (plain - all_of(segments))}

    def _round_seconds(self, rows: int, length: int, context: float) -> float | None:
        """What a round takes: by the controller, or on average so far, with the number of rows most alike."""
        if self.length_state is not None:
            seconds = self._length.round_seconds(self.length_state, rows, length, context)
            if seconds is not None:
                return seconds
        like = [kind for kind in self._measured if kind[1] == length]
        if not like:
            return None
        rounds, total = self._measured[min(like, key=lambda kind: abs(math.log(kind[0] / rows)))]
        return total / rounds


def _expected(segment: SegmentObservation):
    assert segment.plan.expected is not None
    return segment.plan.expected
