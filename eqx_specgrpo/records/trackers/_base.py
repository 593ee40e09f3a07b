"""What a tracker is: a place besides the run folder where a run's figures go."""

import enum
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx

Session = TypeVar("Session")


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers get to know it.

    **Arguments:**

    - `name`: of the run, for people.
    - `project`: what it belongs to, with others that it is compared with.
    - `folder`: of the run, as an absolute path; a tracker that writes files may do so there.
    - `config`: the configuration, by dotted key.
    - `done`: how many steps were done before. What a tracker was told of later ones will be told again.
    - `kept`: what the tracker's `begin` returned when the run was last begun with it; empty the first time.
    """

    name: str
    project: str
    folder: Path
    config: Mapping[str, Any]
    done: int
    kept: Mapping[str, str]


class Table(NamedTuple):
    """Completions to read.

    **Arguments:**

    - `columns`: their names, `step` first.
    - `rows`: of each completion as many values: text, numbers or `None`.
    """

    columns: tuple[str, ...]
    rows: list[tuple[str | float | int | bool | None, ...]]


class Outcome(enum.Enum):
    """How a run ended."""

    FINISHED = "finished"
    STOPPED = "stopped"  # by a signal; it can go on
    FAILED = "failed"


@dataclass(frozen=True)
class Begun(Generic[Session]):
    """What a tracker's `begin` returns.

    **Arguments:**

    - `session`: what its other methods need: an open file, a client.
    - `keep`: what it needs to go on with the same run later; it is kept in the run folder.
    - `place`: where the figures are to be seen, in words for people.
    """

    session: Session
    keep: dict[str, str]
    place: str


class AbstractTracker(eqx.Module, Generic[Session]):
    """A place besides the run folder where a run's figures go.

    The tracker itself is configuration; what is open is the session, which `begin` makes and the others are given.
    Whatever a method raises is told once, and the run goes on without the tracker ([`Trackers`][]). Its package is
    imported in the methods alone: only those whom a run names have to be installed.
    """

    @abstractmethod
    def begin(self, run: TrackedRun) -> Begun[Session]:
        """Opens a run of the tracker, a new one or, with `run.kept`, that of before, and gives it the configuration."""

    @abstractmethod
    def step(self, session: Session, step: int, metrics: Mapping[str, float | int]) -> None:
        """The metrics of a step, all of them finite. Steps count from 1; one that was lost with a kill comes again."""

    @abstractmethod
    def completions(self, session: Session, step: int, table: Table) -> None:
        """Some of the completions of a step."""

    @abstractmethod
    def summary(self, session: Session, values: Mapping[str, float | int]) -> None:
        """What the whole run came to."""

    @abstractmethod
    def end(self, session: Session, outcome: Outcome) -> None:
        """Writes what is not written yet, and closes. Called once, also after a failure of the run."""


@dataclass(frozen=True)
class TrackerKind:
    """A tracker that a configuration can name. It stands as `TRACKER` at the end of the tracker's file.

    **Arguments:**

    - `tracker`: it itself.
    - `modules`: what has to be importable.
    - `package`: what to install for that.
    """

    tracker: AbstractTracker[Any]
    modules: tuple[str, ...]
    package: str
