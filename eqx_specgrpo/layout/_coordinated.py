"""Several processes in step, over the key-value store of JAX's coordination service.

Each process has a thread that says every half second that it is alive, and in which phase it waits, and that reads the
same of the others. A process that is silent for too long is gone. Where another has failed and this process does not
come out of what it does, as in a collective of devices that waits for ever, the thread ends it with a sentence. It does
not while the process works by itself, however long that takes: the steps before could not be saved otherwise.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from ._processes import AbstractProcesses, NotInStepError, OtherProcessError, nothing

PATIENCE = 15.0  # seconds without a sign of life after which a process is gone
_GRACE = 10.0  # seconds that a process has to come out of what it does, once it is known that another has failed
_BEAT = 0.5
_WAIT = 0.3  # of one look for another's word
_ASTRAY = 5.0  # seconds that two processes wait in different phases before both give up
_FAILED = "failed"
_GIVEN, _WRONG = b"+", b"-"


class AbstractStore(ABC):
    """A key-value store that all processes see. Any method may raise where it can't be reached."""

    @abstractmethod
    def set(self, key: str, value: bytes, *, replace: bool = False) -> None:
        """Sets a key; one that is there is an error, unless it may be replaced."""

    @abstractmethod
    def get(self, key: str, seconds: float) -> bytes | None:
        """The value, for which it waits so long; `None` if there is none then."""

    @abstractmethod
    def under(self, prefix: str) -> dict[str, bytes]:
        """All that begin so, by what follows the prefix."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Forgets a key."""


