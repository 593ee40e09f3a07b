"""Signals as requests: the first one asks to stop at a good place, the second one stops at once."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..errors import Stopped
from ..layout import AbstractProcesses, OneProcess

_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is what a closed terminal sends; Windows has none
_TOPIC = "stop"  # of what processes tell one another


class StopRequest:
    """Whether a signal has asked for an end; of several processes, any of them.

    **Arguments:**

    - `processes`: of the run.

    **Attributes:**

    - `number`: of the signal, `None` while there was none.
    - `asked_here`: whether a signal has come to this process itself. One that is sent to all of them comes to each: it
        may know of another's before its own arrives, and its own is no second one then.
    """

    number: signal.Signals | None
    asked_here: bool

    def __init__(self, processes: AbstractProcesses | None = None):
        self.number = None
        self._processes = OneProcess() if processes is None else processes
        self._whose = self._processes.index
        self.asked_here = False

    @property
    def asked(self) -> bool:
        return self.number is not None

    @property
    def is_urgent(self) -> bool:
        """Whether a kill may follow in seconds, as after SIGTERM. Who presses Ctrl-C waits."""
        numbers = [signal.Signals[name] for name in self._processes.told(_TOPIC).values()]
        return any(number not in (None, signal.SIGINT) for number in (self.number, *numbers))

    @property
    def name(self) -> str:
        """For messages."""
        assert self.number is not None
        name = "Ctrl-C" if self.number == signal.SIGINT else self.number.name
        return name if self._processes.count == 1 else f"{name} in process {self._whose}"

    def ask(self, number: signal.Signals) -> None:
        """A signal has come to this process. All of them are told."""
        self.number, self._whose, self.asked_here = number, self._processes.index, True
        self._processes.tell(_TOPIC, number.name)

    def agree(self, phase: str) -> bool:
        """Whether a signal has asked for an end in any process: the same answer in all of them.

        **Arguments:**

        - `phase`: see [`eqx_specgrpo.layout.AbstractProcesses`][].
        """
        names = self._processes.gather(phase, self.number.name if self.number is not None else None)
        for index, name in enumerate(names):
            if name is not None:
                self.number, self._whose = signal.Signals[name], index
                return True
        return False

    def learn(self) -> None:
        """Takes over a signal that another process has had."""
        for index, name in sorted(self._processes.told(_TOPIC).items()):
            if self.number is None:
                self.number, self._whose = signal.Signals[name], index


@contextmanager
def stop_requests(
    tell: Callable[[StopRequest], None], processes: AbstractProcesses | None = None
) -> Iterator[StopRequest]:
    """Within the `with` block the first of SIGINT, SIGTERM and SIGHUP is noted in the `StopRequest`, and `tell` called.

    **Raises:**

    `Stopped` wherever the program is when the second one comes to this process.
    """
    request = StopRequest(processes)

    def ask(number: signal.Signals) -> None:
        if request.asked_here:
            raise Stopped(number, at_once=True)
        request.ask(number)
        tell(request)

    with _handled(ask):
        yield request


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Within the `with` block the first of SIGINT, SIGTERM and SIGHUP raises `Stopped`: files are closed then, and
    whoever called says what there is."""

    def stop(number: signal.Signals) -> None:
        raise Stopped(number, at_once=True)

    with _handled(stop):
        yield


@contextmanager
def _handled(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    owner = os.getpid()
    before: dict[int, Any] = {}

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handle(signal.Signals(number))
        elif callable(before[number]):
            before[number](number, frame)
        else:  # of a worker that was forked from this process, as a pool of a reward's: it must end when it is told to
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    try:
        for name in _STOPPING:
            number = signal.Signals.__members__.get(name)
            # What `nohup` ignores stays ignored; None is a handler that is not Python's.
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread, where signals can't be taken: the caller's business then
        pass
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
