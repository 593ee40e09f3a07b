"""What a script may do between the steps of a run."""

import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..drafts import AbstractDraft
from ..models import AbstractLanguageModel, Tokenizer


@dataclass(frozen=True)
class RunView:
    """The view of a run that a callback gets.

    **Arguments:**

    - `config`: of the run; `config.steps` is the number of steps in all.
    - `folder`: the run folder.
    - `done`: number of steps that are done.
    - `policy`, `draft`: as they are now, in float32. The next update reuses their arrays, so they are valid during the
        call only. Copy what you want to keep.
    - `tokenizer`: the policy's.
    - `is_first`: whether this is the first process of the run, or the only one: it writes what is written once.
    """

    config: RunConfig
    folder: Path
    done: int
    policy: AbstractLanguageModel
    draft: AbstractDraft
    tokenizer: Tokenizer
    is_first: bool = True


class AbstractCallback(abc.ABC):
    """A callback, whose methods a run calls. An exception in it ends the run; the steps that are done are saved first.

    It must not change what it is given. Metrics are written before it gets them.
    """

    def begin(self, run: RunView) -> None:
        """Called before the first step of this start."""
        del run

    @abc.abstractmethod
    def step(self, run: RunView, metrics: Mapping[str, float | int]) -> None:
        """Called after each step, with the step's line of `metrics.jsonl`."""

    def evaluate(self, run: RunView, metrics: Mapping[str, float | int]) -> None:
        """Called after each evaluation, with its results."""
        del run, metrics

    def end(self, run: RunView) -> None:
        """Called after the last step, once `policy/` and `draft/` are written. Not called if the run ended in another
        way."""
        del run


class NoCallback(AbstractCallback):
    """The callback that does nothing."""

    def step(self, run: RunView, metrics: Mapping[str, float | int]) -> None:
        del run, metrics


class Callbacks(AbstractCallback):
    """Several, each in turn.

    **Arguments:**

    - `callbacks`: in their order.
    """

    def __init__(self, callbacks: Iterable[Any]):
        self._callbacks = tuple(callbacks)
        for callback in self._callbacks:
            if not isinstance(callback, AbstractCallback):
                raise TypeError(
                    f"callbacks has {callback!r}, of type {type(callback).__name__}: give instances of a class that "
                    "derives from AbstractCallback"
                )

    def begin(self, run: RunView) -> None:
        for callback in self._callbacks:
            callback.begin(run)

    def step(self, run: RunView, metrics: Mapping[str, float | int]) -> None:
        for callback in self._callbacks:
            callback.step(run, metrics)

    def evaluate(self, run: RunView, metrics: Mapping[str, float | int]) -> None:
        for callback in self._callbacks:
            callback.evaluate(run, metrics)

    def end(self, run: RunView) -> None:
        for callback in self._callbacks:
            callback.end(run)


def as_callback(callbacks: Any) -> AbstractCallback:
    """One callback of what `run` takes: one, several or none."""
    if isinstance(callbacks, AbstractCallback):
        return callbacks
    if isinstance(callbacks, type):
        raise TypeError(f"callbacks is the class {callbacks.__name__}: give an instance, {callbacks.__name__}()")
    every = tuple(callbacks)
    return Callbacks(every) if every else NoCallback()
