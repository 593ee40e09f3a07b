"""Who compiles the programs of segments that are not there yet: the decoder itself, or a thread while it goes on."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Lowered(Protocol):
    """A program before it is compiled: `jax.stages.Lowered`, or what `eqx.filter_jit` makes of it."""

    def compile(self) -> Any:
        """Compiles it."""


Lower = Callable[[], Sequence[Lowered]]


class AbstractCompiler(ABC):
    """Has programs compiled before they are run."""

    @abstractmethod
    def ready(self, name: Hashable, plan: Callable[[], Lower]) -> bool:
        """Whether the programs of this name may be run. If not, they are being compiled from now on.

        **Arguments:**

        - `name`: of the programs; equal names mean the same ones.
        - `plan`: called at once, where they are new; returns what lowers them, which may be called in another thread.
        """

    @abstractmethod
    def may_shrink(self, name: Hashable, plan: Callable[[], Lower], waited: float) -> bool:
        """Whether the step to a smaller batch, and its first segment, may be run. If not, rounds go on with rows that
        have ended.

        **Arguments:**

        - `name`, `plan`: as for `ready`.
        - `waited`: seconds that rounds went on so since this was last asked in vain.
        """

    @abstractmethod
    def seconds(self, name: Hashable) -> float:
        """How long the programs of this name took to compile, as far as nobody waited for it; told once, then 0."""

    @abstractmethod
    def ran(self, name: Hashable) -> None:
        """The programs of this name were run."""

    @abstractmethod
    def is_there(self, name: Hashable) -> bool:
        """Whether the programs of this name can be run without waiting; `True` where that is not known. Where they are
        not there, a length that is only to be measured again is not."""

    @abstractmethod
    def forget(self) -> None:
        """All compiled programs were dropped, as by `jax.clear_caches`."""

    @property
    @abstractmethod
    def is_busy(self) -> bool:
        """Whether something is being compiled: what runs meanwhile takes longer than it will."""

    @abstractmethod
    def close(self) -> None:
        """Begins nothing more."""


class CompileAtOnce(AbstractCompiler):
    """Everything is compiled where it is first run, and waited for."""

    def ready(self, name, plan):
        del name, plan
        return True

    def may_shrink(self, name, plan, waited):
        del name, plan, waited
        return True

    def seconds(self, name):
        del name
        return 0.0

    def ran(self, name):
        del name

    def is_there(self, name):
        del name
        return True

    def forget(self):
        pass

    @property
    def is_busy(self):
        return False

    def close(self):
        pass


class CompileSparingly(AbstractCompiler):
    """Everything is compiled where it is first run, and waited for, but nothing only to be measured again, and no
    smaller batch for a few rounds.

    It remembers what was run, from one decoding to the next. Prompts of another width and caches of another size need
    programs of their own, so a length that is known to be slower would else be compiled for each of them. And rows that
    draft end at different times, so each of these would have its smaller batches. Such a batch is compiled once rounds
    have gone on for `patience` seconds with one that is too large. Times decide on that, so what is computed in which
    batch differs from run to run, and rounds otherwise.

    **Arguments:**

    - `patience`: seconds, in all decodings together; for each batch.
    """

    def __init__(self, patience: float = 2.0):
        if patience < 0:
            raise ValueError(f"patience is {patience}, but it is a number of seconds, from 0")
        self._patience = patience
        self._there: set[Hashable] = set()
        self._waited: dict[Hashable, float] = {}

    def ready(self, name, plan):
        del name, plan
        return True

    def may_shrink(self, name, plan, waited):
        del plan
        self._waited[name] = self._waited.get(name, 0.0) + waited
        return self._waited[name] >= self._patience

    def seconds(self, name):
        del name
        return 0.0

    def ran(self, name):
        self._there.add(name)

    def is_there(self, name):
        return name in self._there

    def forget(self):
        self._there.clear()

    @property
    def is_busy(self):
        return False

    def close(self):
        pass


class CompileBehind(AbstractCompiler):
    """A thread compiles, one program after the other, while rounds go on with those that are there.

    `lower(...).compile()` fills the cache that calls of the jitted function look into (tested). A program that can't be
    compiled counts as ready: the error is then met, and told, where it is run.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")
        self._begun: dict[Hashable, Future[float]] = {}
        self._untold: set[Hashable] = set()

    def ready(self, name, plan):
        if name not in self._begun:
            self._begun[name] = self._pool.submit(_compile, plan())
            self._untold.add(name)
        return self._begun[name].done()

    def may_shrink(self, name, plan, waited):
        del waited
        return self.ready(name, plan)

    def seconds(self, name):
        if name not in self._untold or not self._begun[name].done() or self._begun[name].exception() is not None:
            return 0.0
        self._untold.remove(name)
        return self._begun[name].result()

    def ran(self, name):
        del name

    def is_there(self, name):
        del name
        return True

    def forget(self):
        self._begun = {name: future for name, future in self._begun.items() if not future.done()}
        self._untold &= self._begun.keys()

    @property
    def is_busy(self):
        return any(not future.done() for future in self._begun.values())

    def close(self):
        self._pool.shutdown(wait=False, cancel_futures=True)


def _compile(lower: Lower) -> float:
    began = time.perf_counter()
    for lowered in lower():
        lowered.compile()
    return time.perf_counter() - began
