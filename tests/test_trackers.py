"""Trackers: what they are told, how they fail, and that what the real ones have written is there in their own files."""

import ast
import dataclasses
import inspect
import json
import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import main_like, tiny_config, tiny_folder as tiny_folder, tiny_settings

from eqx_specgrpo import train
from eqx_specgrpo.config import check_resume, load_config
from eqx_specgrpo.errors import ConfigError, Stopped, UserError
from eqx_specgrpo.records import read_records
from eqx_specgrpo.records.trackers import (
    TRACKER_KINDS,
    AbstractTracker,
    Begun,
    Outcome,
    TrackedRun,
    TrackerKind,
    _kinds,
    _trackers,
    begun_trackers,
    check_trackers,
    completion_table,
)

SETTINGS = {"steps": 4, "grpo.beta": 0.1, "reward.functions": ["a", "b"], "run_name": None, "draft.adaptive": True}
HOSTILE = "a|b\n<script>alert(1)</script> *x*"


def completions(step: int) -> list[dict]:
    return [
        {
            "step": step,
            "prompt": [{"role": "system", "content": "be short"}, {"role": "user", "content": HOSTILE}],
            "completion": f"{row}: {HOSTILE} é",
            "length": 3 + row,
            "stop_reason": "eos",
            "right": None if row == 0 else 1.0,  # a reward that did not apply
            "reward": row / 2,
            "advantage": row - 0.5,
            "seen": {"digits": [1, 2]},
        }
        for row in range(2)
    ]


def tracked_run(folder: Path, **others) -> TrackedRun:
    folder.mkdir(exist_ok=True)
    return dataclasses.replace(TrackedRun("mine", "ours", folder, SETTINGS, 0, {}), **others)


class Recording(AbstractTracker[list]):
    """Writes down what it is told; fails where it is told to."""

    told: list
    fails_at: str = ""

    def _note(self, session, *what):
        session.append(what)
        if what[0] == self.fails_at:
            raise RuntimeError(f"no {what[0]}\n  today")

    def begin(self, run):
        self._note(self.told, "begin", run.done, dict(run.kept))
        return Begun(self.told, {"id": "7"}, "nowhere")

    def step(self, session, step, metrics):
        self._note(session, "step", step, dict(metrics))

    def completions(self, session, step, table):
        self._note(session, "completions", step, table.columns)

    def summary(self, session, values):
        self._note(session, "summary", dict(values))

    def end(self, session, outcome):
        self._note(session, "end", outcome)


@pytest.fixture
def recording(monkeypatch):
    """Replaces the trackers of these names, and returns what each is told."""

    def install(**fails_at: str) -> dict[str, list]:
        told: dict[str, list] = {name: [] for name in fails_at}
        kinds = {name: TrackerKind(Recording(told[name], fails), (), "") for name, fails in fails_at.items()}
        monkeypatch.setattr(_trackers, "TRACKER_KINDS", kinds)
        return told

    return install


def follow(run: TrackedRun, names, steps, warnings: list, summary=None) -> None:
    with begun_trackers(names, run, 2, lambda text: None, warnings.append) as trackers:
        for step in steps:
            metrics = {"step": step, "reward": step / 10, "gap": float("nan"), "odd name?": 1, "flag": True}
            trackers.step(step, metrics, completions(step))
        trackers.summary({"summary/reward_last": 0.5, "summary/none": None} if summary is None else summary)


def test_what_a_tracker_is_told(recording, tmp_path):
    """Finite numbers alone; a table every so many steps; where it began and how it ended; what it wanted kept."""
    (told,) = recording(wandb="").values()
    run = tracked_run(tmp_path / "run")
    follow(run, ["wandb"], [1, 2], [])
    columns = ("step", "prompt", "completion", "length", "stop_reason", "right", "reward", "advantage", "seen")
    assert told == [
        ("begin", 0, {}),
        ("step", 1, {"step": 1, "reward": 0.1, "odd name?": 1}),
        ("step", 2, {"step": 2, "reward": 0.2, "odd name?": 1}),
        ("completions", 2, columns),
        ("summary", {"summary/reward_last": 0.5}),
        ("end", Outcome.FINISHED),
    ]
    told.clear()
    with pytest.raises(ZeroDivisionError), begun_trackers(["wandb"], run, 0, print, print) as trackers:
        trackers.step(2, {"eval/reward": 1.0}, completions(2))
        trackers.step(2, {})  # no evaluation was due
        raise ZeroDivisionError
    assert told == [("begin", 0, {"id": "7"}), ("step", 2, {"eval/reward": 1.0}), ("end", Outcome.FAILED)]
    with pytest.raises(Stopped), begun_trackers(["wandb"], run, 0, print, print):
        raise Stopped(signal.SIGTERM, at_once=False)
    assert told[-1] == ("end", Outcome.STOPPED)


