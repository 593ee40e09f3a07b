"""Whatever ends a run, the steps that were done are saved first, and that is said."""

import io
import os
import signal

import equinox as eqx
import jax.numpy as jnp
import optax
import pytest
from rich.console import Console
from tiny_run import tiny_config, tiny_folder as tiny_folder, tiny_model, tiny_tokenizer

from eqx_specgrpo.decoding import DecodeProgress
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.errors import Stopped, UserError
from eqx_specgrpo.layout import OneProcess
from eqx_specgrpo.records import RunFolder, RunProgress, _checkpoint, latest_checkpoint
from eqx_specgrpo.tasks import AbstractTask, Example
from eqx_specgrpo.train import RunState, next_examples
from eqx_specgrpo.train._ending import Keeper, StepLeft, unless_urgent
from eqx_specgrpo.train._interrupt import StopRequest, stop_requests, stopped_at_once

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_asks_and_the_second_stops(number):
    before = [signal.getsignal(one) for one in SIGNALS]
    told = []
    with pytest.raises(Stopped) as info:
        with stop_requests(lambda stop: told.append(stop.name)) as stop:
            assert not stop.asked and not stop.is_urgent
            signal.raise_signal(number)
            assert stop.asked and stop.number == number
            assert stop.is_urgent == (number != signal.SIGINT), "after SIGTERM a kill may follow"
            assert told == [{signal.SIGINT: "Ctrl-C"}.get(number, number.name)]
            signal.raise_signal(signal.SIGTERM)
    assert info.value.at_once and info.value.code == 128 + signal.SIGTERM == 143
    assert [signal.getsignal(one) for one in SIGNALS] == before
    with pytest.raises(Stopped) as info:
        with stopped_at_once():
            signal.raise_signal(number)
    assert info.value.at_once and info.value.code == 128 + number


class Told(OneProcess):
    """Process 0, to which process 1 has told of its signal already."""

    def told(self, topic):
        del topic
        return {1: "SIGTERM"}


def test_a_signal_that_comes_to_all_is_no_second_one_where_another_process_was_first():
    with stop_requests(lambda stop: None, Told()) as stop:
        stop.learn()
        assert stop.asked and not stop.asked_here and stop.number == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked_here
        with pytest.raises(Stopped) as info:
            signal.raise_signal(signal.SIGTERM)
        assert info.value.at_once


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests(lambda stop: None) as stop, stopped_at_once():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_workers_that_are_forked_end_when_they_are_told_to():
    """As the pool of a reward tells its own; else it would wait for them for ever."""
    with stop_requests(lambda stop: None) as stop:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        assert not stop.asked


def test_a_step_is_left_in_its_rollouts_only_where_it_is_urgent():
    seen, stop = [], StopRequest()
    callback = unless_urgent(stop, seen.append)
    progress = DecodeProgress(tokens=1, active=1, rows=1)
    for number in (None, signal.SIGINT):
        stop.number = number
        callback(progress)
    assert len(seen) == 2
    stop.number = signal.SIGTERM
    with pytest.raises(StepLeft):
        callback(progress)


@pytest.fixture(scope="module")
def state() -> RunState:
    return RunState.frozen_policy(tiny_model(), MedusaHeads.fresh(32, 1), optax.sgd(0.1))


class Kept:
    """A keeper of a run in a folder, which may be asked to stop."""

    def __init__(self, folder: RunFolder, config, saved: int | None, number: signal.Signals | None = None):
        self.folder, self.stop, self.printed = folder, StopRequest(), io.StringIO()
        self.stop.number = number
        console = Console(file=self.printed, width=200, force_terminal=False)
        self.keeper = Keeper(folder, config, saved, RunProgress(console), console, self.stop)

    def fail(self, step: int, error: BaseException, state: RunState) -> None:
        with self.keeper.before(step, state):
            raise error


@pytest.fixture
def kept(tiny_folder, tmp_path):
    out = tmp_path / "run"
    config = tiny_config(tiny_folder, out)
    with RunFolder(out) as folder:
        yield lambda saved=0, number=None: Kept(folder, config, saved, number)


def newest(kept: Kept) -> str | None:
    found = latest_checkpoint(kept.folder.path)
    return None if found is None else found.name


