"""What a round that was never run may cost, from those that were: a prior by positions."""

import math
from collections.abc import Mapping, Sequence

# Where the curve has one point only, or below its first: a low power of the positions. Reading the weights costs the
# same however few positions there are, and a guess that is too low is put right by trying.
_POWER = 0.3


def guessed_log_seconds(
    log_seconds: Mapping[tuple[int, int], float], rows: int, lengths: Sequence[int]
) -> dict[int, float]:
    """The logarithms of the seconds of rounds with so many rows, by their number of guesses.

    A pass over `rows * (length + 1)` positions costs about what another one over as many does, whether they are many
    rows or many guesses. So what was measured is a curve over positions, which never falls, is straight between two
    that were measured, and goes on straight beyond the last. Where rounds with as many rows were measured, the nearest
    of them in length is the beginning, and the curve says by how much this one is dearer: what is peculiar to so many
    rows, such as their contexts, is in both.

    **Arguments:**

    - `log_seconds`: of the rounds that were measured, by (rows, length); at least one.
    """
    curve = _curve(log_seconds)
    same = sorted(k for r, k in log_seconds if r == rows)
    found = {}
    for length in lengths:
        wanted = _at(curve, rows * (length + 1))
        if same:
            nearest = min(same, key=lambda k: abs(k - length))
            there = math.exp(log_seconds[rows, nearest])
            # A round with fewer guesses is not free, whatever the curve says.
            wanted = max(there + wanted - _at(curve, rows * (nearest + 1)), 0.2 * there)
        found[length] = math.log(wanted)
    return found


def _curve(log_seconds: Mapping[tuple[int, int], float]) -> list[tuple[float, float]]:
    """Positions and seconds, ascending in both: neighbours that fall are brought to their mean."""
    found: dict[int, list[float]] = {}
    for (rows, length), value in log_seconds.items():
        found.setdefault(rows * (length + 1), []).append(math.exp(value))
    pools: list[list[tuple[int, float]]] = []  # of places that share a value

    def mean(pool: list[tuple[int, float]]) -> float:
        return sum(seconds for _, seconds in pool) / len(pool)

    for positions in sorted(found):
        pools.append([(positions, sum(found[positions]) / len(found[positions]))])
        while len(pools) > 1 and mean(pools[-2]) > mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [(float(positions), mean(pool)) for pool in pools for positions, _ in pool]


def _at(curve: list[tuple[float, float]], positions: int) -> float:
    first, last = curve[0], curve[-1]
    if positions <= first[0]:
        return first[1] * (positions / first[0]) ** _POWER
    if positions >= last[0]:
        before = [point for point in curve if 2 * point[0] <= last[0]]
        if not before:
            return last[1] * (positions / last[0]) ** _POWER
        slope = (last[1] - before[-1][1]) / (last[0] - before[-1][0])
        return last[1] + slope * (positions - last[0])
    for low, high in zip(curve, curve[1:], strict=False):
        if low[0] <= positions <= high[0]:
            share = (positions - low[0]) / (high[0] - low[0])
            return low[1] + share * (high[1] - low[1])
    raise AssertionError("positions lie between two points")