@pytest.mark.parametrize("fails_at", ["begin", "step", "completions", "summary", "end"])
def test_a_tracker_that_fails_is_off_and_the_others_go_on(fails_at, recording, tmp_path):
    told, warnings = recording(wandb=fails_at, mlflow=""), []
    follow(tracked_run(tmp_path / "run"), ["wandb", "mlflow"], [1, 2, 3, 4], warnings)
    assert [what[0] for what in told["wandb"]].count(fails_at) == 1 and told["wandb"][-1][0] == fails_at
    assert [what[0] for what in told["mlflow"]].count("step") == 4 and told["mlflow"][-1] == ("end", Outcome.FINISHED)
    (warning,) = warnings
    assert warning.startswith("the tracker wandb has failed and is off") and warning.endswith(f"no {fails_at} today")


def test_what_is_kept_of_others_stays(recording, tmp_path):
    """A tracker that is left out for a while goes on in its run later; damage begins a new one."""
    told = recording(wandb="", mlflow="")
    run = tracked_run(tmp_path / "run")
    for names in (["wandb"], ["mlflow"], ["wandb"]):
        follow(run, names, [], [])
    assert [what for what in told["wandb"] if what[0] == "begin"] == [("begin", 0, {}), ("begin", 0, {"id": "7"})]
    (run.folder / "trackers.json").write_text('{"wandb": 3}')
    follow(run, ["wandb"], [], [])
    assert told["wandb"][-3:][0] == ("begin", 0, {})


def test_no_tracker_leaves_nothing(tmp_path):
    follow(tracked_run(tmp_path / "run"), [], [1, 2], [])
    assert list((tmp_path / "run").iterdir()) == []


def test_the_table_of_completions():
    table = completion_table(completions(3) * 40)
    assert len(table.rows) == 64 and len(table.columns) == 9
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["prompt"] == f"system: be short\nuser: {HOSTILE}" and row["right"] is None
    assert row["seen"] == '{"digits": [1, 2]}'
    assert completion_table([]) == (("step",), [])


# Configuration.


def test_names_in_a_configuration():
    assert load_config(overrides=["tracking=wandb"]).tracking == ["wandb"]
    assert load_config(overrides=["tracking=wandb, mlflow,wandb"]).tracking == ["wandb", "mlflow"]
    assert load_config(overrides=['tracking=["tensorboard"]']).tracking == ["tensorboard"]
    assert load_config(overrides=["tracking=none"]).tracking == []
    with pytest.raises(ConfigError, match="no such tracker. Did you mean 'wandb'"):
        load_config(overrides=["tracking=wandbb"])
    with pytest.raises(ConfigError, match=r"report_to: set tracking, as in tracking = \[\"wandb\"\]"):
        load_config(overrides=["report_to=wandb"])


def test_trackers_may_change_on_resuming():
    old = load_config()
    check_resume(old, load_config(overrides=["tracking=wandb", "log_completions_steps=0"]))
    with pytest.raises(ConfigError, match="project was"):
        check_resume(old, load_config(overrides=["project=other"]))


def test_each_name_is_told_how_to_be_installed(monkeypatch):
    """Nothing is imported to find out, and a folder that is called like a package is none."""
    check_trackers(TRACKER_KINDS)
    assert {kind.package for kind in TRACKER_KINDS.values()} == {"tensorboard", "wandb", "trackio", "mlflow-skinny"}
    monkeypatch.setattr(_kinds.importlib.util, "find_spec", lambda name: None)
    for name, kind in TRACKER_KINDS.items():
        with pytest.raises(UserError, match=f"tracking names {name}, .* pip install {kind.package}, or take it out"):
            check_trackers([name])


def test_a_folder_called_like_a_package_is_none(monkeypatch, tmp_path):
    """wandb leaves a folder `wandb` where it runs, and Python takes it for a package."""
    (tmp_path / "left_by_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert _kinds.importlib.util.find_spec("left_by_a_run") is not None
    assert not _kinds._is_installed("left_by_a_run")
    assert not _kinds._is_installed("no_such_package.inside")


def test_what_is_not_installed_stops_before_anything_is_loaded(monkeypatch, capsys, tiny_folder, tmp_path):
    find = _kinds.importlib.util.find_spec
    monkeypatch.setattr(_kinds.importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    flags = [text for setting in tiny_settings(tiny_folder, tmp_path / "run") for text in ("--set", setting)]
    for dry in ([], ["--dry-run"]):
        code, out, err = main_like(monkeypatch, capsys, "run", *flags, "--set", "tracking=tensorboard,trackio", *dry)
        assert code == 2 and "pip install trackio" in err and "Traceback" not in err and "loading" not in out
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", TRACKER_KINDS)
def test_nothing_is_imported_without_being_named(name):
    """Where a tracker's file is imported, its package is not: it need not be there."""
    source = inspect.getsource(sys.modules[type(TRACKER_KINDS[name].tracker).__module__])
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    named = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module or "" for node in imports if isinstance(node, ast.ImportFrom) and not node.level]
    assert {module.partition(".")[0] for module in named} <= sys.stdlib_module_names


# The real ones.


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory) -> Iterator[Path]:
    """Where trackio keeps its database; it asks once, when it is first imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """As on a machine where no tracker has been set up."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")  # put back as it was at the end, whatever is set in between


