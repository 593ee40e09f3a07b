"""A run of two processes through the command line: the same run as one process's, and every way that one of them can
end. What they exchange is in `test_processes.py`, without starting any. A process costs seconds to start: each way of
ending has one pair, and what one process does is done in this one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_run import as_flags, checkpoint_arrays, tiny_config, tiny_folder as tiny_folder, tiny_settings

from eqx_specgrpo.records import latest_checkpoint, read_records
from eqx_specgrpo.train import run

# Completions of unequal lengths, no warm-up, and few programs; a checkpoint after each step, if not said otherwise.
# Sums over processes round otherwise. Adam divides by the gradient's size, so that one of rounding alone would move a
# weight as far as any other, unless its epsilon is larger; and coupled draws do not depend on the draft.
SETTINGS = (
    "steps=3",
    "save_steps=1",
    "compare=false",
    "draft.warmup=0",
    "draft.verifier=coupled",
    "grpo.prompts_per_step=3",
    "grpo.adam_epsilon=1e-3",
    "seed=3",
    "eval.task=arithmetic",
    "eval.limit=3",
    "eval.at_start=false",
    "eval.every=3",
)
WITHIN = 30.0  # seconds in which every process has to end once one of them has
MAIN = "from eqx_specgrpo.cli import main; main()"
# Ends this process soon where it waits for one that has failed.
HASTY = "from eqx_specgrpo.layout import _coordinated as watch; watch._GRACE = 2; " + MAIN


class Pair:
    """The two processes of a run, each in a process group of its own."""

    def __init__(self, folder: Path, out: Path, *settings: str, devices=1, resume=False, of_first=None, of_second=None):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        flags = [*as_flags(tiny_settings(folder, out, *SETTINGS, *settings)), *(["--resume"] if resume else [])]
        self.out, self.processes, self.logs = out, [], []
        for index, own in enumerate((of_first or {}, of_second or {})):
            place = ["--coordinator", f"localhost:{port}", "--process", str(index), "--processes", "2"]
            log = out.with_name(f"{out.name}-{index}.log")
            arguments = [*flags, *place, *own.get("flags", [])]
            self.logs.append(log)
            with open(log, "ab") as file:
                self.processes.append(
                    subprocess.Popen(
                        [
                            *own.get("under", []),
                            sys.executable,
                            "-c",
                            own.get("code", MAIN),
                            "run",
                            *arguments,
                        ],
                        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | own.get("env", {}),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def wait(self) -> list[int]:
        """Exit codes; all processes must end within the limit after the first has."""
        until = time.monotonic() + 240
        while all(one.poll() is None for one in self.processes) and time.monotonic() < until:
            time.sleep(0.05)
        try:
            return [one.wait(WITHIN) for one in self.processes]
        finally:
            for one in self.processes:
                if one.poll() is None:
                    one.kill()

    def when_done(self, steps: int) -> None:
        """Waits until so many steps are in the records."""
        until = time.monotonic() + 240
        while time.monotonic() < until and all(one.poll() is None for one in self.processes):
            if (self.out / "metrics.jsonl").exists() and len(read_records(self.out / "metrics.jsonl")) >= steps:
                return
            time.sleep(0.01)
        raise AssertionError(self.said(0) + self.said(1))

    def said(self, index: int) -> str:
        return self.logs[index].read_text(errors="replace")


def alone(folder: Path, out: Path, resume: bool = False) -> Path:
    """What one process does of the same run."""
    run(tiny_config(folder, out, *SETTINGS), resume=resume, console=Console(quiet=True))
    return out


@pytest.fixture(scope="module")
def straight(tiny_folder, tmp_path_factory) -> Path:
    """Three steps of one process."""
    return alone(tiny_folder, tmp_path_factory.mktemp("straight") / "run")


def assert_same(straight: Path, out: Path) -> None:
    """Completions to the letter, figures and weights within 1e-5: prompts decoded beside others round otherwise."""
    assert (out / "completions.jsonl").read_bytes() == (straight / "completions.jsonl").read_bytes()
    records = [read_records(folder / "metrics.jsonl") for folder in (straight, out)]
    assert [record["step"] for record in records[1]] == [1, 2, 3]
    for expected, found in zip(*records, strict=True):
        for name in ("loss", "grad_norm", "reward", "draft/loss", "num_tokens", "completions/mean_length"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
    (expected,), (found,) = (read_records(folder / "eval.jsonl") for folder in (straight, out))
    for name in ("step", "eval/reward", "eval/mean@4", "eval/best@4", "eval/rewards/even/mean"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name
    # The draft's Adam has its usual epsilon.
    for tree, within in (("policy", 1e-6), ("policy_optimizer", 1e-6), ("draft", 1e-4)):
        first, second = (checkpoint_arrays(latest_checkpoint(folder), tree) for folder in (straight, out))
        assert first.keys() == second.keys()
        for name, array in first.items():
            np.testing.assert_allclose(second[name], array, rtol=1e-4, atol=within, err_msg=name)


def test_two_processes_are_one_and_a_failed_reward_loses_nothing(straight, tiny_folder, tmp_path):
    """Two devices each. The second one's reward raises after two steps, of which none was to be saved yet, while the
    first one's takes its time: both end, and the run goes on with the same numbers, by both of them or by one device
    alone. Then both are told to end."""
    lengths = {record["length"] for record in read_records(straight / "completions.jsonl")}
    assert len(lengths) > 2
    of_second = {"env": {"TINY_RUN_RAISE_AT": "2"}}
    of_first = {"env": {"TINY_RUN_SLEEP_AT": "2"}, "code": HASTY}
    pair = Pair(tiny_folder, tmp_path / "run", "save_steps=100", devices=2, of_first=of_first, of_second=of_second)
    assert pair.wait() == [3, 2], pair.said(0) + pair.said(1)
    assert "out of order" in pair.said(1)
    assert "process 1 (" in pair.said(0) and "out of order" in pair.said(0)
    assert latest_checkpoint(pair.out) == pair.out / "checkpoints" / "step-000002", pair.said(0) + pair.said(1)
    copy = Path(shutil.copytree(pair.out, tmp_path / "alone"))
    assert_same(straight, alone(tiny_folder, copy, resume=True))
    pair = Pair(tiny_folder, pair.out, devices=2, resume=True)
    assert pair.wait() == [0, 0], pair.said(0) + pair.said(1)
    assert_same(straight, pair.out)
    pair = Pair(tiny_folder, pair.out, "save_steps=100", "steps=50", devices=2, resume=True)
    pair.when_done(4)
    for one in pair.processes:
        one.terminate()
    assert pair.wait() == [143, 143], pair.said(0) + pair.said(1)
    done = len(read_records(pair.out / "metrics.jsonl"))
    assert latest_checkpoint(pair.out) == pair.out / "checkpoints" / f"step-{done:06d}"


def test_ctrl_c_in_one_and_a_killed_one_lose_no_checkpoint(straight, tiny_folder, tmp_path):
    """The first one is killed, which has begun the coordination service. One process goes on where two were."""
    interrupted = {"env": {"TINY_RUN_INTERRUPT_AT": "0"}}
    pair = Pair(tiny_folder, tmp_path / "run", "save_steps=100", of_second=interrupted)
    assert pair.wait() == [130, 130], pair.said(0) + pair.said(1)
    assert "Stopped by Ctrl-C in process 1 after step 1" in pair.said(0)
    assert latest_checkpoint(pair.out) == pair.out / "checkpoints" / "step-000001"
    pair = Pair(tiny_folder, pair.out, resume=True, of_first={"env": {"TINY_RUN_KILL_AT": "2"}})
    assert pair.wait() == [-signal.SIGKILL, 3], pair.said(0) + pair.said(1)
    assert "process 0 (" in pair.said(1) and "no sign of life" in pair.said(1)
    assert latest_checkpoint(pair.out) == pair.out / "checkpoints" / "step-000002"
    assert_same(straight, alone(tiny_folder, pair.out, resume=True))


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="limits the size of a process's files by util-linux")
def test_a_full_disk_of_one_ends_both(tiny_folder, tmp_path):
    """The second one can't write its part of the first checkpoint."""
    out = tmp_path / "run"
    pair = Pair(tiny_folder, out, "steps=1", of_second={"under": ["prlimit", "--fsize=30000"]})
    assert pair.wait() == [3, 2], pair.said(0) + pair.said(1)
    for index in range(2):
        said = " ".join(pair.said(index).split())
        assert "the checkpoint of step 1 could not be written" in said, said
    assert latest_checkpoint(out) is None and not list((out / "checkpoints").glob(".tmp*"))


def test_one_that_is_started_otherwise_is_caught_before_the_first_step(tiny_folder, tmp_path):
    pair = Pair(tiny_folder, tmp_path / "run", of_second={"flags": ["--seed", "7", "--set", "grpo.epsilon=0.3"]})
    assert pair.wait() == [2, 2], pair.said(0) + pair.said(1)
    for index in range(2):
        said = " ".join(pair.said(index).split())
        assert "seed is 3 in process 0 and 7 in process 1" in said and "grpo.epsilon is 0.2 in process 0" in said
    assert not (pair.out / "metrics.jsonl").exists()
