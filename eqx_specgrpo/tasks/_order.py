"""In which order the items of a task come: by chance, or by how hard they have proved."""

import abc
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import equinox as eqx
import numpy as np
from jaxtyping import Float, Int

from ..errors import UserError
from ._base import AbstractTask, example_index

State = TypeVar("State")


class AbstractOrder(eqx.Module, Generic[State]):
    """The order of a task's items in its endless stream.

    In every epoch each item comes once. What an order learns about the items is its state, which is saved in
    checkpoints.
    """

    @abc.abstractmethod
    def init(self, task: AbstractTask) -> State:
        """Returns the state before the first item.

        **Raises:**

        `UserError` if the task has no such order.
        """

    @abc.abstractmethod
    def start(self, state: State, task: AbstractTask, position: int) -> State:
        """Returns the state in which `index` can be called with a position."""

    @abc.abstractmethod
    def index(self, state: State, task: AbstractTask, position: int) -> int:
        """Returns the index of the item at a position, for `AbstractTask.example`."""

    @abc.abstractmethod
    def update(self, state: State, indices: Sequence[int], rewards: Float[np.ndarray, " items"]) -> State:
        """Returns the state after some items were answered.

        **Arguments:**

        - `indices`: indices of the items.
        - `rewards`: the mean over each item's completions; NaN if no reward applied.
        """


class Shuffled(AbstractOrder[tuple[()]]):
    """The random order: every epoch is a permutation of its own, by the task's seed. It learns nothing about the
    items."""

    def init(self, task: AbstractTask) -> tuple[()]:
        del task
        return ()

    def start(self, state: tuple[()], task: AbstractTask, position: int) -> tuple[()]:
        del task, position
        return state

    def index(self, state: tuple[()], task: AbstractTask, position: int) -> int:
        del state
        return example_index(position, task.size, task.seed)

    def update(self, state: tuple[()], indices: Sequence[int], rewards: Float[np.ndarray, " items"]) -> tuple[()]:
        del indices, rewards
        return state


class DifficultyState(eqx.Module):
    """What is known of the items.

    **Arguments:**

    - `newest`: the mean reward of each item's newest completions; NaN before there were any.
    - `order`: the items of the present epoch, in order.
    - `epoch`: its number.
    """

    newest: Float[np.ndarray, " items"]
    order: Int[np.ndarray, " items"]
    epoch: Int[np.ndarray, ""]


class EasiestFirst(AbstractOrder[DifficultyState]):
    """The order in which, from the second epoch on, items with the highest mean reward so far come first.

    With rewards of 0 and 1 the mean is the share of right answers. The first epoch, in which nothing is known, is in
    the order of [`eqx_specgrpo.tasks.Shuffled`][], and so are items that are equally hard. The order of an epoch is
    made of what is known where it begins, and stays.

    ??? cite

        Bengio et al. 2009, "Curriculum learning",
        [doi:10.1145/1553374.1553380](https://doi.org/10.1145/1553374.1553380).
    """

    def init(self, task: AbstractTask) -> DifficultyState:
        if task.size is None:
            raise UserError(
                "curriculum = 'easiest_first' goes by how items were answered in an epoch before, but the task has no "
                "end: give it a size, or leave curriculum out"
            )
        unknown = np.full(task.size, np.nan, np.float32)
        return DifficultyState(unknown, _shuffled(task, 0), np.array(0, np.int32))

    def start(self, state: DifficultyState, task: AbstractTask, position: int) -> DifficultyState:
        assert task.size is not None
        epoch = position // task.size
        if epoch == int(state.epoch):
            return state
        shuffled = _shuffled(task, epoch)
        known = ~np.isnan(state.newest)
        middle = float(state.newest[known].mean()) if known.any() else 0.0
        ease = np.where(known, state.newest, np.float32(middle))[shuffled]
        order = shuffled[np.argsort(-ease, kind="stable")]
        return DifficultyState(state.newest, order, np.array(epoch, np.int32))

    def index(self, state: DifficultyState, task: AbstractTask, position: int) -> int:
        assert task.size is not None
        epoch, place = divmod(position, task.size)
        if epoch != int(state.epoch):
            raise ValueError(f"position {position} is in epoch {epoch}, the state of epoch {state.epoch}: call `start`")
        return int(state.order[place])

    def update(
        self, state: DifficultyState, indices: Sequence[int], rewards: Float[np.ndarray, " items"]
    ) -> DifficultyState:
        newest = state.newest.copy()
        for index, reward in zip(indices, rewards.tolist(), strict=True):
            if not np.isnan(reward):
                newest[index] = reward
        return DifficultyState(newest, state.order, state.epoch)


def _shuffled(task: AbstractTask, epoch: int) -> Int[np.ndarray, " items"]:
    assert task.size is not None
    places = range(epoch * task.size, (epoch + 1) * task.size)
    return np.array([example_index(place, task.size, task.seed) for place in places], np.int32)


def indices_from(order: AbstractOrder, state: Any, task: AbstractTask, position: int, count: int) -> list[int]:
    """Returns the indices of the items at consecutive positions, which may reach into another epoch. The state does not
    change."""
    indices = []
    for place in range(position, position + count):
        state = order.start(state, task, place)
        indices.append(order.index(state, task, place))
    return indices


# By what a configuration calls them.
ORDERS: Mapping[str, AbstractOrder[Any]] = MappingProxyType({"none": Shuffled(), "easiest_first": EasiestFirst()})