def killed_and_resumed(name: str, folder: Path) -> TrackedRun:
    """Three steps and a kill, of which the third is not in a checkpoint; then the third again, and the fourth."""
    run, warnings = tracked_run(folder), []
    with begun_trackers([name], run, 2, print, warnings.append) as trackers:
        for step in (1, 2, 3):
            metrics = {"step": step, "reward": step / 10, "spec/rate_pos_0": 0.5, "odd name?": 2}
            trackers.step(step, metrics, completions(step))
        if name == "wandb":  # its own process would go on, and keep the run's id; its folders are named by the second
            trackers.end(Outcome.FAILED)
            time.sleep(1.1)
        trackers._open.clear()  # nobody says goodbye
    follow(dataclasses.replace(run, done=2), [name], [3, 4], warnings)
    assert warnings == []
    return run


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    run = killed_and_resumed("tensorboard", tmp_path / "run")
    events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    # The third step is there once: what a kill had let through is dropped by whoever reads.
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("reward")] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert [e.step for e in events.Scalars("spec/rate_pos_0")] == [1, 2]
    assert events.Scalars("summary/reward_last")[0].value == 0.5
    texts = events.Tensors("completions")
    assert [text.step for text in texts] == [2, 4]
    shown = texts[0].tensor_proto.string_val[0].decode()
    assert shown.startswith("| step | prompt | completion |") and len(shown.splitlines()) == 4
    assert "<script>" not in shown and "a&#124;b<br>&lt;script&gt;" in shown
    assert "| grpo.beta | 0.1 |" in events.Tensors("config")[0].tensor_proto.string_val[0].decode()
    (about,) = [
        plugin_data_pb2.HParamsPluginData.FromString(content)
        for tag, content in events.PluginTagToContent("hparams").items()
        if tag.endswith("session_start_info")
    ]
    hparams = about.session_start_info.hparams
    assert hparams["grpo.beta"].number_value == 0.1 and hparams["draft.adaptive"].bool_value is True


