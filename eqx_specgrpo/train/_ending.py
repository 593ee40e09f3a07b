"""How a run ends: whatever ends it, the steps that were done are saved first, and that is said."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import equinox as eqx
import jax
from jaxtyping import PyTree
from rich.console import Console

from ..config import RunConfig, resume_command
from ..decoding import DecodeProgress
from ..errors import Stopped, UserError
from ..layout import AbstractProcesses, OneProcess
from ..records import AbstractRunFolder, RunProgress, save_checkpoint
from ._interrupt import StopRequest
from ._state import RunState


class StepLeft(Exception):
    """A step was left in its rollouts, because a kill may come before they are done: it is done again on resuming."""


def unless_urgent(
    stop: StopRequest, decoding: Callable[[DecodeProgress], None], processes: AbstractProcesses | None = None
) -> Callable[[DecodeProgress], None]:
    """`decoding`, the callback of a rollout, that raises [`StepLeft`][] once a stop is urgent, in any of the processes,
    and `OtherProcessError` once another has failed."""

    def callback(progress: DecodeProgress) -> None:
        leave_if_urgent(stop)
        if processes is not None:
            processes.check()
        decoding(progress)

    return callback


def leave_if_urgent(stop: StopRequest) -> None:
    """Raises [`StepLeft`][] once a stop is urgent."""
    if stop.is_urgent:
        raise StepLeft


class Keeper:
    """Keeps the steps of a run: in a checkpoint every so many steps, and whatever ends it.

    **Arguments:**

    - `folder`, `config`: of the run.
    - `saved`: the step whose state is in a checkpoint, or costs nothing to make again; `None` if there is none such.
    - `stop`: who asks for an end.
    - `processes`: of the run. What is saved is saved by all of them together.
    """

    def __init__(
        self,
        folder: AbstractRunFolder,
        config: RunConfig,
        saved: int | None,
        progress: RunProgress,
        console: Console,
        stop: StopRequest,
        processes: AbstractProcesses | None = None,
    ):
        self._folder, self._config, self._saved = folder, config, saved
        self._progress, self._console, self._stop = progress, console, stop
        self._processes = OneProcess() if processes is None else processes

    @contextmanager
    def before(self, step: int, state: RunState) -> Iterator[None]:
        """Around a step. If it raises, the state before it is saved, unless its updates had begun.

        **Raises:**

        What the step raises. `Stopped` where it was left for a signal, or failed after one: Ctrl-C also ends the
        processes that a reward has started. A `UserError` for a `KeyboardInterrupt`: no signal has led to it, so code
        that was called has raised it.
        """
        try:
            yield
        except Stopped:
            raise  # a second signal: who sent it does not want to wait
        except StepLeft:
            self._stop.learn()
            self._save(step, state)
            self._end(step)
        except BaseException as error:
            if isinstance(error, jax.errors.JaxRuntimeError):  # of a collective, as when another process has gone
                self._processes.blame(error)
            self._processes.fail(one_line(error))
            is_kept = self._keep(step, state)
            if is_kept and self._stop.asked:
                self._progress.note(f"step {step + 1} was not finished: {error}")
                self._end(step)
            if isinstance(error, KeyboardInterrupt):
                notes = "".join(f" {note}" for note in vars(error).get("__notes__", ()))
                raise UserError(f"step {step + 1}: KeyboardInterrupt was raised, without a Ctrl-C{notes}") from error
            raise

    def after(self, done: int, state: RunState) -> None:
        """After so many steps: a checkpoint if one is due.

        **Raises:**

        `Stopped` if a signal has asked for it.
        """
        config = self._config
        if done == config.steps or done % config.save_steps == 0:
            self._save(done, state)
        self.pause(done, state, "done")

    def pause(self, done: int, state: RunState, where: str) -> None:
        """Between two steps, or behind an evaluation.

        **Arguments:**

        - `where`: a word for it, another one for each pause after so many steps.

        **Raises:**

        `Stopped` if a signal has asked for it, with the state saved.
        """
        if self._stop.agree(f"step {done}: {where}"):
            self._save(done, state)
            self._end(done)

    def _save(self, step: int, state: RunState) -> None:
        if self._saved != step:
            with self._progress.timed("checkpoints", "writing the checkpoint"):
                keep = self._config.save_total_limit
                save_checkpoint(self._folder.path, step, state.trees(), state.numbers(), keep, self._processes)
            self._saved = step

    def _keep(self, step: int, state: RunState) -> bool:
        """Saves the state before a step that failed, if it can, and says so; whether the steps before are kept."""
        if self._saved == step:
            return True
        try:
            whole = self._processes.gather(f"step {step}: what can be kept", not is_donated(state))
        except UserError as error:
            self._progress.note(f"the steps since the last checkpoint could not be saved: {error}")
            return False
        if not all(whole):
            self._progress.note("an update of this step had been made: --resume goes on from the last checkpoint")
            return False
        try:
            self._save(step, state)
        except Exception as error:  # a full disk, or a lost device: what ended the step is told all the same
            self._progress.note(f"the steps before could not be saved: {error}")
            return False
        kept = "the steps before are" if step > 0 else "the state before the first step is"
        self._progress.note(f"{kept} saved; once the cause is mended, go on with: {resume_command(self._config)}")
        return True

    def _end(self, done: int) -> None:
        assert self._stop.number is not None
        self._progress.close()
        left = " What is left is to write policy/ and draft/." if done == self._config.steps else ""
        self._console.print(
            f"Stopped by {self._stop.name} after step {done} of {self._config.steps}; nothing is lost.{left} Go on "
            f"with: {resume_command(self._config)}",
            soft_wrap=True,  # to be copied: a line break or markup would spoil it
            markup=False,
            highlight=False,
        )
        raise Stopped(self._stop.number, at_once=False)


def one_line(error: BaseException) -> str:
    """What an error says, for other processes to tell."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def is_donated(tree: PyTree) -> bool:
    """Whether an update has taken an array of the tree for its own: it can't be read any more."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


def on_stop(progress: RunProgress) -> Callable[[StopRequest], None]:
    """Says what is done now that a signal has asked for an end."""

    def tell(stop: StopRequest) -> None:
        what = "leaving the step if it still decodes, else finishing it" if stop.is_urgent else "finishing this step"
        again = "a second signal stops" if stop.is_urgent else "press again to stop"
        progress.say(f"{stop.name}: {what}, then writing a checkpoint ({again} at once)")

    return tell
