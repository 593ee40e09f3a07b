"""Measuring drafts against plain decoding: the same prompts and weights, all arms interleaved. Counts and seconds only;
`_bench_result.py` makes rates of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Key

from .._types import Prompts, Rollouts
from ..decoding import (
    AbstractSampling,
    AbstractVerifier,
    AdaptiveLength,
    DecodeProgress,
    FixedLength,
    SegmentObservation,
    decode,
)
from ..drafts import AbstractDraft, NoDraft
from ..models import AbstractLanguageModel
from ..records import stolen_seconds
from ..runtime import count_compilations

PLAIN = "plain"
ADAPTIVE = "adaptive"
# A program is compiled when a batch first shrinks to a size, which in a sampled decoding can be at any time.
_MOST_TRIES = 4


class Arm(eqx.Module):
    """One way to decode.

    **Arguments:**

    - `name`: of the draft; `PLAIN` for plain decoding.
    - `draft`: in the dtype to compute in.
    - `verifier_name`, `verifier`: the rule; `None` for the decoder's own choice.
    - `length`: tokens to draft a round, or `None` for an `AdaptiveLength`.
    - `longest`: the most that an `AdaptiveLength` may draft.
    """

    name: str
    draft: AbstractDraft
    verifier_name: str | None
    verifier: AbstractVerifier | None
    length: int | None
    longest: int = 4

    @property
    def length_name(self) -> int | str:
        return ADAPTIVE if self.length is None else self.length

    def __str__(self) -> str:
        if self.name == PLAIN:
            return PLAIN
        return f"{self.name}, {self.verifier_name}, length {self.length_name}"


def plain_arm() -> Arm:
    """Plain decoding, by the cheapest rule: without a draft, a verifier only draws the next token."""
    return Arm(PLAIN, NoDraft(), None, None, 0)


class ArmRun(eqx.Module):
    """What was seen of one arm in one round: raw figures, from which all others follow.

    **Arguments:**

    - `rows`: completions that were decoded together.
    - `draft`, `verifier`, `length`: the arm.
    - `round`, `place`: the round, from 0, and which place in its order the arm had.
    - `seconds`: wall-clock time of the whole call: the prompts' pass, all rounds, and the host's share.
    - `tokens`: of all completions.
    - `target_forwards`, `emitted`: rounds summed over the rows that were active in them, and the tokens of these.
    - `drafted`, `accepted`: tokens by draft position.
    - `segments`: for each segment of rounds without compilation: rows of the program, draft length, rounds, seconds,
        rounds summed over active rows, tokens.
    - `compile_seconds`: spent compiling within `seconds`; 0 but for a controller that kept asking for new programs.
    - `stolen_seconds`: processor time, of all cores, that the host of a virtual machine gave to others meanwhile;
        `None` where that is not known.
    """

    rows: int
    draft: str
    verifier: str | None
    length: int | str
    round: int
    place: int
    seconds: float
    tokens: int
    target_forwards: int
    emitted: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    segments: tuple[dict[str, Any], ...]
    compile_seconds: float
    stolen_seconds: float | None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able object."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


def rotating(num_arms: int, num_rounds: int) -> Iterator[tuple[int, int, int]]:
    """Round, place and arm: every arm once a round, each round beginning one arm further, so that none is always
    measured first, or right after a pause."""
    for number in range(num_rounds):
        for place in range(num_arms):
            yield number, place, (number + place) % num_arms


class Workload(eqx.Module):
    """What every arm decodes.

    **Arguments:**

    - `prompts`: for the warm-up, then for each round in turn; all of one shape.
    - `samples`: completions a prompt.
    - `new`: the longest completion, in tokens.
    - `sampling`, `eos_ids`, `key`, `max_rows`: as for `decode`.
    """

    prompts: tuple[Prompts, ...]
    samples: int
    new: int
    sampling: AbstractSampling
    eos_ids: tuple[int, ...]
    key: Key[Array, ""]
    max_rows: int | None = None

    @property
    def rows(self) -> int:
        return len(self.prompts[0].lengths) * self.samples

    @property
    def rounds(self) -> int:
        return len(self.prompts) - 1


class Measurement(eqx.Module):
    """All that was measured with so many rows.

    **Arguments:**

    - `runs`: every arm in every round.
    - `compile_seconds`: by arm, spent compiling outside of what counts; programs that arms share are the first one's.
    - `plain`: completions of plain decoding in the first round, for whoever wants to know the policy.
    """

    runs: tuple[ArmRun, ...]
    compile_seconds: tuple[tuple[str, float], ...]
    plain: Rollouts


def measure(
    target: AbstractLanguageModel,
    arms: Sequence[Arm],
    workload: Workload,
    on_phase: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[DecodeProgress], None] | None = None,
) -> Measurement:
    """Decodes with every arm in every round. One of the arms is plain decoding.

    A decoding in which something was compiled does not count and is done again. A controller learns in the warm-up,
    and goes on learning from round to round.

    **Arguments:**

    - `target`: in the dtype to compute in.
    - `arms`: one of them is `plain_arm()`.
    - `workload`: what to decode.
    - `on_phase`: told what is going on.
    - `on_progress`: as for `decode`.
    """
    what = f"{workload.rows} rows"
    states: list[Any] = [None] * len(arms)
    compiled = [0.0] * len(arms)
    for index, arm in enumerate(arms):
        on_phase(f"{what}: compiling {arm}")
        for _ in range(_MOST_TRIES):
            run, _, states[index] = _one(target, arm, workload, 0, 0, states[index], on_progress)
            compiled[index] += run.compile_seconds
            if run.compile_seconds == 0:
                break
    runs, plain = [], None
    for number, place, index in rotating(len(arms), workload.rounds):
        on_phase(f"{what}: round {number + 1} of {workload.rounds}, {arms[index]}")
        arm, tries = arms[index], 0
        while True:
            run, rollouts, states[index] = _one(target, arm, workload, 1 + number, place, states[index], on_progress)
            tries += 1
            if run.compile_seconds == 0 or tries == _MOST_TRIES:
                break
            compiled[index] += run.compile_seconds
        runs.append(run)
        if arm.name == PLAIN and plain is None:
            plain = rollouts
    if plain is None:
        raise ValueError("none of the arms is plain decoding: add plain_arm(), which the others are compared to")
    return Measurement(tuple(runs), tuple((str(arm), s) for arm, s in zip(arms, compiled, strict=True)), plain)


def _one(
    target: AbstractLanguageModel,
    arm: Arm,
    workload: Workload,
    number: int,
    place: int,
    state: Any,
    on_progress: Callable[[DecodeProgress], None] | None,
) -> tuple[ArmRun, Rollouts, Any]:
    """One decoding of the prompts `number` (0 are the warm-up's): what was seen, the completions, and the controller's
    new state."""
    observations: list[SegmentObservation] = []
    new_state = state

    def seen(observation: SegmentObservation, length_state: Any) -> None:
        nonlocal new_state
        observations.append(observation)
        new_state = length_state

    begin, stolen_before = time.perf_counter(), stolen_seconds()
    with count_compilations() as compilations:
        rollouts = decode(
            target,
            workload.prompts[number],
            draft=arm.draft,
            verifier=arm.verifier,
            length=AdaptiveLength(arm.longest) if arm.length is None else FixedLength(arm.length),
            length_state=state,
            sampling=workload.sampling,
            key=jr.fold_in(workload.key, number),
            max_new_tokens=workload.new,
            eos_ids=workload.eos_ids,
            samples=workload.samples,
            max_rows=workload.max_rows,
            on_progress=on_progress,
            on_segment=seen,
        )
    seconds, stolen = time.perf_counter() - begin, stolen_seconds()
    found = rollouts.statistics
    run = ArmRun(
        rows=workload.rows,
        draft=arm.name,
        verifier=arm.verifier_name,
        length=arm.length_name,
        round=number - 1,
        place=place,
        seconds=seconds,
        tokens=int(rollouts.lengths.sum()),
        target_forwards=int(found.target_forwards.sum()),
        emitted=int(found.emitted.sum()),
        drafted=_positions(found.drafted.sum(0).tolist(), arm),
        accepted=_positions(found.accepted.sum(0).tolist(), arm),
        segments=tuple(
            {
                "rows": o.rows,
                "length": o.plan.length,
                "rounds": o.rounds,
                "seconds": o.seconds,
                "active_rounds": o.active_rounds,
                "tokens": o.tokens,
            }
            for o in observations
            if o.seconds is not None and o.rounds > 0
        ),
        compile_seconds=compilations.seconds,
        stolen_seconds=None if stolen is None or stolen_before is None else stolen - stolen_before,
    )
    return run, rollouts, new_state


def _positions(counts: list[int], arm: Arm) -> tuple[int, ...]:
    """Without those that the arm never drafts."""
    return tuple(counts[: arm.longest if arm.length is None else arm.length])
