import errno
import io
import json
import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from eqx_specgrpo.config import load_config
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.records import Comparison, RunFolder, _folder as _run_folder, read_records, read_steps
from eqx_specgrpo.records._plot import draw_times, new_figure, plot_run
from eqx_specgrpo.records._report import first_to_last, phase_times, summary_text
from eqx_specgrpo.records._speculation import speculation_balance
from eqx_specgrpo.train._finish import sum_up


def finished(path, steps=3):
    with RunFolder(path) as folder:
        folder.write_config("steps = 3\n")
        for step in range(1, steps + 1):
            folder.append_metrics({"step": step, "reward": step / 4})
            folder.append_completions([{"step": step, "text": f"{step}{row}é\n"} for row in range(2)])
    return path


def test_records_round_trip(tmp_path):
    with RunFolder(tmp_path / "a" / "b") as folder:
        folder.append_metrics(
            {
                "step": np.int32(1),
                "nan": float("nan"),
                "inf": np.float32("-inf"),
                "jax": jnp.asarray(0.5, jnp.bfloat16),
                "list": [np.float64("nan"), np.arange(2)],
                "text": "\u2028é",
                "flag": np.bool_(True),
                "none": None,
            }
        )
        # Each line is on the disk when the call returns, before any `close`.
        lines = folder.metrics_path.read_text(encoding="utf-8").split("\n")
        assert len(lines) == 2 and lines[1] == ""
        expected = {"step": 1, "nan": None, "inf": None, "jax": 0.5, "list": [None, [0, 1]], "text": "\u2028é"}
        assert json.loads(lines[0]) == expected | {"flag": True, "none": None}
        with pytest.raises(TypeError, match="cannot be written as JSON"):
            folder.append_metrics({"step": object()})
        assert read_records(folder.metrics_path) == [json.loads(lines[0])] == read_records(str(folder.metrics_path))


