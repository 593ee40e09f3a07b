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
    """A run as a callback sees it.

    **Arguments:**

    - `config`: of the run; `config.steps` is how many there will be.
    - `folder`: of the run.
    - `done`: steps that are done.
    - `policy`, `draft`: as they are now, in float32. The next update takes their arrays for its own, so that they are
        for the length of the call alone: to keep one, copy it.
    - `tokenizer`: the policy's.
    """

    config: RunConfig
    folder: Path
    done: int
    policy: AbstractLanguageModel
    draft: AbstractDraft
    tokenizer: Tokenizer


class AbstractCallback(abc.ABC):
    """Is called while a run goes on. What it raises ends the run; the steps that are done are saved first.

    Nothing that it is given may be changed. It sees metrics after they have been written.
    """

    def begin(self, run: RunView) -> None:
        """Before the first step of this start."""
        del run

    @abc.abstractmethod
    def step(self, run: RunView, metrics: Mapping[str, float | int]) -> None:
        """After each step, with its line of `metrics.jsonl`."""

    def evaluate(self, run: RunView, metrics: Mapping[str, float | int]) -> None:
        """After each evaluation, with its results."""
        del run, metrics

    def end(self, run: RunView) -> None:
        """After the last step, once `policy/` and `draft/` are written. Not where something else has ended the run."""
        del run


class NoCallback(AbstractCallback):
    """Does nothing."""

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
