"""Runs that sample dynamically, measure themselves and order their data: killed, resumed, compared."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_run import (
    as_flags,
    main_like,
    tiny_config,
    tiny_folder as tiny_folder,
    tiny_settings,
)

from eqx_specgrpo import train
from eqx_specgrpo.records import EvaluationRecords, read_records

MEASURED = ("time/", "compile/", "spec/tokens_per_second", "spec/seconds", "draft/seconds", "eval/runtime")

# Right in a quarter of the completions of a random model, so that a third of the groups of four have no spread.
RARE = """
def rare(completion_ids, log_extra, **kwargs):
    log_extra("extracted_answer", [str(len(ids) % 3) for ids in completion_ids])
    return [float(sum(ids) % 4 == 0) for ids in completion_ids]


def varied(completions, **kwargs):
    return [float(len(set(completion[0]["content"])) % 3 == 0) for completion in completions]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A reward, and prompts to measure on."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "rare.py").write_text(RARE)
    lines = [json.dumps({"prompt": [{"role": "user", "content": f"{number}!"}]}) for number in range(5)]
    (folder / "held_out.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def settings(tiny_folder: Path, files: Path, out: Path, *more: str) -> list[str]:
    rewards = [f"{files / 'rare.py'}:rare", f"{tiny_folder / 'reward.py'}:even"]
    common = ["steps=5", "save_steps=2", "save_total_limit=none", "compare=false"]
    return tiny_settings(tiny_folder, out, f"reward.functions={rewards}", "reward.weights=[1.0, 0.0]", *common, *more)


def dynamic(files: Path) -> list[str]:
    return ["grpo.max_sample_batches=3", "task.size=10", "curriculum=easiest_first"]


def evaluation(tiny_folder: Path, files: Path) -> list[str]:
    functions = [*(f"{files / 'rare.py'}:{name}" for name in ("rare", "varied")), f"{tiny_folder / 'reward.py'}:even"]
    return [
        f"eval.task={files / 'held_out.jsonl'}", "eval.every=2", "eval.at_start=true", f"eval.functions={functions}"
    ]  # fmt: skip


def in_another_process(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from eqx_specgrpo.cli import main; main()", "run", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def run(tiny_folder: Path, files: Path, out: Path, *more: str) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    with console.capture() as capture:
        train.run(tiny_config(tiny_folder, out, *settings(tiny_folder, files, out, *more)), console=console)
    return capture.get()


def unmeasured(path: Path) -> list[dict[str, object]]:
    return [
        {name: value for name, value in record.items() if not name.startswith(MEASURED)}
        for record in read_records(path)
    ]


def results(out: Path) -> dict[str, object]:
    """All that a run has made, but for what was measured with a clock."""
    found: dict[str, object] = {"metrics": unmeasured(out / "metrics.jsonl")}
    found["completions"] = (out / "completions.jsonl").read_bytes()
    for path in sorted([*out.glob("*/*.safetensors"), *out.glob("checkpoints/*/*.safetensors")]):
        if "best" not in path.parts:
            found[path.relative_to(out).as_posix()] = path.read_bytes()
    return found


def evaluations(out: Path) -> dict[str, object]:
    found: dict[str, object] = {"metrics": unmeasured(out / "eval.jsonl")}
    found["completions"] = (out / "eval_completions.jsonl").read_bytes()
    return found | {path.name: path.read_bytes() for path in (out / "best").glob("*.safetensors")}


def assert_same(expected: dict[str, object], found: dict[str, object]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == value, name


@pytest.fixture(scope="module")
def straight(tiny_folder, files, tmp_path_factory) -> Path:
    """Five steps of all of it, in one go."""
    out = tmp_path_factory.mktemp("straight") / "run"
    text = run(tiny_folder, files, out, *dynamic(files), *evaluation(tiny_folder, files), "save_best=eval/pass@1")
    assert "measured  5 held-out prompts x 4 completions, every 2 steps and at the end" in text
    assert len(re.findall(r"evaluation after step [0245]/5  reward \d\.\d+ \(\d\.\d+ to \d\.\d+\)  pass@1 ", text)) == 4
    return out


@pytest.mark.parametrize("kill_at", ["3", "4"])
def test_killed_and_resumed_is_bitwise_a_straight_run(
    straight, tiny_folder, files, tmp_path, monkeypatch, capsys, kill_at
):
    """SIGKILL in the fourth step, of which two are in a checkpoint; and in the evaluation after the fourth one."""
    out = tmp_path / "run"
    arguments = settings(
        tiny_folder, files, out, *dynamic(files), *evaluation(tiny_folder, files), "save_best=eval/pass@1"
    )
    killed = in_another_process(as_flags(arguments), TINY_RUN_KILL_AT=kill_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(read_records(out / "metrics.jsonl")) == int(kill_at)
    assert [record["step"] for record in read_records(out / "eval.jsonl")] == [0, 2]
    code, _, err = main_like(monkeypatch, capsys, "run", "--resume", "--out", str(out))
    assert code == 0, err
    assert_same(results(straight), results(out))
    assert_same(evaluations(straight), evaluations(out))
    assert json.loads((out / "best.json").read_text()) == json.loads((straight / "best.json").read_text())


def test_dynamic_sampling_fills_the_step(straight):
    """Metrics, records and the state agree with one another."""
    metrics = read_records(straight / "metrics.jsonl")
    rows = read_records(straight / "completions.jsonl")
    batches = [record["dynamic_sampling/batches"] for record in metrics]
    assert max(batches) > 1 and min(batches) >= 1 and max(batches) <= 3
    for record, taken in zip(metrics, batches, strict=True):
        assert record["dynamic_sampling/rows"] == 8 * taken
        own = [row for row in rows if row["step"] == record["step"]]
        assert len(own) == 8 and record["reward"] == pytest.approx(np.mean([row["reward"] for row in own]))
        groups = [own[:4], own[4:]]
        spread = [len({row["reward"] for row in group}) > 1 for group in groups]
        assert record["dynamic_sampling/frac_filled"] == np.mean(spread)
        assert record["frac_reward_zero_std"] == 1 - np.mean(spread)
        assert all(spread) or taken == 3
        assert (record["time/dynamic_sampling"] > 0) == (taken > 1)
        assert record["time/dynamic_sampling"] < record["time/step"]
    meta = json.loads((straight / "checkpoints" / "step-000005" / "meta.json").read_text())["meta"]
    assert {path.name for path in (straight / "checkpoints").iterdir()} == {f"step-00000{step}" for step in (2, 4, 5)}
    least, most = 2 * len(metrics), sum(2 * taken for taken in batches)
    assert least < meta["position"] <= most
    assert (straight / "checkpoints" / "step-000005" / "order.safetensors").exists()


def test_a_run_with_evaluation_is_bitwise_the_run_without(straight, tiny_folder, files, tmp_path):
    out = tmp_path / "run"
    run(tiny_folder, files, out, *dynamic(files))
    assert not (out / "eval.jsonl").exists()
    assert_same(results(out), results(straight))


def test_records_of_evaluations(straight):
    evaluated, completions = (read_records(straight / name) for name in ("eval.jsonl", "eval_completions.jsonl"))
    assert [record["step"] for record in evaluated] == [0, 2, 4, 5]
    assert len(completions) == 4 * 5 * 4
    for record in evaluated:
        own = [row for row in completions if row["step"] == record["step"]]
        rewards = np.array([row["reward"] for row in own]).reshape(5, 4)
        assert [row["item"] for row in own] == np.repeat(np.arange(5), 4).tolist()
        assert {row["prompt"][0]["content"] for row in own} == {f"{number}!" for number in range(5)}
        assert record["eval/reward"] == pytest.approx(rewards.mean())
        assert record["eval/pass@4"] == (rewards >= 1).any(1).mean()
        assert record["eval/best@4"] == pytest.approx(rewards.max(1).mean())
        assert record["eval/rewards/varied/mean"] == pytest.approx(np.mean([row["rewards/varied"] for row in own]))
        assert {"eval/pass@1/low", "eval/maj@4", "eval/completions/mean_length"} <= set(record)
        assert record["eval/spec/acceptance_length"] > 1, "with the draft"
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(eval/[^`]+)` \|", page, re.MULTILINE)
    names = {re.sub(r"@\d+", "@{}", re.sub(r"/(low|high)$", "", name)) for name in evaluated[0]} - {"step"}
    names = {re.sub(r"eval/rewards/\w+/", "eval/rewards/{}/", name) for name in names}
    assert names == {re.sub(r"\{\w+\}", "{}", name) for name in documented}
    texts = {record["step"]: [row["completion"] for row in completions if row["step"] == record["step"]]
             for record in evaluated}  # fmt: skip
    assert texts[0] != texts[5], "of other weights"


def test_the_best_policy_is_kept(straight):
    values = {record["step"]: record["eval/pass@1"] for record in read_records(straight / "eval.jsonl")}
    best = json.loads((straight / "best.json").read_text())
    assert best == {"step": max(values, key=lambda step: (values[step], -step)), "metric": "eval/pass@1",
                    "value": max(values.values())}  # fmt: skip
    assert EvaluationRecords(straight).best() == best
    assert (straight / "best" / "model.safetensors").exists()


def test_eval_of_what_a_run_has_saved_gives_its_last_evaluation(straight, tmp_path, monkeypatch, capsys):
    """Same items, random numbers and draft; the weights went through a file."""
    file = tmp_path / "completions.jsonl"
    arguments = ["--model", str(straight / "policy"), "--draft", str(straight / "draft"), "--completions", str(file)]
    code, text, err = main_like(monkeypatch, capsys, "eval", str(straight / "config.toml"), *arguments, "--json")
    assert code == 0, err
    found = json.loads(text)
    last = unmeasured(straight / "eval.jsonl")[-1]
    assert {name: value for name, value in found["metrics"].items() if not name.startswith(MEASURED)} == {
        name: value for name, value in last.items() if name != "step"
    }
    assert found["task"].endswith("held_out.jsonl") and found["temperature"] == 1.0
    assert [record["completion"] for record in read_records(file)] == [
        record["completion"] for record in read_records(straight / "eval_completions.jsonl") if record["step"] == 5
    ]


def test_eval_of_another_task(straight, tmp_path, monkeypatch, capsys):
    """As a table, greedily, without a draft."""
    task = ["--task", "arithmetic", "--limit", "3", "--temperature", "0", "--reward", "arithmetic"]
    code, text, err = main_like(monkeypatch, capsys, "eval", "--model", str(straight / "policy"), *task,
                                "--max-completion-length", "8")  # fmt: skip
    assert code == 0, err
    assert re.search(r"pass@1 +0\.0000 +0\.0000 to 0\.0000", text) and re.search(r"num_prompts +3", text)
    assert "num_samples" in text and "maj@1" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "there is nothing to measure on: name a task (--task)"),
        (["--task", "arithmetic"], "has no end: say how many of its items are measured on (eval.limit)"),
        (["--task", "aritmetic"], "Did you mean 'arithmetic'?"),
        (["--task", "arithmetic", "--limit", "2", "--samples", "2", "--temperature", "0"], "the same completion"),
        (["--task", "arithmetic", "--limit", "2", "--reward", "f1"], "there is no reward 'f1'"),
    ],
)
def test_bad_input_to_eval(straight, monkeypatch, capsys, arguments, message):
    model = [] if "aritmetic" in arguments else ["--model", str(straight / "policy")]
    code, text, err = main_like(monkeypatch, capsys, "eval", *model, *arguments)
    assert code == 2 and text == "" and message in " ".join(err.split()), err


@pytest.mark.parametrize(
    "more, message",
    [
        (["eval.holdout=10"], "eval.holdout = 10 leaves nothing to train on of a task of 10 items"),
        (["eval.task=arithmetic"], "10 of the task's 10 items have a prompt of the evaluation's task as well"),
        (["num_train_epochs=2", "task.size=none"], "num_train_epochs = 2, but the task has no end"),
    ],
)
def test_bad_splits_end_before_anything_is_loaded(tiny_folder, files, tmp_path, monkeypatch, capsys, more, message):
    arguments = as_flags(settings(tiny_folder, files, tmp_path / "run", "task.size=10", *more))
    for flags in ([], ["--dry-run"]):
        code, _, err = main_like(monkeypatch, capsys, "run", *arguments, *flags)
        assert code == 2 and message in err and err.count("error:") == 1
    assert not (tmp_path / "run").exists()


def test_steps_of_epochs(tiny_folder, files, tmp_path, monkeypatch, capsys):
    arguments = as_flags(settings(tiny_folder, files, tmp_path / "run", "task.size=10", "num_train_epochs=3"))
    code, text, err = main_like(monkeypatch, capsys, "run", *arguments, "--dry-run")
    assert code == 0 and re.search(r"^steps = 15 ", text, re.MULTILINE), err
    assert re.search(r"^num_train_epochs = 3.0 ", text, re.MULTILINE)


def test_a_signal_in_an_evaluation(tiny_folder, files, tmp_path, monkeypatch, capsys):
    """Ctrl-C waits for it, and the step behind it is not begun. SIGTERM leaves it: it is made again on resuming.

    Trackers are told of the evaluations that were made.
    """
    out, told = tmp_path / "run", []
    further = ["draft.mode=off", "steps=3", "grpo.top_p=0.9", "eval.temperature=0.5"]
    arguments = settings(tiny_folder, files, out, *evaluation(tiny_folder, files), *further)
    with monkeypatch.context() as patch:
        patch.setattr(
            "eqx_specgrpo.records.Trackers.step", lambda self, step, metrics, _=(): told.append((step, metrics))
        )
        patch.setenv("TINY_RUN_INTERRUPT_AT", "2")  # after two steps comes an evaluation
        code, text, err = main_like(patch, capsys, "run", *as_flags(arguments))
    assert code == 130 and "Stopped by Ctrl-C after step 2 of 3" in text, err
    assert [record["step"] for record in read_records(out / "eval.jsonl")] == [0, 2]
    assert len(read_records(out / "metrics.jsonl")) == 2
    told = [(step, metrics) for step, metrics in told if metrics]
    assert [(step, "eval/reward" in metrics) for step, metrics in told] == [
        (0, True),
        (1, False),
        (2, False),
        (2, True),
    ]

    def terminate(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("eqx_specgrpo.records.RunProgress.decoding", terminate)
        patch.setattr("eqx_specgrpo.train._evaluation.HeldOutEvaluator._is_due", lambda self, done: True)
        (out / "eval.jsonl").write_text("")
        code, text, err = main_like(patch, capsys, "run", "--resume", "--out", str(out))
    assert code == 143 and "Stopped by SIGTERM after step 2 of 3" in text, err
    assert read_records(out / "eval.jsonl") == []
    code, _, err = main_like(monkeypatch, capsys, "run", "--resume", "--out", str(out))
    assert code == 0, err
    assert [record["step"] for record in read_records(out / "eval.jsonl")] == [2, 3]
    assert len(read_records(out / "eval_completions.jsonl")) == 2 * 20
