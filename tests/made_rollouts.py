"""Rollouts that no decoder made, for tests of what is done with them."""

import numpy as np

from eqx_specgrpo._types import DecodeStatistics, Prompts, Rollouts


def make_rollouts(prompts: list[list[int]], group: list[int], completions: list[list[int]]) -> Rollouts:
    """Completions of the prompts that `group` says; their padding, log-probabilities and statistics mean nothing."""
    rows, new = len(completions), max(len(completion) for completion in completions)
    tokens = np.full((rows, new), 1_000_000, np.int32)
    for row, completion in enumerate(completions):
        tokens[row, : len(completion)] = completion
    lengths = np.array([len(completion) for completion in completions], np.int32)
    zeros, counts = np.zeros(rows, np.int32), np.zeros((rows, 1), np.int32)
    statistics = DecodeStatistics(zeros, counts, counts, zeros)
    return Rollouts(
        Prompts.from_lists(prompts),
        np.array(group, np.int32),
        tokens,
        lengths,
        np.zeros(tokens.shape),
        zeros,
        statistics,
        None,
    )