def test_lone_surrogates_do_not_stop_a_run(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.append_completions([{"step": 1, "text": "a\ud83d"}])
        assert read_records(folder.completions_path)[0]["text"] == "a?"


def test_used_folder_needs_resume(tmp_path):
    run = finished(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError, match="--resume.*--out"):
        RunFolder(run)
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(UserError, match="other files"):
        RunFolder(foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        RunFolder(foreign / "thesis.tex")


def test_a_run_that_never_began_is_no_run(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_config("steps = 1\n")
    with RunFolder(tmp_path):
        pass


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="no run to resume"):
        RunFolder(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_rewind(tmp_path):
    run = finished(tmp_path / "run")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "rew')  # A kill in the middle of a line.
    with RunFolder(run, resume=True) as folder:
        kept = folder.metrics_path.read_bytes().splitlines(keepends=True)[:2]
        folder.rewind(2)
        assert folder.metrics_path.read_bytes() == b"".join(kept)
        assert [record["step"] for record in read_records(folder.completions_path)] == [1, 1, 2, 2]
        folder.append_metrics({"step": 3})
        assert [record["step"] for record in read_records(folder.metrics_path)] == [1, 2, 3]
    assert not list(run.glob(".tmp*"))


def test_half_a_line_is_dropped_even_if_its_step_is_kept(tmp_path):
    run = finished(tmp_path / "run")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4}')
    with RunFolder(run, resume=True) as folder:
        folder.rewind(9)
        folder.append_metrics({"step": 5})
        assert [record["step"] for record in read_records(folder.metrics_path)] == [1, 2, 3, 5]


def test_damaged_line_is_named(tmp_path):
    run = finished(tmp_path / "run")
    path = run / "metrics.jsonl"
    for damage in (b"nonsense\n", b"[1]\n", b"\xff\n", b'{"reward": 1}\n'):
        content = damage + b'{"step": 1}\n'
        path.write_bytes(content)
        with RunFolder(run, resume=True) as folder, pytest.raises(UserError, match="line 1 of .*metrics.jsonl"):
            folder.rewind(2)
        assert path.read_bytes() == content


def test_a_kill_while_rewinding_loses_nothing(tmp_path, monkeypatch):
    run = finished(tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    with RunFolder(run, resume=True) as folder:
        monkeypatch.setattr(_run_folder.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.rewind(1)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_full_disk(tmp_path, monkeypatch):
    run = finished(tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunFolder(run, resume=True) as folder:
        monkeypatch.setattr(_run_folder, "_write_all", full)
        with pytest.raises(UserError, match="metrics.jsonl could not be written: No space left.*--resume"):
            folder.append_metrics({"step": 4})
        monkeypatch.setattr(_run_folder.os, "fsync", full)
        for action in (lambda: folder.rewind(1), lambda: folder.write_config("x")):
            with pytest.raises(UserError, match="No space left"):
                action()
    assert (run / "metrics.jsonl").read_bytes() == before
    assert (run / "config.toml").read_text() == "steps = 3\n"
    assert not list(run.glob(".tmp*"))


def test_one_process_at_a_time(tmp_path):
    run = finished(tmp_path / "run")
    # The module alone, without JAX: quick to start.
    source = f"""
        import sys
        from pathlib import Path
        from eqx_specgrpo.errors import UserError
        from eqx_specgrpo.records._folder import RunFolder
        try:
            RunFolder(Path({str(run)!r}), resume=True)
        except UserError as error:
            sys.exit(str(error))
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    with RunFolder(run, resume=True):
        with pytest.raises(UserError, match="another process is writing"):
            RunFolder(run, resume=True)
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert other.returncode == 1 and "another process is writing" in other.stderr
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    RunFolder(run, resume=True).close()


METRICS = [
    {
        "step": step,
        "reward": step / 10 if step != 3 else None,
        "spec/acceptance_length": 1.5 + step / 20,
        "time/rollout": 2.0,
        "time/reward": 0.0,
        "time/update": 1.0,
        "time/step": 4.0,
    }
    for step in range(10)
]


def test_summary_numbers():
    assert first_to_last(METRICS, "spec/acceptance_length") == pytest.approx((1.6, 1.85))
    # Nine values: halves of four, and the step without a reward is left out.
    assert first_to_last(METRICS, "reward") == pytest.approx(((0 + 0.1 + 0.2 + 0.4) / 4, 0.75))
    assert first_to_last(METRICS[:1], "reward") == (0.0, 0.0)
    assert first_to_last(METRICS, "absent") is None
    assert phase_times(METRICS) == {"rollout": 20.0, "reward": 0.0, "update": 10.0, "other": 10.0}


def rows_of(*arguments) -> list[str]:
    return [" ".join(line.split()) for line in summary_text(*arguments).splitlines()]


def test_summary_text():
    rows = rows_of(METRICS, (), Comparison(10, 100.0, 123.4, 1.0))
    assert "Acceptance length (mean of 5 steps) 1.600 1.850 +0.250" in rows
    assert "Reward (mean of 4 steps) 0.175 0.750 +0.575" in rows
    assert {"rollout 20.0 50%", "update 10.0 25%", "other 10.0 25%", "all steps 40.0"} <= set(rows)
    assert "rollouts after step 10 123 100 1.23x" in rows
    assert "Summary of 0 steps" in summary_text([])


def test_summary_of_an_adaptive_length():
    """How often it drafted, also if that was never: then acceptance lengths of 1 need a reason."""

    def rows(*rounds, comparison=None):
        return rows_of([{f"spec/rounds_length_{k}": n for k, n in step.items()} for step in rounds], (), comparison)

    even = Comparison(10, 100.0, 100.0, 1.0)
    text = rows({0: 30.0}, {2: 60.0, 0: 10.0}, {10: 20.0})
    begin = text.index("Draft length rounds share")
    assert text[begin + 1 : begin + 4] == ["0 (plain decoding) 40 33%", "2 60 50%", "10 20 17%"]
    assert "0 (plain decoding) 30 100%" in rows({0: 30.0}, comparison=even)
    lengths = [{"spec/rounds_length_0": 9.0, "spec/acceptance_length": 1.0}] * 2
    assert not any(row.startswith("Acceptance length") for row in rows_of(lengths)), "nothing was drafted"
    assert "Draft length rounds share" not in rows({0: 30.0}), "without a draft it goes without saying"
    assert "Draft length rounds share" not in rows({3: 30.0}, comparison=even), "as does a fixed length"


def test_a_run_that_drafted_nothing_says_so(tmp_path):
    """With a reason; not a run that drafted, nor one without a draft."""

    def said(kind: str, length: int) -> str:
        record = {"step": 1, f"spec/rounds_length_{length}": 9.0, "entropy": 1.25}
        file = io.StringIO()
        with RunFolder(tmp_path / f"{kind}-{length}", False) as folder:
            folder.metrics_path.write_text(json.dumps(record) + "\n", encoding="utf-8")
            sum_up(load_config(None, [f"draft.kind={kind}"]), folder, None, Console(file=file, width=200))
        return file.getvalue()

    text = said("medusa", 0)
    assert "Nothing was drafted" in text and "1.25 nats" in text
    assert "Nothing was drafted" not in said("medusa", 2) and "Nothing was drafted" not in said("none", 0)


# Two starts of a run: the phases of each add up to its total.
STARTS = [
    {
        "from_step": 1,
        "total": 60.0,
        "seconds": {"loading": 4.0, "warm-up": 20.0, "rollout": 24.0, "draft": 3.0, "other": 9.0},
        "compiling": {"loading": 1.0, "warm-up": 15.0, "rollout": 10.0, "draft": 1.0},
    },
    {
        "from_step": 6,
        "total": 40.0,
        "seconds": {"loading": 4.0, "rollout": 20.0, "draft": 2.0, "comparison": 8.0, "other": 6.0},
        "compiling": {"loading": 1.0, "rollout": 4.0, "draft": 0.0, "comparison": 6.0},
    },
]


def test_the_times_of_all_starts_add_up():
    rows = rows_of(METRICS, STARTS)
    assert {
        "loading 8.0 8% 2.0",
        "warm-up 20.0 20% 15.0",
        "rollout 44.0 44% 14.0",
        "comparison 8.0 8% 6.0",
        "other 15.0 15% 0.0",
        "in all, of 2 starts 100.0 38.0",
    } <= set(rows)
    assert "all steps 40.0" in rows_of(METRICS, STARTS[1:]), "the beginning is not known"


def test_what_speculation_saved_by_a_comparison():
    """3,600 tokens, which plain decoding would have made in 36 s: the rollouts, 30 s without compiling, saved 6. The
    lessons took 9 s. 30 s of compiling, of which plain decoding would have needed 5."""
    metrics = [{"spec/tokens_per_second": 45.0, "time/rollout": 8.0}] * 10
    balance = speculation_balance(metrics, STARTS, Comparison(10, 100.0, 120.0, 5.0))
    assert balance is not None and "comparison" in balance.basis
    assert (balance.rollouts, balance.draft, balance.compiling, balance.total) == pytest.approx((6.0, -9.0, -25.0, -28))


def test_what_speculation_saved_without_a_comparison():
    """As the run itself expected; nothing is said where it expected nothing, or its beginning is not known."""
    metrics = [{"spec/seconds_saved": 0.5}, {"spec/seconds_saved": -0.25}, {}]
    balance = speculation_balance(metrics, STARTS, None)
    assert balance is not None and "estimate" in balance.basis
    assert (balance.rollouts, balance.draft, balance.compiling) == pytest.approx((0.25, -9.0, -16.0))
    assert speculation_balance([{}], STARTS, None) is None
    assert speculation_balance(metrics, STARTS[1:], None) is None


def test_older_folders_are_counted_from_one(tmp_path):
    """They begin with step 0. What is kept is counted anew when a run goes on there, once."""
    with RunFolder(tmp_path) as folder:
        folder.write_config("steps = 3\n")
        for step in range(3):
            folder.append_metrics({"step": step, "reward": step / 4})
            folder.append_completions([{"step": step}, {"step": step}])
        folder.machine_path.write_text('{"from_step": 0, "device": "a"}\n{"from_step": 2, "device": "b"}\n')
    assert [record["step"] for record in read_steps(str(folder.metrics_path))] == [1, 2, 3]
    for _ in range(2):
        with RunFolder(tmp_path, resume=True) as folder:
            folder.rewind(2)
            folder.write_machine(2, {"device": "c"})
        assert read_records(folder.metrics_path) == [{"step": 1, "reward": 0.0}, {"step": 2, "reward": 0.25}]
        assert [record["step"] for record in read_records(folder.completions_path)] == [1, 1, 2, 2]
        assert [start["from_step"] for start in read_records(folder.machine_path)] == [1, 3]


def test_plot(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be read"):
        plot_run(tmp_path)
    with RunFolder(tmp_path) as folder:
        for record in METRICS:
            folder.append_metrics(record)
    picture = plot_run(tmp_path)
    assert picture.parent == tmp_path and picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="needs matplotlib, which is not installed: pip install matplotlib"):
        plot_run(tmp_path)


def test_bars_beyond_the_axis_say_how_long_they_are():
    axes = new_figure(4.0, 3.0).subplots()
    metrics = [{"step": step, "time/rollout": 2.0, "time/update": 1.0} for step in range(1, 21)]
    draw_times(axes, metrics)
    assert not axes.texts and axes.get_ylim()[1] >= 3.0, "no step is unusual"
    axes = new_figure(4.0, 3.0).subplots()
    draw_times(axes, [{"step": 1, "time/rollout": 90.0, "time/update": 40.0}, *metrics[1:]])
    assert 3.0 < axes.get_ylim()[1] < 6.0
    assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [("130 s", 1)]
