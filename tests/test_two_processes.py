"""A run of two processes through the command line: the same run as one process's, and every way that one of them can
end. What they exchange is in `test_processes.py`, without starting any."""

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
from tiny_run import as_flags, checkpoint_arrays, tiny_folder as tiny_folder, tiny_settings

from eqx_specgrpo.records import latest_checkpoint, read_records

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
)
WITHIN = 30.0  # seconds in which every process has to end once one of them has


class Run:
    """Processes of one run, each in a process group of its own."""

    def __init__(
        self, folder: Path, out: Path, count: int, *settings: str, devices=1, resume: bool = False, of_second=None
    ):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        flags = [*as_flags(tiny_settings(folder, out, *SETTINGS, *settings)), *(["--resume"] if resume else [])]
        self.out, self.processes, self.logs = out, [], []
        for index in range(count):
            place = ["--coordinator", f"localhost:{port}", "--process", str(index), "--processes", str(count)]
            own = of_second or {} if index == 1 else {}
            log = out.with_name(f"{out.name}-{index}.log")
            arguments = [*flags, *(place if count > 1 else []), *own.get("flags", [])]
            self.logs.append(log)
            with open(log, "ab") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", "from eqx_specgrpo.cli import main; main()", "run", *arguments],
                        env=os.environ
                        | {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache")}
                        | {"JAX_NUM_CPU_DEVICES": str(devices)}
                        | own.get("env", {}),
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


@pytest.fixture(scope="module")
def straight(tiny_folder, tmp_path_factory) -> Path:
    """Three steps of one process."""
    run = Run(tiny_folder, tmp_path_factory.mktemp("straight") / "run", 1)
    assert run.wait() == [0], run.said(0)
    return run.out


def assert_same(straight: Path, out: Path) -> None:
    """Completions to the letter, figures and weights within 1e-5: prompts decoded beside others round otherwise."""
    assert (out / "completions.jsonl").read_bytes() == (straight / "completions.jsonl").read_bytes()
    records = [read_records(folder / "metrics.jsonl") for folder in (straight, out)]
    assert [record["step"] for record in records[1]] == [1, 2, 3]
    for expected, found in zip(*records, strict=True):
        for name in ("loss", "grad_norm", "reward", "draft/loss", "num_tokens", "completions/mean_length"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
    for tree in ("policy", "policy_optimizer", "draft"):
        first, second = (checkpoint_arrays(latest_checkpoint(folder), tree) for folder in (straight, out))
        assert first.keys() == second.keys()
        for name, array in first.items():
            np.testing.assert_allclose(second[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def test_two_processes_are_one_and_a_failed_reward_loses_nothing(straight, tiny_folder, tmp_path):
    """Two devices each. The second one's reward raises after two steps, of which none was to be saved yet: both end,
    and the run goes on with the same numbers, by both of them or by one device alone."""
    lengths = {record["length"] for record in read_records(straight / "completions.jsonl")}
    assert len(lengths) > 2
    of_second = {"env": {"TINY_RUN_RAISE_AT": "2"}}
    run = Run(tiny_folder, tmp_path / "run", 2, "save_steps=100", devices=2, of_second=of_second)
    assert run.wait() == [3, 2], run.said(0) + run.said(1)
    assert "out of order" in run.said(1)
    assert "process 1 (" in run.said(0) and "out of order" in run.said(0)
    assert latest_checkpoint(run.out) == run.out / "checkpoints" / "step-000002"
    alone = Run(tiny_folder, Path(shutil.copytree(run.out, tmp_path / "alone")), 1, resume=True)
    assert alone.wait() == [0], alone.said(0)
    assert_same(straight, alone.out)
    run = Run(tiny_folder, run.out, 2, devices=2, resume=True)
    assert run.wait() == [0, 0], run.said(0) + run.said(1)
    assert_same(straight, run.out)


def test_a_killed_process_ends_the_other_and_loses_no_checkpoint(straight, tiny_folder, tmp_path):
    """The first one, which has begun the coordination service. One process goes on where two were."""
    index = 0
    run = Run(tiny_folder, tmp_path / "run", 2)
    run.when_done(1)
    run.processes[index].kill()
    codes = run.wait()
    assert codes[index] == -signal.SIGKILL and codes[1 - index] == 3, run.said(0) + run.said(1)
    assert f"process {index} (" in run.said(1 - index) and "no sign of life" in run.said(1 - index)
    alone = Run(tiny_folder, run.out, 1, resume=True)
    assert alone.wait() == [0], alone.said(0)
    assert_same(straight, run.out)


def test_ctrl_c_in_one_and_sigterm_to_both(straight, tiny_folder, tmp_path):
    run = Run(tiny_folder, tmp_path / "run", 2)
    run.when_done(1)
    run.processes[1].send_signal(signal.SIGINT)
    assert run.wait() == [130, 130], run.said(0) + run.said(1)
    assert "Stopped by Ctrl-C in process 1 after step" in run.said(0)
    done = len(read_records(run.out / "metrics.jsonl"))
    assert latest_checkpoint(run.out) == run.out / "checkpoints" / f"step-{done:06d}"
    resumed_after = done
    run = Run(tiny_folder, run.out, 2, "save_steps=100", "steps=50", resume=True)
    run.when_done(done + 1)
    for one in run.processes:
        one.terminate()
    assert run.wait() == [143, 143], run.said(0) + run.said(1)
    done = len(read_records(run.out / "metrics.jsonl"))
    assert latest_checkpoint(run.out) == run.out / "checkpoints" / f"step-{done:06d}"
    # The learning rate of the longer run is another one: what is the same is drawn before it is used.
    first, second = (read_records(folder / "completions.jsonl") for folder in (straight, run.out))
    same = [record for record in first if record["step"] <= resumed_after + 1]
    assert len(same) > 0 and second[: len(same)] == same


def test_one_that_is_started_otherwise_is_caught_before_the_first_step(tiny_folder, tmp_path):
    run = Run(tiny_folder, tmp_path / "run", 2, of_second={"flags": ["--seed", "7", "--set", "grpo.epsilon=0.3"]})
    assert run.wait() == [2, 2], run.said(0) + run.said(1)
    for index in range(2):
        said = " ".join(run.said(index).split())
        assert "seed is 3 in process 0 and 7 in process 1" in said and "grpo.epsilon is 0.2 in process 0" in said
    assert not (run.out / "metrics.jsonl").exists()
