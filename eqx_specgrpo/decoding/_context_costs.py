"""What longer contexts add to a round, from rounds that were timed."""

import math
from collections.abc import Iterable
from typing import NamedTuple

_FORGET_AFTER = 300.0  # segments of a kind after which one of them has lost most of its weight


class Moments(NamedTuple):
    """Of the segments of one kind: their contexts and the seconds of their rounds, with old ones forgotten.

    **Arguments:**

    - `weight`: of all segments; `weight_squares`: of their squared weights.
    - `context`, `seconds`: means.
    - `context_squares`, `products`, `seconds_squares`: sums of what deviates from these.
    """

    weight: float = 0.0
    weight_squares: float = 0.0
    context: float = 0.0
    seconds: float = 0.0
    context_squares: float = 0.0
    products: float = 0.0
    seconds_squares: float = 0.0

    def plus(self, context: float, seconds: float) -> "Moments":
        keep = math.exp(-1 / _FORGET_AFTER)
        weight = keep * self.weight + 1.0
        away, off = context - self.context, seconds - self.seconds
        shrink = keep * self.weight / weight
        return Moments(
            weight,
            keep**2 * self.weight_squares + 1.0,
            self.context + away / weight,
            self.seconds + off / weight,
            keep * self.context_squares + shrink * away**2,
            keep * self.products + shrink * away * off,
            keep * self.seconds_squares + shrink * off**2,
        )


def slope_of(kinds: Iterable[Moments], prior: float = 0.0) -> float:
    """By how much a round of any of these kinds becomes longer for each unit of context: one slope for all, each kind
    with a constant of its own (the analysis of covariance).

    **Arguments:**

    - `prior`: what holds where nothing stands out of the noise. The estimate moves away from it by `1 - error**2 /
        difference**2`, the positive part of James and Stein's factor.
    """
    kinds = [kind for kind in kinds if kind.weight_squares > 1]
    squares = sum(kind.context_squares for kind in kinds)
    # Of independent segments, as many as have this mean of their weights, less the constants and the slope.
    freedom = sum(kind.weight**2 / kind.weight_squares - 1 for kind in kinds) - 1
    if squares <= 0 or freedom <= 0:
        return prior
    slope = sum(kind.products for kind in kinds) / squares
    unexplained = max(0.0, sum(kind.seconds_squares for kind in kinds) - slope**2 * squares)
    error_squared = unexplained / squares / freedom
    difference = slope - prior
    if difference**2 <= error_squared:
        return prior
    return max(0.0, prior + difference * (1 - error_squared / difference**2))