class ManyProcesses(AbstractProcesses):
    """Processes in step; see [`eqx_specgrpo.layout.join_processes`][], which makes one.

    **Arguments:**

    - `store`: where they meet, empty at first.
    - `index`, `count`: which process this is, and how many there are.
    - `patience`: seconds without a sign of life after which a process is gone.
    - `end`: ends the program at once, where the main thread is stuck; told a sentence.
    - `disconnect`: called by `close`.
    """

    def __init__(
        self,
        store: AbstractStore,
        index: int,
        count: int,
        patience: float = PATIENCE,
        end: Callable[[str], None] | None = None,
        disconnect: Callable[[], None] = nothing,
    ):
        self._store, self._index, self._count, self._patience = store, index, count, patience
        self._end, self._disconnect = end or _end_program, disconnect
        self._phase = ""  # in which this process waits
        self._given: list[str] = []  # keys of words that others may still have to read
        self._to_tell: list[tuple[str, str]] = []
        self._told: dict[tuple[str, int], str] = {}
        self._waits_in: dict[int, str] = {}
        self._heard: dict[int, float] = {}  # of whose failure the watch has heard, and when
        self._gone: dict[int, str] = {}
        self._known: set[int] = set()  # whose failure the main thread knows of: it is on its way out
        self._is_alone = False
        self._over, self._beating = threading.Event(), threading.Lock()
        self._say_who_this_is()
        self._watch = threading.Thread(target=self._keep_watch, name="specgrpo processes", daemon=True)
        self._watch.start()

    @property
    def index(self) -> int:
        return self._index

    @property
    def count(self) -> int:
        return self._count

    def exchange(self, phase, payload, error=None, while_waiting=nothing):
        key = f"word/{phase}/"
        if error is not None:  # whoever has one has nobody to wait for
            self._known.add(self._index)
            self._store.set(f"{key}{self._index}", _WRONG + error.encode())
            return []
        self._check_waiting()
        self._store.set(f"{key}{self._index}", _GIVEN + payload)
        self._phase, since, words = phase, time.monotonic(), []
        try:
            for index in range(self._count):
                # What is there counts before anything else does: so all processes find a phase complete, or none.
                while (word := self._word(f"{key}{index}")) is None:
                    self._check_waiting()
                    while_waiting()
                    self._check_astray(index, phase, time.monotonic() - since)
                words.append(word)
        finally:
            self._phase = ""
        for index, word in enumerate(words):
            if word[:1] == _WRONG:
                self._known.add(index)
                raise self._other(index, f"has failed at {phase!r}: {word[1:].decode()}")
        # Everybody has read what was given in earlier phases, for everybody has come to this one.
        for earlier in self._given:
            self._store.remove(earlier)
        self._given = [f"{key}{self._index}"]
        return [word[1:] for word in words]

    def tell(self, topic, text):
        self._to_tell.append((topic, text))

    def told(self, topic):
        return {index: text for (about, index), text in dict(self._told).items() if about == topic}

    def check(self):
        self._check_failed(0.0)

    def _check_waiting(self) -> None:
        """As `check`, for a phase that is waited for. A process that knows of a failure, be it its own, waits to save
        what can be saved: another that fails too comes to the same phase, if it can."""
        self._check_failed(_GRACE if self._known else 0.0)

    def _check_failed(self, seconds: float) -> None:
        """Raises for a process that has failed so many seconds ago or more, or is gone."""
        now, told = time.monotonic(), self.told(_FAILED)
        failed = {
            index: why
            for index, why in told.items()
            if index not in self._known and now - self._heard.get(index, now) >= seconds
        }
        for index, why in {**failed, **self._gone}.items():
            if index != self._index:
                self._known.add(index)
                raise self._other(index, why)

    @contextlib.contextmanager
    def alone(self):
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False

    def blame(self, error):
        if isinstance(error, OtherProcessError | NotInStepError):
            return
        until = time.monotonic() + self._patience + 2 * _BEAT
        while time.monotonic() < until:
            try:
                self.check()
            except OtherProcessError as other:
                raise other from error
            time.sleep(_BEAT)

    def fail(self, sentence):
        self._known.add(self._index)
        if self._index not in self.told(_FAILED):
            self.tell(_FAILED, f"has failed: {sentence}")
            with contextlib.suppress(Exception):  # where the service is gone there is nobody to tell
                self._beat()

    def close(self):
        try:
            self.exchange("the end", b"")
        finally:
            self._over.set()
            self._watch.join(2 * self._patience)
        self._disconnect()

    def _word(self, key: str) -> bytes | None:
        try:
            return self._store.get(key, _WAIT)
        except Exception:
            self._check_waiting()
            time.sleep(_WAIT)  # the watch finds out whether the service can be reached
            return None

    def _other(self, index: int, why: str) -> OtherProcessError:
        return OtherProcessError(f"process {index}{self._place(index)} {why}")

    def _place(self, index: int) -> str:
        place = self._told.get(("place", index))
        return "" if place is None else f" ({place})"

    def _check_astray(self, index: int, phase: str, seconds: float) -> None:
        elsewhere = self._waits_in.get(index, "")
        if seconds > _ASTRAY and elsewhere not in ("", phase):
            raise NotInStepError(
                f"process {self._index} waits at {phase!r}, process {index}{self._place(index)} at {elsewhere!r}: they "
                "have gone different ways. Start all processes with the same command, configuration, files and versions"
            )

    def _say_who_this_is(self) -> None:
        self._store.set(f"told/place/{self._index}", f"{socket.gethostname()}, pid {os.getpid()}".encode())
        self._beats = 0

    def _beat(self) -> None:
        """A sign of life, and what there is to tell."""
        with self._beating:
            self._beats += 1
            while self._to_tell:
                topic, text = self._to_tell[0]
                self._store.set(f"told/{topic}/{self._index}", text.encode(), replace=True)
                self._told[topic, self._index] = text
                del self._to_tell[0]
            self._store.set(f"alive/{self._index}", f"{self._beats} {self._phase}".encode(), replace=True)

    def _keep_watch(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {index: (b"", time.monotonic()) for index in range(self._count)}
        reached, noticed = time.monotonic(), None
        while not self._over.wait(_BEAT):
            try:
                self._beat()
                alive, told = self._store.under("alive/"), self._store.under("told/")
                reached = time.monotonic()
            except Exception as error:
                if time.monotonic() - reached > self._patience:
                    self._gone[0] = f"does not answer, in which the coordination service began: {_first_line(error)}"
                alive, told = {}, {}
            for name, text in told.items():
                topic, _, index = name.rpartition("/")
                self._told[topic, int(index)] = text.decode()
            now = time.monotonic()
            for index in self.told(_FAILED):
                self._heard.setdefault(index, now)
            for index, (before, since) in seen.items():
                sign = alive.get(str(index), before)
                seen[index] = (sign, now) if sign != before else (before, since)
                silent = now - seen[index][1]
                # Of one that was killed the last sign says where it was, not where it is.
                self._waits_in[index] = sign.decode().partition(" ")[2] if silent < 3 * _BEAT else ""
                if alive and index != self._index and silent > self._patience:
                    self._gone[index] = (
                        f"has given no sign of life for {silent:.0f} seconds: killed, out of memory, or its machine is "
                        "gone; its own output may say"
                    )
            failed = {**self.told(_FAILED), **self._gone}
            others = [index for index in failed if index != self._index]
            if self._is_alone:
                noticed = None
            elif others and not self._known:
                noticed = noticed or now
                if now - noticed > _GRACE:
                    self._end(str(self._other(others[0], failed[others[0]])))
                    return


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _end_program(sentence: str) -> None:
    """For a main thread that waits in a collective for somebody who will not come."""
    print(f"error: {sentence}. This process was waiting for it, and ends", file=sys.stderr, flush=True)
    os._exit(OtherProcessError.exit_code)
