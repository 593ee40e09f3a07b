"""The processes of a run, in step: what they tell one another, and how each learns that another has failed.

Devices compute together by JAX's own collectives, which wait for ever, and which give wrong numbers without an error
where two processes meet in different programs. So before each phase that needs all of them the processes exchange words
on the coordination service of `jax.distributed`, which is bounded in time and fails with a sentence.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..errors import UserError


class OtherProcessError(UserError):
    """Another process of the run has failed, or is gone; the message says which, where and why."""

    exit_code = 3


class NotInStepError(UserError):
    """The processes of a run are not at the same thing; the message says at what each is."""


def nothing() -> None:
    """For what need not be done."""


class AbstractProcesses(ABC):
    """The processes of a run, as an object that every part of it is handed; one process is a case of its own.

    A phase is named by the step and what is done in it, such as `step 3: rollouts`, never by a counter: processes that
    have gone different ways meet nowhere then, instead of in the wrong place.
    """

    @property
    @abstractmethod
    def index(self) -> int:
        """Which one this is, from 0. The first writes the run's records and its progress."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many there are."""

    @property
    def is_first(self) -> bool:
        """Whether this one writes what is written once."""
        return self.index == 0

    def share(self, total: int) -> slice:
        """Which of so many things, in order, are this process's own: about as many as any other's."""
        return slice(total * self.index // self.count, total * (self.index + 1) // self.count)

    @abstractmethod
    def exchange(
        self, phase: str, payload: bytes, error: str | None = None, while_waiting: Callable[[], None] = nothing
    ) -> list[bytes]:
        """What every process has to give in a phase, in the order of processes: each gives and waits for the others.

        **Arguments:**

        - `phase`: used once.
        - `payload`: what this process gives.
        - `error`: why this process's part of the phase has failed; then all raise.
        - `while_waiting`: called now and then; may raise.

        **Raises:**

        `OtherProcessError` where another has given an error, has failed elsewhere, or is gone; `NotInStepError` where
        another waits in another phase.
        """

    def agree(self, phase: str, fingerprint: Mapping[str, Any]) -> None:
        """Compares what all processes have to have alike before they do something together.

        **Arguments:**

        - `fingerprint`: by name, as JSON can hold it. Long values are compared by their digest.

        **Raises:**

        `NotInStepError` in every process, with the names that differ and both values; and what `exchange` raises.
        """
        own = {name: _brief(value) for name, value in fingerprint.items()}
        found = [json.loads(word) for word in self.exchange(phase, json.dumps(own).encode())]
        first = found[0]
        for index, other in enumerate(found):
            names = [name for name in dict.fromkeys([*first, *other]) if first.get(name) != other.get(name)]
            if names:
                values = "; ".join(
                    f"{name} is {first.get(name, 'missing')} in process 0 and {other.get(name, 'missing')} in process "
                    f"{index}"
                    for name in names[:4]
                )
                more = f" (and {len(names) - 4} more)" if len(names) > 4 else ""
                raise NotInStepError(
                    f"{phase}: the processes are not at the same thing: {values}{more}. Start all of them with the "
                    "same command, configuration, files and versions"
                )

    def gather(self, phase: str, value: Any) -> list[Any]:
        """What each process has of something small, as JSON can hold it, in the order of processes. Raises as
        `exchange` does."""
        return [json.loads(word) for word in self.exchange(phase, json.dumps(value).encode())]

    @abstractmethod
    def tell(self, topic: str, text: str) -> None:
        """Lets all processes know something at once, wherever they are. May be called in a handler of signals."""

    @abstractmethod
    def told(self, topic: str) -> dict[int, str]:
        """What processes have told of a topic, by their index; of others it is known within a second."""

    @abstractmethod
    def check(self) -> None:
        """To be called between the parts of long work.

        **Raises:**

        `OtherProcessError` where it is known that another process has failed or is gone.
        """

    @abstractmethod
    def alone(self) -> AbstractContextManager[None]:
        """Around long work that waits for no other process, such as decoding, with its compilations, and rewards. Where
        another fails meanwhile, this process is not ended before its work is done or calls `check`. Not nested."""

    @abstractmethod
    def blame(self, error: BaseException) -> None:
        """After an error in what all do together: is it another process that has gone? Waits until that is known.

        **Raises:**

        `OtherProcessError` if so.
        """

    @abstractmethod
    def fail(self, sentence: str) -> None:
        """Lets the others know that this process cannot go on, and why. They end within seconds, or when they are done
        with what they do [`alone`][eqx_specgrpo.layout.AbstractProcesses.alone]."""

    @abstractmethod
    def close(self) -> None:
        """The end of a run that has done all its work: waits, for a while, until every process is there."""


class OneProcess(AbstractProcesses):
    """One process: there is nobody to wait for."""

    @property
    def index(self) -> int:
        return 0

    @property
    def count(self) -> int:
        return 1

    def exchange(self, phase, payload, error=None, while_waiting=nothing):
        del phase, error, while_waiting
        return [payload]

    def agree(self, phase, fingerprint):
        del phase, fingerprint

    def gather(self, phase, value):
        del phase
        return [value]

    def tell(self, topic, text):
        del topic, text

    def told(self, topic):
        del topic
        return {}

    def check(self):
        pass

    def alone(self):
        return nullcontext()

    def blame(self, error):
        del error

    def fail(self, sentence):
        del sentence

    def close(self):
        pass


def _brief(value: Any) -> Any:
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= 120 else "digest " + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
