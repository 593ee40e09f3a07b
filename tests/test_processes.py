"""Processes in step: what each learns of the others, and how all end. Threads and a store in memory stand for processes
and JAX's coordination service; `test_two_processes.py` has the real ones."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from eqx_specgrpo.errors import UserError
from eqx_specgrpo.layout import (
    AbstractStore,
    ManyProcesses,
    NotInStepError,
    OneProcess,
    OtherProcessError,
    ProcessPlace,
    join_processes,
    process_place,
)


class MemoryStore(AbstractStore):
    """What all see at once."""

    def __init__(self):
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()

    def set(self, key, value, *, replace=False):
        with self.changed:
            if key in self.values and not replace:
                raise RuntimeError(f"{key} is there already")
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key, seconds):
        with self.changed:
            self.changed.wait_for(lambda: key in self.values, seconds)
            return self.values.get(key)

    def under(self, prefix):
        with self.changed:
            return {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}

    def remove(self, key):
        with self.changed:
            self.values.pop(key, None)


def together(*parts: Callable[[ManyProcesses], Any], patience: float = 20.0, ended: list | None = None) -> list:
    """What comes of each part, one a process: its result, or the error that it raised."""
    store = MemoryStore()
    outcomes: list[Any] = [None] * len(parts)

    def one(index: int) -> None:
        end = None if ended is None else ended.append
        processes = ManyProcesses(store, index, len(parts), patience, end)
        try:
            outcomes[index] = parts[index](processes)
        except Exception as error:
            outcomes[index] = error
        finally:
            processes._over.set()  # it gives no more signs of life

    threads = [threading.Thread(target=one, args=[index], daemon=True) for index in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return outcomes


def test_words_come_in_the_order_of_processes_and_old_ones_are_forgotten():
    def part(processes):
        first = processes.exchange("step 1: rollouts", bytes([processes.index]) * 3)
        second = processes.gather("step 1: end", {"index": processes.index})
        kept = [key for key in processes._store.values if key.startswith("word/step 1: rollouts")]
        return first, second, kept

    for first, second, kept in together(part, part, part):
        assert first == [b"\0\0\0", b"\1\1\1", b"\2\2\2"]
        assert second == [{"index": 0}, {"index": 1}, {"index": 2}]
        assert len(kept) < 3  # what everybody has read goes


def test_what_differs_is_named_in_every_process():
    def part(seed):
        return lambda processes: processes.agree("the start", {"seed": seed, "shapes": [1, 2], "text": "a" * 500})

    assert together(part(0), part(0)) == [None, None]
    for error in together(part(0), part(1)):
        assert isinstance(error, NotInStepError)
        assert "seed is 0 in process 0 and 1 in process 1" in str(error) and "shapes" not in str(error)


def test_a_failure_is_told_to_those_that_wait_and_to_those_that_work():
    def fails(processes):
        processes.fail("the reward 'even' raised ValueError: out of order")
        raise UserError("own")

    def waits(processes):
        processes.exchange("step 1: rollouts", b"")

    def works(processes):
        while True:
            processes.check()
            time.sleep(0.02)

    begin = time.monotonic()
    own, *others = together(fails, waits, works)
    assert time.monotonic() - begin < 5 and str(own) == "own"
    for error in others:
        assert isinstance(error, OtherProcessError)
        assert "process 0 (" in str(error) and "pid" in str(error) and "out of order" in str(error)


def test_an_error_in_a_phase_is_everybodys():
    """Also once a failure is known, as when what was done is saved and one disk is full."""

    def full(processes):
        processes.fail("the reward raised")
        processes.exchange("keep: written", b"", error="the disk is full")

    def waits(processes):
        with pytest.raises(OtherProcessError, match="the reward raised"):
            processes.exchange("step 1: rollouts", b"")
        processes.exchange("keep: written", b"")

    _, error = together(full, waits)
    assert isinstance(error, OtherProcessError)
    assert "has failed at 'keep: written': the disk is full" in str(error)


def test_a_phase_is_complete_for_all_or_for_none():
    """Who has given its word and fails then does not keep those from going on who find all words."""

    store = MemoryStore()
    first, second = (ManyProcesses(store, index, 2) for index in range(2))
    store.set("word/a phase/1", b"+")
    first.exchange("a phase", b"")
    first.fail("later")
    assert second._word("word/a phase/0") == b"+"
    with pytest.raises(OtherProcessError, match="later"):
        while True:
            second.check()
    first._over.set()
    second._over.set()


def test_one_that_is_gone_is_noticed_and_so_is_one_astray(monkeypatch):
    monkeypatch.setattr("eqx_specgrpo.layout._coordinated._ASTRAY", 1.0)
    begin = time.monotonic()
    _, error = together(lambda processes: None, lambda processes: processes.exchange("a", b""), patience=1.5)
    assert isinstance(error, OtherProcessError) and "process 0" in str(error) and "no sign of life" in str(error)
    assert 1 < time.monotonic() - begin < 6
    errors = together(lambda p: p.exchange("step 3: update", b""), lambda p: p.exchange("step 4: rollouts", b""))
    assert any(isinstance(error, NotInStepError) for error in errors)
    assert any("'step 3: update'" in str(error) and "'step 4: rollouts'" in str(error) for error in errors)


def test_one_that_is_stuck_is_ended_with_a_sentence(monkeypatch):
    monkeypatch.setattr("eqx_specgrpo.layout._coordinated._GRACE", 0.5)
    ended: list[str] = []

    def stuck(processes):
        until = time.monotonic() + 10
        while not ended and time.monotonic() < until:
            time.sleep(0.02)  # in a collective, for somebody who will not come

    together(lambda processes: processes.fail("its device was lost"), stuck, ended=ended)
    (sentence,) = ended
    assert sentence.startswith("process 0 (") and sentence.endswith("has failed: its device was lost")


def test_one_that_works_alone_is_not_ended_before_it_is_done(monkeypatch):
    monkeypatch.setattr("eqx_specgrpo.layout._coordinated._GRACE", 0.5)
    ended: list[str] = []

    def compiles(processes):
        with processes.alone():
            until = time.monotonic() + 10
            while not processes.told("failed") and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(2.5)
        return processes.exchange("rewards", b"")

    _, error = together(lambda processes: processes.fail("out of order"), compiles, ended=ended)
    assert not ended and isinstance(error, OtherProcessError) and "out of order" in str(error)


def test_what_can_be_kept_is_found_where_several_have_failed():
    """Each by itself, as by the same fault in a reward: that others have failed is nothing new to them."""

    def fails(seconds):
        def part(processes):
            time.sleep(seconds)
            processes.fail(f"out of order after {seconds} s")
            time.sleep(1.2)  # the others' watches see that
            return processes.gather("what can be kept", True)

        return part

    assert together(fails(0), fails(1.5), fails(0.5)) == [[True] * 3] * 3


def test_one_that_has_failed_elsewhere_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr("eqx_specgrpo.layout._coordinated._GRACE", 1.0)

    def first(processes):
        processes.fail("its reward was out of order")
        return processes.gather("what can be kept", True)

    def second(processes):
        processes.fail("its disk was full")
        time.sleep(5)  # gives signs of life, and comes to no phase

    error, _ = together(first, second)
    assert isinstance(error, OtherProcessError) and "disk" in str(error)


def test_an_error_of_a_collective_is_blamed_on_who_is_gone():
    def survivor(processes):
        processes.blame(RuntimeError("Gloo all-reduce failed: Connection closed by peer"))

    _, error = together(lambda processes: None, survivor, patience=1.0)
    assert isinstance(error, OtherProcessError) and "Gloo" in str(error.__cause__)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [0, 1, 5, 8])
def test_shares_are_whole_and_even(count, total):
    store = MemoryStore()
    shares = [OneProcess()] if count == 1 else [ManyProcesses(store, index, count) for index in range(count)]
    parts = [list(range(total))[one.share(total)] for one in shares]
    for one in shares:
        if isinstance(one, ManyProcesses):
            one._over.set()
    assert sum(parts, []) == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


SLURM = {
    "SLURM_JOB_ID": "70001", "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "4", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-009,12]", "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip


def test_where_a_process_is():
    assert process_place({}) is None and isinstance(join_processes(None), OneProcess)
    assert process_place({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) is None  # a batch script, outside of srun
    assert process_place(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    place = process_place(SLURM)
    assert place == ProcessPlace(f"gpu007:{61440 + 70001 % 4096}", 4, 6, (1, 2))
    for nodes, host in (("a1", "a1"), ("a1,b2", "a1"), ("n[3,5]", "n3")):
        found = process_place(SLURM | {"SLURM_STEP_NODELIST": nodes})
        assert found is not None and found.coordinator.startswith(f"{host}:")
    place = process_place(OPEN_MPI)
    assert place is not None and place.coordinator.startswith("localhost:")
    assert (place.index, place.count, place.of_machine) == (1, 2, (1, 2))
    assert process_place({}, "host:1234", 1, 2) == ProcessPlace("host:1234", 1, 2)
    assert process_place(SLURM, "host:1234") == ProcessPlace("host:1234", 4, 6, (1, 2))


@pytest.mark.parametrize(
    "environment, given, words",
    [
        ({}, ("host:1234", None, None), "--process I"),
        ({}, ("host:1234", 1, None), "--processes is missing"),
        ({}, (None, 0, 2), "--coordinator HOST:PORT"),
        ({}, ("host", 0, 2), "'host'"),
        ({}, ("host:1234", 2, 2), "counted from 0 to 1"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, (None, None, None), "--coordinator HOST:PORT"),
    ],
)
def test_what_is_missing_is_said(environment, given, words):
    with pytest.raises(UserError, match=words):
        process_place(environment, *given)
