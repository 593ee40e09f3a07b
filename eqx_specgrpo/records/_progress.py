"""What a user sees while a run goes on: the phase it is in, and a line a step."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from ..decoding import DecodeProgress
from ..runtime import CompileCounter
from ._times import PhaseTimes

_LOG_AFTER = 5.0  # seconds of one compilation after which a log, which has no live line, is told that it goes on


class RunProgress:
    """One live line for the phase, permanent lines for steps and notes. Without a terminal, only the latter.

    Within its `with` block it says what is being compiled: on a terminal in the live line, in a log once for each
    program that takes long.

    **Attributes:**

    - `console`: where it goes.
    - `compilations`: what was compiled in the `with` block.
    - `times`: of the phases that were `timed`.
    """

    console: Console
    compilations: CompileCounter
    times: PhaseTimes

    def __init__(self, console: Console):
        self.console = console
        self.compilations = CompileCounter(self.note, self._watch)
        self.times = PhaseTimes()
        self._status: Status | None = None
        self._timer: threading.Timer | None = None
        self._told: set[str] = set()
        self._phase = self._detail = ""
        self._program: str | None = None  # that is being compiled
        self._since = self._program_since = time.perf_counter()
        self._compiled_before = 0.0

    def __enter__(self) -> "RunProgress":
        self.compilations.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.compilations.detach()
        self.close()

    @contextmanager
    def timed(self, name: str, text: str) -> Iterator[None]:
        """A phase for the length of a `with` block: said by `text`, its time added up under `name`."""
        self.phase(text)
        begin, compiled = time.perf_counter(), self.compilations.seconds
        try:
            yield
        finally:
            self.times.add(name, time.perf_counter() - begin, self.compilations.seconds - compiled)

    def phase(self, text: str) -> None:
        """Says what is going on now. On a terminal it replaces the line of the phase before; in a log, where lines
        stay, each kind of phase is told the first time."""
        self._phase, self._detail = text, ""
        self._since, self._compiled_before = time.perf_counter(), self.compilations.seconds
        if not self.console.is_terminal:
            kind = re.sub(r"\d+", "", text)
            if kind not in self._told:
                self._told.add(kind)
                self.say(f"{text} ...", style="dim")
            return
        if self._status is None:
            self._status = self.console.status(_Live(self.line))
            self._status.start()

    def line(self) -> str:
        """What the live line says at this moment."""
        if self._program is None:
            return f"{self._phase}: {self._detail}" if self._detail else self._phase
        seconds = time.perf_counter() - self._program_since
        # First: a narrow terminal cuts the end off.
        return f"{self._compiling(self._program)}, {seconds:.0f} s: {self._phase}"

    def say(self, text: str, style: str = "") -> None:
        """A line that stays as it is: not broken where a log is narrow, for whoever reads it with other tools."""
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line that stays, such as what was compiled."""
        self.say(f"  {self._phase}: {text}", style="dim")

    def advise(self, text: str | None) -> None:
        """A note in full brightness, if there is anything to say."""
        if text is not None:
            self.say(f"  {self._phase}: {text}", style="yellow")

    def decoding(self, progress: DecodeProgress) -> None:
        """The live line of a rollout. Its rate is that of decoding: what compiling takes is not in it."""
        if self._status is not None:
            compiling = self.compilations.seconds - self._compiled_before
            seconds = max(time.perf_counter() - self._since - compiling, 1e-9)
            self._detail = (
                f"{progress.tokens} tokens, {progress.active} of {progress.rows} rows active, "
                f"{progress.tokens / seconds:.0f} tokens/s"
            )

    def _watch(self, program: str | None) -> None:
        """A program's compilation begins, or ends."""
        self._program, self._program_since = program, time.perf_counter()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if program is not None and not self.console.is_terminal:
            self._timer = threading.Timer(_LOG_AFTER, self.note, [f"{self._compiling(program)} ..."])
            self._timer.daemon = True
            self._timer.start()

    def _compiling(self, program: str) -> str:
        return f"compiling {program}, program {self.compilations.programs + 1}"

    def warmed(self, update: int, updates: int, metrics: Mapping[str, Any]) -> None:
        """A line for every tenth update of the warm-up and the last."""
        if update % 10 == 0 or update == updates:
            expected = [v for k, v in metrics.items() if k.startswith("draft/expected_acceptance_pos_")]
            self.say(
                f"warm-up {update}/{updates}  draft loss {metrics['draft/loss']:.3f}  expected acceptance by position "
                + " ".join(f"{value:.2f}" for value in expected)
            )

    def stepped(self, step: int, steps: int, metrics: Mapping[str, Any], compiling: float = 0.0) -> None:
        """The line of a step, of whose seconds so many were `compiling`."""
        of_it = f", {compiling:.0f} of it compiling" if compiling >= 0.5 else ""
        drafted = f"acceptance length {metrics['spec/acceptance_length']:.2f}"
        if metrics["spec/draft_length"] == 0:
            drafted = "nothing drafted"
        self.say(
            f"step {step}/{steps}  reward {metrics['reward']:.3f}  "
            f"length {metrics['completions/mean_length']:.0f}  "
            f"entropy {metrics['entropy']:.2f}  {drafted}  "
            f"{metrics['spec/tokens_per_second']:.0f} tokens/s  {metrics['time/step']:.1f} s{of_it}"
        )

    def close(self) -> None:
        """Removes the live line."""
        if self._status is not None:
            self._status.stop()
            self._status = None


class _Live:
    """Text that is made anew whenever it is drawn."""

    def __init__(self, line: Callable[[], str]):
        self._line = line

    def __rich__(self) -> Text:
        return Text(self._line(), no_wrap=True, overflow="ellipsis")
