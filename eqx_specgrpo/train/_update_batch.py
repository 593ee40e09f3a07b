"""Rollouts as an update batch where no policy is updated: for a draft that learns alone."""

import numpy as np

from .._types import Rollouts
from ..grpo import UpdateBatch, make_update_batch


def plain_batch(rollouts: Rollouts) -> UpdateBatch:
    """The sequences, without advantages."""
    return make_update_batch(rollouts, np.zeros(len(rollouts.group), np.float32))
