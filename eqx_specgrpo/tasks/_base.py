"""What a task is: prompts by number, with the columns that its rewards need. Knows nothing of models or tokens."""

import abc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx

from .._types import Message

_FINGERPRINTED = 4  # items; some take a while to make


@dataclass(frozen=True)
class Example:
    """An item of a task: a prompt, with the columns that rewards need.

    **Arguments:**

    - `prompt`: plain text, or a list of messages for the chat template.
    - `columns`: values that the reward functions get by name.
    """

    prompt: str | list[Message]
    columns: dict[str, Any] = field(default_factory=dict)


class AbstractTask(eqx.Module):
    """A task: a source of prompts that are addressed by number, so that the place in the data is one integer.

    Subclasses have `seed`, `size` (`None` if unbounded) and `example`, and may have rewards of their own.
    """

    seed: eqx.AbstractVar[int]
    size: eqx.AbstractVar[int | None]

    @abc.abstractmethod
    def example(self, index: int) -> Example:
        """Returns item `index`, with `0 <= index < size`. It depends on the seed and the index only."""

    def default_rewards(self) -> Mapping[str, Callable[..., Any]]:
        """Returns the task's own rewards by name. They are used if no reward is named, and can be named as well."""
        return {}

    def fingerprint(self) -> str:
        """Changes when the items do, as hexadecimal digits. Here of the first of them, which tell another version of
        whatever makes the items; a task that is read from a file takes all of it."""
        first = range(_FINGERPRINTED if self.size is None else min(_FINGERPRINTED, self.size))
        digest = hashlib.blake2b(digest_size=16)
        for index in first:
            digest.update(repr(self.example(index)).encode("utf-8", "replace"))
        return digest.hexdigest()

    def at(self, position: int) -> Example:
        """Returns the item at a position of the endless, shuffled stream of this task.

        **Arguments:**

        - `position`: number of items before it, over all epochs.

        **Returns:**

        The [`example`][] at [`eqx_specgrpo.tasks.example_index`][].
        """
        return self.example(example_index(position, self.size, self.seed))


def example_index(position: int, size: int | None, seed: int) -> int:
    """Computes the index of the item at a position of the stream. Every epoch is a permutation of its own of all items.

    The permutation is computed pointwise, by a Feistel network with cycle walking (Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002), so nothing needs to be stored, whatever the size and however far the run has come.

    **Arguments:**

    - `position`: how many items came before, over all epochs.
    - `size`: number of items; `None` for an unbounded task, which is read in order.
    - `seed`: of the shuffle.

    **Returns:**

    The index of an item, in `[0, size)`.
    """
    if position < 0:
        raise ValueError(f"`position` is {position}: it counts items from the beginning, so it can't be negative")
    if size is None:
        return position
    if size < 1:
        raise ValueError(f"`size` is {size}: a task needs at least one item")
    epoch, index = divmod(position, size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for feistel_round in range(8):
            digest = hashlib.blake2b(f"{seed}/{epoch}/{feistel_round}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = (left << half) | right
        if index < size:
            return index


def check_index(index: int, size: int | None) -> None:
    if index < 0 or (size is not None and index >= size):
        raise IndexError(
            f"item {index} was asked for, but this task has items 0 to {'...' if size is None else size - 1}"
        )


def collate(examples: Sequence[Example]) -> tuple[list[str | list[Message]], dict[str, list[Any]]]:
    """Turns examples into the lists that reward functions take.

    **Arguments:**

    - `examples`: one per row; repeat an example for each of its samples.

    **Returns:**

    The prompts, and for each column one value per row, `None` where an example doesn't have the column.
    """
    names = list(dict.fromkeys(name for example in examples for name in example.columns))
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    return [example.prompt for example in examples], columns
