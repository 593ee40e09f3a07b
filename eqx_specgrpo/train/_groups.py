"""Groups of rollouts taken out of several batches, and put together."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from .._types import DecodeStatistics, Prompts, Rollouts


def rows_of_groups(group: Int[np.ndarray, " rows"], groups: Sequence[int]) -> Int[np.ndarray, " chosen"]:
    """The rows of some groups, group by group in that order."""
    found = [np.flatnonzero(group == one) for one in groups]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def join_groups(parts: Sequence[tuple[Rollouts, Sequence[int]]]) -> Rollouts:
    """One batch of rollouts of groups of several, in the order given.

    **Arguments:**

    - `parts`: batches of the same completion width, and which of their groups; at least one in all.
    """
    rows = [(rollouts, rows_of_groups(rollouts.group, groups)) for rollouts, groups in parts if len(groups)]
    groups = [(rollouts.prompts, list(groups)) for rollouts, groups in parts if len(groups)]
    width = max(prompts.tokens.shape[1] for prompts, _ in groups)
    padded = [np.pad(p.tokens[which], ((0, 0), (0, width - p.tokens.shape[1]))) for p, which in groups]
    prompts = Prompts(np.concatenate(padded), np.concatenate([p.lengths[which] for p, which in groups]))
    counts = [np.count_nonzero(r.group == one) for r, which in parts for one in which]
    statistics = [(rollouts.statistics, chosen) for rollouts, chosen in rows]
    return Rollouts(
        prompts=prompts,
        group=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        tokens=np.concatenate([rollouts.tokens[chosen] for rollouts, chosen in rows]),
        lengths=np.concatenate([rollouts.lengths[chosen] for rollouts, chosen in rows]),
        logprobs=np.concatenate([rollouts.logprobs[chosen] for rollouts, chosen in rows]),
        stop_reasons=np.concatenate([rollouts.stop_reasons[chosen] for rollouts, chosen in rows]),
        statistics=DecodeStatistics(
            np.concatenate([found.target_forwards[chosen] for found, chosen in statistics]),
            np.concatenate([found.drafted[chosen] for found, chosen in statistics]),
            np.concatenate([found.accepted[chosen] for found, chosen in statistics]),
            np.concatenate([found.emitted[chosen] for found, chosen in statistics]),
        ),
        support=jax.tree.map(
            lambda *arrays: np.concatenate([x[chosen] for x, (_, chosen) in zip(arrays, rows, strict=True)]),
            *[rollouts.support for rollouts, _ in rows],
        ),
    )
