"""Rollouts of several processes put together: each decodes and judges prompts of its own, and then all have all."""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from .._types import DecodeStatistics, Prompts, Rollouts, Support
from ..layout import AbstractProcesses
from ..tasks import RewardLog


class Judged(NamedTuple):
    """Rollouts and what reward functions made of them.

    **Arguments:**

    - `rollouts`: the completions.
    - `per_function`, `total`: the rewards of each function and their sum.
    - `texts`: what was judged.
    - `extra`: columns that reward functions logged, one value a row.
    - `metrics`: what they logged of the step.
    """

    rollouts: Rollouts
    per_function: Float[np.ndarray, "rows functions"]
    total: Float[np.ndarray, " rows"]
    texts: list[str]
    extra: dict[str, list[Any]]
    metrics: dict[str, float]

    @staticmethod
    def of(
        rollouts: Rollouts,
        per_function: Float[np.ndarray, "rows functions"],
        total: Float[np.ndarray, " rows"],
        texts: list[str],
        log: RewardLog,
    ) -> "Judged":
        """What one process has."""
        return Judged(rollouts, per_function, total, texts, log.extra, log.metrics)


def gather_judged(
    processes: AbstractProcesses, phase: str, own: Judged, prompts: Prompts, while_waiting: Callable[[], None]
) -> Judged:
    """The rows of all processes, in their order, which is that of the prompts.

    **Arguments:**

    - `phase`: see [`eqx_specgrpo.layout.AbstractProcesses`][].
    - `own`: of this process's share of the prompts.
    - `prompts`: all of them.
    - `while_waiting`: called now and then; may raise.
    """
    if processes.count == 1:
        return own
    arrays = _arrays(own.rollouts) | {"per_function": own.per_function, "total": own.total}
    told = {"texts": own.texts, "extra": own.extra, "metrics": own.metrics}
    # JSON of Python's own, which keeps NaN, and halves of characters.
    words = processes.exchange(phase, _packed(arrays, json.dumps(told)), while_waiting=while_waiting)
    parts = [_unpacked(word) for word in words]
    found = [json.loads(text) for _, text in parts]
    names = dict.fromkeys(name for one in found for name in one["extra"])
    metrics = dict.fromkeys(name for one in found for name in one["metrics"])
    return Judged(
        _joined([arrays for arrays, _ in parts], prompts),
        np.concatenate([arrays["per_function"] for arrays, _ in parts]),
        np.concatenate([arrays["total"] for arrays, _ in parts]),
        [text for one in found for text in one["texts"]],
        {
            name: [value for one in found for value in one["extra"].get(name, [None] * len(one["texts"]))]
            for name in names
        },
        {name: float(np.mean([one["metrics"][name] for one in found if name in one["metrics"]])) for name in metrics},
    )


def gather_rollouts(
    processes: AbstractProcesses, phase: str, own: Rollouts, prompts: Prompts, while_waiting: Callable[[], None]
) -> Rollouts:
    """The same for rollouts that nobody judges."""
    rows = len(own.group)
    judged = Judged(own, np.zeros((rows, 0)), np.zeros(rows), [""] * rows, {}, {})
    return gather_judged(processes, phase, judged, prompts, while_waiting).rollouts


def own_prompts(processes: AbstractProcesses, prompts: Prompts) -> Prompts:
    """This process's share."""
    own = processes.share(len(prompts.lengths))
    return Prompts(prompts.tokens[own], prompts.lengths[own])


_PER_ROW = ("tokens", "lengths", "logprobs", "stop_reasons")
_COUNTS = ("target_forwards", "drafted", "accepted", "emitted")


def _arrays(rollouts: Rollouts) -> dict[str, np.ndarray]:
    counts = vars(rollouts.statistics)
    arrays = {"group": rollouts.group} | {name: vars(rollouts)[name] for name in _PER_ROW}
    arrays |= {name: counts[name] for name in _COUNTS}
    if rollouts.support is not None:
        arrays |= {
            "support_ids": np.asarray(rollouts.support.ids),
            "support_counts": np.asarray(rollouts.support.counts),
        }
    return arrays


def _joined(parts: Sequence[dict[str, np.ndarray]], prompts: Prompts) -> Rollouts:
    groups, first = [], 0
    for arrays in parts:
        groups.append(arrays["group"] + first)
        first += int(arrays["group"].max(initial=-1)) + 1
    assert first == len(prompts.lengths)
    whole = {name: np.concatenate([arrays[name] for arrays in parts]) for name in (*_PER_ROW, *_COUNTS)}
    support = None
    if "support_ids" in parts[0]:
        kept = max(arrays["support_ids"].shape[-1] for arrays in parts)
        ids = [
            np.pad(arrays["support_ids"], ((0, 0), (0, 0), (0, kept - arrays["support_ids"].shape[-1])))
            for arrays in parts
        ]
        support = Support(np.concatenate(ids), np.concatenate([arrays["support_counts"] for arrays in parts]))
    return Rollouts(
        prompts=prompts,
        group=np.concatenate(groups).astype(np.int32),
        **{name: whole[name] for name in _PER_ROW},
        statistics=DecodeStatistics(**{name: whole[name] for name in _COUNTS}),
        support=support,
    )


def _packed(arrays: dict[str, np.ndarray], text: str) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, text=np.frombuffer(text.encode("utf-8"), np.uint8), **arrays)
    return file.getvalue()


def _unpacked(word: bytes) -> tuple[dict[str, np.ndarray], str]:
    with np.load(io.BytesIO(word), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, arrays.pop("text").tobytes().decode("utf-8")