def wandb_records(path: Path):
    """The records of wandb's own file, in its own messages: a log as LevelDB's, in blocks, after seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0:
            break
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def wandb_history(folder: Path) -> tuple[list[dict], dict, dict]:
    """What was logged, the configuration and the summary of one offline run."""
    (path,) = folder.glob("*.wandb")
    history, config, summary = [], {}, {}
    value = lambda item: (item.key or "/".join(item.nested_key), json.loads(item.value_json))
    for record in wandb_records(path):
        history += [dict(value(item) for item in record.history.item)] if record.history.item else []
        config |= dict(value(item) for item in record.run.config.update)
        summary |= dict(value(item) for item in record.summary.update)
    return history, config, summary


def test_wandb_offline(nobody, tmp_path):
    import wandb

    run = killed_and_resumed("wandb", tmp_path / "run")
    wandb.teardown()  # as at the end of a process: all is in the files then
    folders = sorted((run.folder / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    # One id, so that both parts become one run when they are sent; what is there twice has the same step, and value.
    (known,) = {folder.name.rpartition("-")[2] for folder in folders}
    assert json.loads((run.folder / "trackers.json").read_text()) == {"wandb": {"id": known}}
    parts = [wandb_history(folder) for folder in folders]
    told = [(row["step"], row["reward"]) for history, _, _ in parts for row in history if "reward" in row]
    assert told == [(1, 0.1), (2, 0.2), (3, 0.3), (3, 0.3), (4, 0.4)]
    history, config, summary = parts[1]
    assert config["grpo.beta"] == 0.1 and config["draft.adaptive"] is True
    assert summary["summary/reward_last"] == 0.5
    (path,) = [row["completions/path"] for row in history if "completions/path" in row]
    kept = json.loads((folders[1] / "files" / path).read_text(encoding="utf-8"))
    assert kept["columns"][:3] == ["step", "prompt", "completion"] and len(kept["data"]) == 2
    assert kept["data"][1][2] == f"1: {HOSTILE} é" and kept["data"][0][5] is None


def test_wandb_without_a_network(nobody, monkeypatch, tmp_path):
    """Somebody is logged in, but no server answers: the run is recorded offline all the same."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    said, warnings, run = [], [], tracked_run(tmp_path / "run")
    with begun_trackers(["wandb"], run, 0, said.append, warnings.append) as trackers:
        trackers.step(1, {"step": 1, "reward": 0.5})
    assert warnings == [] and len(said) == 1 and "offline; send it with: wandb sync" in said[0]
    assert list((run.folder / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio(trackio_folder, tmp_path):
    from trackio.sqlite_storage import SQLiteStorage

    run = killed_and_resumed("trackio", tmp_path / "run")
    assert list(trackio_folder.glob("ours*.db"))
    kept = json.loads((run.folder / "trackers.json").read_text())["trackio"]
    name = kept["name"]
    assert kept["project"] == "ours" and name.startswith("mine-") and SQLiteStorage.get_runs("ours") == [name]
    logs = SQLiteStorage.get_logs("ours", name)
    rewards = [(log["step"], log["reward"]) for log in logs if "reward" in log]
    assert sorted(set(rewards)) == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert [log["summary/reward_last"] for log in logs if "summary/reward_last" in log] == [0.5]
    tables = {log["step"]: log["completions"]["_value"] for log in logs if "completions" in log}
    assert list(tables) == [2, 4] and tables[2][1]["completion"] == f"1: {HOSTILE} é"
    assert SQLiteStorage.get_run_config("ours", name)["grpo.beta"] == 0.1
    follow(tracked_run(tmp_path / "other"), ["trackio"], [1], [])  # of the same name: another run
    assert len(SQLiteStorage.get_runs("ours")) == 2 and SQLiteStorage.get_logs("ours", name) == logs


def test_mlflow_in_files(nobody, tmp_path):
    from mlflow import MlflowClient

    run = killed_and_resumed("mlflow", tmp_path / "run")
    client = MlflowClient(tracking_uri=(run.folder / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("ours")
    (found,) = client.search_runs([experiment.experiment_id])  # pyright: ignore[reportOptionalMemberAccess]
    assert found.info.run_name == "mine" and found.info.status == "FINISHED"
    assert found.data.params["grpo.beta"] == "0.1" and found.data.params["reward.functions"] == "['a', 'b']"
    history = client.get_metric_history(found.info.run_id, "reward")
    assert sorted({(m.step, m.value) for m in history}) == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert found.data.metrics["summary/reward_last"] == 0.5 and found.data.metrics["odd name_"] == 1
    folder = Path(client.download_artifacts(found.info.run_id, "completions", str(tmp_path)))
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002.json", "step-000004.json"]
    table = json.loads((folder / "step-000004.json").read_text(encoding="utf-8"))
    assert table["data"][1][table["columns"].index("completion")] == f"1: {HOSTILE} é"


def test_a_whole_run(nobody, tiny_folder, tmp_path, monkeypatch):
    """Interrupted and resumed: TensorBoard has each step once, with the values of metrics.jsonl, and how it went."""
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ("steps=4", "tracking=tensorboard,wandb", "log_completions_steps=2", "compare=false", "run_name=tiny")
    config = tiny_config(tiny_folder, tmp_path / "run", *settings)
    said = Console(file=open(tmp_path / "said", "w+"), width=200, force_terminal=False)
    monkeypatch.setenv("TINY_RUN_INTERRUPT_AT", "1")
    with pytest.raises(Stopped):
        train.run(config, console=said)
    monkeypatch.delenv("TINY_RUN_INTERRUPT_AT")
    folder = train.run(config, resume=True, console=said).folder
    metrics = read_records(folder / "metrics.jsonl")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for key in ("reward", "entropy", "spec/acceptance_length", "most_even", "time/step"):
        told = [(event.step, event.value) for event in events.Scalars(key)]
        assert told == [(m["step"], pytest.approx(m[key], rel=1e-6)) for m in metrics], key
    assert [event.step for event in events.Tensors("completions")] == [2, 4]
    assert events.Scalars("summary/reward_last")[0].value > 0 and events.Scalars("summary/seconds")[0].value > 0
    wandb.teardown()
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    told = [row["step"] for part in runs for row in wandb_history(part)[0] if "reward" in row]
    assert told == [1, 2, 3, 4] and wandb_history(runs[0])[1]["grpo.num_generations"] == 4
    said.file.seek(0)
    printed = said.file.read()
    assert printed.count("tracking  tensorboard: tensorboard --logdir") == 2 and "has failed" not in printed
