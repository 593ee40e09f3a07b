"""Items that are kept from training, to measure on."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import UserError
from ._base import AbstractTask, Example, check_index, example_index

_ORDER = 0x68656C64  # the order from which held-out items are taken, apart from the order of training
_ELSEWHERE, _ATTEMPTS = 1 << 40, 100


class TaskSplit(NamedTuple):
    """A task to train on, and one to measure on that shares no prompt with it.

    **Arguments:**

    - `training`: the task to train on; endless if the original task was.
    - `held_out`: the items to measure on; always with an end.
    """

    training: AbstractTask
    held_out: AbstractTask


def hold_out(task: AbstractTask, count: int) -> TaskSplit:
    """Splits some items off a task, so that they are not trained on. The split depends on the task's `seed` only.

    From a finite task the items are taken at random, from an endless one the first items are taken. Other items with
    the prompt of a held-out item are not trained on either.

    **Arguments:**

    - `count`: number of items to hold out.

    **Raises:**

    `UserError` if that leaves nothing to train on.
    """
    size = task.size
    if size is None:
        held = Chosen(task, tuple(range(count)))
        return TaskSplit(Without(task, prompts_of(held)), held)
    if count < size:
        held = Chosen(task, tuple(sorted(example_index(place, size, task.seed ^ _ORDER) for place in range(count))))
        kept = prompts_of(held)
        rest = tuple(index for index in range(size) if prompt_key(task.example(index)) not in kept)
        if rest:
            return TaskSplit(Chosen(task, rest), held)
    raise UserError(
        f"eval.holdout = {count} leaves nothing to train on of a task of {size} items: hold out fewer, or give the "
        "evaluation a task of its own (eval.task)"
    )


def keep_apart(task: AbstractTask, other: AbstractTask, limit: int | None) -> TaskSplit:
    """Makes a split of two tasks that must not share a prompt.

    **Arguments:**

    - `task`: the task to train on. In an endless task, items with a prompt of the other task are skipped.
    - `other`: the task to measure on.
    - `limit`: the most items of the other task that are used, in the order of its own seed; `None`: all.

    **Raises:**

    `UserError` if a prompt of a finite `task` is in `other` as well, or `other` has no end and there is no `limit`.
    """
    held = first_items(other, limit)
    if task.size is None:
        return TaskSplit(Without(task, prompts_of(held)), held)
    theirs = prompts_of(held)
    shared = [index for index in range(task.size) if prompt_key(task.example(index)) in theirs]
    if shared:
        prompt = task.example(shared[0]).prompt
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        raise UserError(
            f"{len(shared)} of the task's {task.size} items have a prompt of the evaluation's task as well, the first "
            f"of them {text[:80]!r}: take them out of one of the two, or hold items out of the task itself "
            "(eval.holdout, without eval.task)"
        )
    return TaskSplit(task, held)


def first_items(task: AbstractTask, limit: int | None) -> AbstractTask:
    """Makes a task of the first items of a task, in the order of its seed; of all items without a limit.

    **Raises:**

    `UserError` if the task has no end, and there is no limit.
    """
    if task.size is None:
        if limit is None:
            raise UserError("the evaluation's task has no end: say how many of its items are measured on (eval.limit)")
        return Chosen(task, tuple(range(limit)))
    if limit is None or limit >= task.size:
        return task
    return Chosen(task, tuple(example_index(place, task.size, task.seed) for place in range(limit)))


def prompts_of(task: AbstractTask) -> frozenset[bytes]:
    """The [`prompt_key`][] of each item of a task with an end."""
    assert task.size is not None
    return frozenset(prompt_key(task.example(index)) for index in range(task.size))


def prompt_key(example: Example) -> bytes:
    """Equal for equal prompts."""
    text = json.dumps(example.prompt, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Chosen(AbstractTask):
    """Some items of a task, as a task of its own.

    **Arguments:**

    - `task`: whose items they are.
    - `indices`: which.
    """

    seed: int
    size: int | None
    task: AbstractTask
    indices: tuple[int, ...]

    def __init__(self, task: AbstractTask, indices: tuple[int, ...]):
        self.seed, self.size = task.seed, len(indices)
        self.task, self.indices = task, indices

    def example(self, index: int) -> Example:
        check_index(index, self.size)
        return self.task.example(self.indices[index])

    def default_rewards(self) -> Mapping[str, Callable[..., Any]]:
        return self.task.default_rewards()

    def fingerprint(self) -> str:
        return _joined(self.task.fingerprint(), repr(self.indices))


class Without(AbstractTask):
    """An endless task without the items whose prompts are held out.

    Where one stands in the stream, another item takes its place, from so far along that no run gets there by itself.
    So an item is still a function of its index alone.

    **Arguments:**

    - `task`: without an end.
    - `held_out`: the [`prompt_key`][] of each prompt.
    """

    seed: int
    size: int | None
    task: AbstractTask
    held_out: frozenset[bytes]

    def __init__(self, task: AbstractTask, held_out: frozenset[bytes]):
        self.seed, self.size = task.seed, None
        self.task, self.held_out = task, held_out

    def example(self, index: int) -> Example:
        check_index(index, self.size)
        for attempt in range(_ATTEMPTS):
            example = self.task.example(index + attempt * _ELSEWHERE)
            if prompt_key(example) not in self.held_out:
                return example
        raise UserError(
            f"{_ATTEMPTS} items of the task in a row have a prompt that is held out: the task has hardly any others, "
            "hold out fewer (eval.holdout, eval.limit)"
        )

    def default_rewards(self) -> Mapping[str, Callable[..., Any]]:
        return self.task.default_rewards()

    def fingerprint(self) -> str:
        return _joined(self.task.fingerprint(), *sorted(key.hex() for key in self.held_out))


def _joined(*parts: str) -> str:
    return hashlib.blake2b("/".join(parts).encode(), digest_size=16).hexdigest()