@pytest.mark.parametrize("error", [UserError("a reward"), RuntimeError("ours"), SystemExit(0), MemoryError()], ids=repr)
def test_an_error_of_any_kind_loses_no_step(error, kept, state):
    run = kept()
    with pytest.raises(type(error)) as info:
        run.fail(4, error, state)
    assert info.value is error and newest(run) == "step-000004"
    assert "the steps before are saved" in run.printed.getvalue()


def test_an_interrupt_without_a_signal_is_an_error(kept, state):
    """Raised by a reward, say, that has caught one of a process of its own."""
    run, error = kept(), KeyboardInterrupt()
    error.add_note("in the reward 'even'")
    with pytest.raises(UserError, match="^step 5: KeyboardInterrupt was raised.*in the reward 'even'"):
        run.fail(4, error, state)
    assert newest(run) == "step-000004"


def test_a_second_signal_does_not_wait(kept, state):
    run = kept(number=signal.SIGINT)
    with pytest.raises(Stopped):
        run.fail(4, Stopped(signal.SIGINT, at_once=True), state)
    assert newest(run) is None


@pytest.mark.parametrize("error", [StepLeft(), UserError("its processes got the signal too")], ids=repr)
def test_a_step_that_a_signal_ended(error, kept, state):
    run = kept(number=signal.SIGTERM)
    with pytest.raises(Stopped) as info:
        run.fail(4, error, state)
    assert info.value.code == 143 and not info.value.at_once and newest(run) == "step-000004"
    assert "Stopped by SIGTERM after step 4 of 6; nothing is lost. Go on with: specgrpo run --resume" in (
        run.printed.getvalue()
    )


def test_what_is_there_is_not_written_again(kept, state):
    run = kept(saved=4)
    with pytest.raises(UserError):
        run.fail(4, UserError("a reward"), state)
    assert newest(run) is None
    new = kept(saved=None)  # a draft that was warmed up, before the first step
    with pytest.raises(UserError):
        new.fail(0, UserError("a reward"), state)
    assert newest(new) == "step-000000"


def test_what_can_not_be_saved_is_told_with_what_ended_the_step(kept, state, monkeypatch):
    run = kept()
    donated = eqx.tree_at(lambda s: s.draft_acceptance, state, jnp.ones(1))
    donated.draft_acceptance.delete()
    with pytest.raises(UserError, match="a reward"):
        run.fail(4, UserError("a reward"), donated)
    assert "goes on from the last checkpoint" in run.printed.getvalue() and newest(run) is None

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(_checkpoint, "write_tensor_file", full)
    with pytest.raises(UserError, match="a reward"):
        run.fail(4, UserError("a reward"), state)
    assert "the steps before could not be saved" in run.printed.getvalue()
    run.stop.number = signal.SIGTERM
    with pytest.raises(UserError, match="No space left"):
        run.fail(4, StepLeft(), state)
    assert "nothing is lost" not in run.printed.getvalue()


def test_checkpoints_are_written_when_due(kept, state):
    run = kept()
    for done, expected in ((1, None), (3, "step-000003"), (4, "step-000003"), (6, "step-000006")):
        run.keeper.after(done, state)
        assert newest(run) == expected
    asked = kept(number=signal.SIGHUP)
    with pytest.raises(Stopped) as info:
        asked.keeper.after(5, state)
    assert info.value.code == 129 and "Stopped by SIGHUP after step 5 of 6" in asked.printed.getvalue()


class Puzzles(AbstractTask):
    """Some of whose items cannot be made."""

    seed: int = 0
    size: int | None = None

    def example(self, index: int) -> Example:
        if index == 3:
            raise SystemExit(0)
        if index == 4:
            raise KeyError("operands")
        return Example("cut \ud83d" if index == 5 else "2 + 2 =")


@pytest.mark.parametrize(
    "position, words",
    [
        (3, "^item 3 could not be made: SystemExit: 0"),
        (4, "^item 4 could not be made: KeyError: 'operands'"),
        (5, r"^the prompt of item 5: the text can't be encoded: its character 5 is '\\ud83d'"),
    ],
)
def test_an_item_that_can_not_be_made_is_named(position, words):
    with pytest.raises(UserError, match=words):
        next_examples(Puzzles(), tiny_tokenizer(), tiny_model(), position, 1, 8)
