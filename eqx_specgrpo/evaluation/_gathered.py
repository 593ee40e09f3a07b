"""Rollouts and rewards of several processes put together: each decodes and judges prompts of its own, then all have
all."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from .._types import DecodeStatistics, Prompts, Rollouts, Support
from ..layout import AbstractProcesses
from ..tasks import RewardLog


class Judgement(NamedTuple):
    """What reward functions made of completions.

    **Arguments:**

    - `per_function`, `total`: the rewards of each function and their sum.
    - `extra`: columns that reward functions logged, one value a row.
    - `metrics`: what they logged of the whole.
    """

    per_function: Float[np.ndarray, "rows functions"]
    total: Float[np.ndarray, " rows"]
    extra: Mapping[str, Sequence[Any]]
    metrics: Mapping[str, float]


def gather_rollouts(
    processes: AbstractProcesses, phase: str, own: Rollouts, prompts: Prompts, while_waiting: Callable[[], None]
) -> Rollouts:
    """The rows of all processes, in their order, which is that of the prompts.

    **Arguments:**

    - `phase`: see [`eqx_specgrpo.layout.AbstractProcesses`][].
    - `own`: of this process's share of the prompts, see [`own_prompts`][].
    - `prompts`: all of them.
    - `while_waiting`: called now and then; may raise.
    """
    if processes.count == 1:
        return own
    words = processes.exchange(phase, _packed(_arrays(own)), while_waiting=while_waiting)
    return _joined([_unpacked(word) for word in words], prompts)


def gather_rewards(
    processes: AbstractProcesses,
    phase: str,
    per_function: Float[np.ndarray, "rows functions"],
    total: Float[np.ndarray, " rows"],
    log: RewardLog,
    while_waiting: Callable[[], None],
) -> Judgement:
    """The same of what each process has made of its rows: a judge that draws lots is asked once of each. Of a metric
    that reward functions logged, the mean over the processes."""
    own = Judgement(per_function, total, log.extra, log.metrics)
    if processes.count == 1:
        return own
    told = json.dumps([dict(own.extra), dict(own.metrics)])  # of Python's own kind, which keeps NaN and half characters
    arrays = {"per_function": per_function, "total": total, "told": np.frombuffer(told.encode(), np.uint8)}
    found = [_unpacked(word) for word in processes.exchange(phase, _packed(arrays), while_waiting=while_waiting)]
    logged = [json.loads(arrays["told"].tobytes()) for arrays in found]
    columns = dict.fromkeys(name for extra, _ in logged for name in extra)
    names = dict.fromkeys(name for _, metrics in logged for name in metrics)
    rows = [len(arrays["total"]) for arrays in found]
    return Judgement(
        np.concatenate([arrays["per_function"] for arrays in found]),
        np.concatenate([arrays["total"] for arrays in found]),
        {name: _column(name, logged, rows) for name in columns},
        {name: float(np.mean([metrics[name] for _, metrics in logged if name in metrics])) for name in names},
    )


def _column(name: str, logged: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    """Of all processes; `None` for the rows of one that has not logged it."""
    parts = [extra.get(name, [None] * count) for (extra, _), count in zip(logged, rows, strict=True)]
    return [value for part in parts for value in part]


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


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _unpacked(word: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(word), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
