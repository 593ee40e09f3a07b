"""What longer contexts add to a round, from rounds that were timed."""

import math
from collections.abc import Iterable
from typing import NamedTuple

_FORGET_AFTER = 300.0  # segments of a kind after which one of them has lost most of its weight


class Moments(NamedTuple):
    """Of the segments of one kind: their contexts and the seconds of their rounds, with old ones forgotten.

    What deviates is taken from the means of the same decoding. Between decodings other things change, such as the
    machine's pace and the prompts, and the longest contexts are all in the same few of them.

    **Arguments:**

    - `weight`: of all segments.
    - `context`, `seconds`: means.
    - `context_squares`, `products`, `seconds_squares`: sums of what deviates from the means of each decoding.
    - `decoding`: which one the last segment belongs to.
    - `here_weight`, `here_weight_squares`, `here_context`, `here_seconds`: of its segments, their weights, the squares
        of these, and means.
    - `earlier_freedom`: how many independent segments there were in earlier decodings, less one for each decoding.
    """

    weight: float = 0.0
    context: float = 0.0
    seconds: float = 0.0
    context_squares: float = 0.0
    products: float = 0.0
    seconds_squares: float = 0.0
    decoding: int = 0
    here_weight: float = 0.0
    here_weight_squares: float = 0.0
    here_context: float = 0.0
    here_seconds: float = 0.0
    earlier_freedom: float = 0.0

    @property
    def freedom(self) -> float:
        """How many independent segments there were, less one for each decoding."""
        # Of segments with such weights, as many as have this mean of their weights.
        here = self.here_weight**2 / self.here_weight_squares - 1 if self.here_weight_squares > 0 else 0.0
        return self.earlier_freedom + here

    def plus(self, context: float, seconds: float, decoding: int = 0) -> "Moments":
        if decoding != self.decoding:
            self = self._replace(
                decoding=decoding, here_weight=0.0, here_weight_squares=0.0, earlier_freedom=self.freedom
            )
        keep = math.exp(-1 / _FORGET_AFTER)
        weight, here_weight = keep * self.weight + 1.0, keep * self.here_weight + 1.0
        away, off = context - self.here_context, seconds - self.here_seconds
        shrink = keep * self.here_weight / here_weight
        return Moments(
            weight=weight,
            context=self.context + (context - self.context) / weight,
            seconds=self.seconds + (seconds - self.seconds) / weight,
            context_squares=keep * self.context_squares + shrink * away**2,
            products=keep * self.products + shrink * away * off,
            seconds_squares=keep * self.seconds_squares + shrink * off**2,
            decoding=decoding,
            here_weight=here_weight,
            here_weight_squares=keep**2 * self.here_weight_squares + 1.0,
            here_context=self.here_context + away / here_weight,
            here_seconds=self.here_seconds + off / here_weight,
            earlier_freedom=keep * self.earlier_freedom,
        )

    def by_rows(self, rows: int) -> "Moments":
        """Sums as if the contexts of so many rows were counted together. The means stay those of one row."""
        return self._replace(context_squares=rows**2 * self.context_squares, products=rows * self.products)


def slope_of(kinds: Iterable[Moments]) -> float:
    """By how much a round of any of these kinds becomes longer for each unit of context: one slope for all, each kind
    with a constant of its own in each decoding (the analysis of covariance).

    It is multiplied by `1 - error**2 / slope**2`, the positive part of James and Stein's factor: so it is 0 where
    nothing stands out of the noise.
    """
    kinds = list(kinds)
    squares = sum(kind.context_squares for kind in kinds)
    freedom = sum(kind.freedom for kind in kinds) - 1
    if squares <= 0 or freedom <= 0:
        return 0.0
    slope = sum(kind.products for kind in kinds) / squares
    unexplained = max(0.0, sum(kind.seconds_squares for kind in kinds) - slope**2 * squares)
    error_squared = unexplained / squares / freedom
    if slope <= 0 or slope**2 <= error_squared:
        return 0.0
    return slope * (1 - error_squared / slope**2)
