"""Which rows start first where not all are decoded at once: those that are expected to be longest.

A long row that starts last keeps the device at work for itself alone (longest processing time first: Graham 1969,
"Bounds on multiprocessing timing anomalies", section 5). It is a matter of speed only: a row's random numbers do not
depend on when it starts.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int


class StartOrder:
    """The rows that wait.

    **Arguments:**

    - `expected`: length of the completions of each prompt, `nan` where nothing is known of it; `None`: rows start in
        their own order.
    - `num_prompts`, `samples`: how many prompts, and rows of each; rows of a prompt are consecutive.
    - `rows`: which of the rows wait; all by default.
    """

    def __init__(
        self,
        expected: Sequence[float] | None,
        num_prompts: int,
        samples: int,
        rows: Int[np.ndarray, " waiting"] | None = None,
    ):
        if expected is not None and len(expected) != num_prompts:
            raise ValueError(f"expected_lengths has {len(expected)} values for {num_prompts} prompts")
        self._expected = None if expected is None else np.asarray(expected, float)
        self._samples = samples
        self._waiting = np.arange(num_prompts * samples) if rows is None else rows

    def __len__(self) -> int:
        return len(self._waiting)

    def take(
        self, count: int, lengths: Int[np.ndarray, " rows"], ended: Bool[np.ndarray, " rows"]
    ) -> Int[np.ndarray, " started"]:
        """The rows to start next.

        **Arguments:**

        - `count`: how many.
        - `lengths`, `ended`: of all rows: which have ended, and with how many tokens.
        """
        if self._expected is not None:
            expected = expected_lengths(self._expected, lengths, ended)[self._waiting // self._samples]
            self._waiting = self._waiting[np.lexsort((self._waiting, -expected))]
        started, self._waiting = np.split(self._waiting, [count])
        return started


def expected_lengths(
    known: Float[np.ndarray, " prompts"], lengths: Int[np.ndarray, " rows"], ended: Bool[np.ndarray, " rows"]
) -> Float[np.ndarray, " prompts"]:
    """What is known of a prompt, else the mean of its rows that have ended, else the mean of other prompts.

    **Arguments:**

    - `known`: from before, `nan` where there is nothing.
    - `lengths`, `ended`: of the rows; those of a prompt are consecutive.
    """
    ended = ended.reshape(len(known), -1)
    count = ended.sum(1)
    siblings = np.where(ended, lengths.reshape(ended.shape), 0).sum(1) / np.maximum(count, 1)
    expected = np.where(np.isnan(known), np.where(count > 0, siblings, np.nan), known)
    missing = np.isnan(expected)
    return np.where(missing, 0.0 if missing.all() else expected[~missing].mean(), expected)
