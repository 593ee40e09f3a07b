"""`benchmarks/against_trl.py`: what it makes, what it keeps, and what it must not touch."""

import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "against_trl.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs the script's `main`; each run writes as many records as it has steps, or as `stop_at` says."""
    spec = importlib.util.spec_from_file_location("against_trl", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "task.toml").write_text("steps = 9\n", encoding="utf-8")
    made: list[str] = []

    def main(*more: str, stop_at: int | None = None) -> list[str]:
        """Folders of the runs that were made."""

        def fake(command, check):
            options = dict(part.split("=", 1) for part in command if part.startswith(("--out=", "--steps=")))
            if "--steps" not in options:
                return SimpleNamespace(returncode=0)  # of the comparison
            folder, steps = Path(options["--out"]), int(options["--steps"])
            folder.mkdir(parents=True)
            records = "".join(f'{{"step": {step}}}\n' for step in range(steps if stop_at is None else stop_at))
            (folder / "metrics.jsonl").write_text(records, encoding="utf-8")
            made.append(folder.name)
            return SimpleNamespace(returncode=int(stop_at is not None))

        monkeypatch.setattr(subprocess, "run", fake)
        common = ["task.toml", "--out", "out", "--model", "m", "--draft", "d", "--arms", "speculative,trl-float32"]
        monkeypatch.setattr("sys.argv", ["against_trl.py", *common, *more])
        made.clear()
        module.main()
        return list(made)

    monkeypatch.chdir(tmp_path)
    return main


def test_goes_on_where_it_was_stopped(script):
    assert script("--steps", "3", stop_at=2) == ["speculative-0"]
    assert script("--steps", "3") == ["speculative-0", "trl-float32-0"]
    assert script("--steps", "3") == []
    assert script("--steps", "3", "--seeds", "0,1") == ["speculative-1", "trl-float32-1"]


@pytest.mark.parametrize(
    "changed", [["--steps", "4"], ["--model", "n"], ["--set", "grpo.beta=0.1"], ["--dtype", "float32"]]
)
def test_a_run_of_other_settings_is_refused_and_stays(changed, script, tmp_path):
    script("--steps", "3")
    with pytest.raises(SystemExit, match="speculative-0 is a run of other settings"):
        script("--steps", "3", *changed)
    (tmp_path / "task.toml").write_text("steps = 8\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="choose another --out"):
        script("--steps", "3")
    assert len((tmp_path / "out/runs/speculative-0/metrics.jsonl").read_text().splitlines()) == 3
