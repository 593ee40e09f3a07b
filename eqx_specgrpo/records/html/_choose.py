"""Which completions a report holds: all of a short run, of a long one whole steps spread over it, and the extremes."""

from collections.abc import Mapping, Sequence
from typing import Any

EXTREMES = 20  # of the best and of the worst completions of all steps


def choose_completions(records: Sequence[Mapping[str, Any]], characters: int) -> list[Mapping[str, Any]]:
    """Records within a budget, in their order.

    A step is taken whole or not at all, since completions of a prompt are read beside one another. The first and the
    last step come first, then those halfway between ones that were taken. The best and the worst completions of all
    steps are added.

    **Arguments:**

    - `records`: objects of `completions.jsonl`, in the order of steps.
    - `characters`: how many of prompts and completions are kept, more or less.
    """
    by_step: dict[int, list[int]] = {}
    for number, record in enumerate(records):
        by_step.setdefault(record["step"], []).append(number)
    chosen: set[int] = set()
    for step in _spread(list(by_step)):
        size = sum(_size(records[number]) for number in by_step[step])
        if size > characters and chosen:
            break
        characters -= size
        chosen.update(by_step[step])
    if len(chosen) < len(records):
        rewarded = [number for number, record in enumerate(records) if _is_number(record.get("reward"))]
        rewarded.sort(key=lambda number: records[number]["reward"])
        chosen.update([*rewarded[:EXTREMES], *rewarded[-EXTREMES:]])
    return [records[number] for number in sorted(chosen)]


def _spread(steps: Sequence[int]) -> list[int]:
    """First and last, then ever finer halves: whatever number is taken from the front is spread over all."""
    ends = dict.fromkeys([0, len(steps) - 1] if steps else [])
    gaps = [(0, len(steps) - 1)]
    while gaps:
        halves = []
        for low, high in gaps:
            middle = (low + high) // 2
            if high - low > 1:
                ends[middle] = None
                halves += [(low, middle), (middle, high)]
        gaps = halves
    return [steps[place] for place in ends]


def _size(record: Mapping[str, Any]) -> int:
    return len(str(record.get("prompt", ""))) + len(str(record.get("completion", "")))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
