"""The draft of whole runs: its fingerprint, its lessons, and that nothing but lessons changes it."""

import json

import pytest
from rich.console import Console
from tiny_run import tiny_config, tiny_folder as tiny_folder

import eqx_specgrpo.train._draft_lessons as draft_lessons
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.records import latest_checkpoint, read_records
from eqx_specgrpo.train import run
from eqx_specgrpo.train._lesson_budget import LessonState

SETTINGS = (
    "save_steps=2",
    "compare=false",
    "grpo.lr_scheduler_type=constant",
    "eval.task=arithmetic",
    "eval.limit=2",
    "eval.samples=1",
)


def train(config, resume=False, **options):
    return run(config, resume=resume, console=Console(quiet=True), **options)


def fingerprints(folder):
    return [record["draft/fingerprint"] for record in read_records(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def straight(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft") / "straight"
    train(tiny_config(tiny_folder, folder, "steps=4", "eval.every=4", *SETTINGS))
    return folder


def test_every_step_has_a_fingerprint_of_its_own(straight):
    assert len(set(fingerprints(straight))) == 4
    assert all(record["draft/lessons"] == 1 for record in read_records(straight / "metrics.jsonl"))


def test_evaluations_and_a_resume_leave_the_draft_as_it_is(straight, tiny_folder, tmp_path):
    folder = tmp_path / "other"
    train(tiny_config(tiny_folder, folder, "steps=2", "eval.every=1", *SETTINGS))
    train(tiny_config(tiny_folder, folder, "steps=4", "eval.every=1", *SETTINGS), resume=True)
    assert fingerprints(folder) == fingerprints(straight)


def test_a_draft_that_stands_still_under_its_lessons_ends_the_run(tiny_folder, tmp_path, monkeypatch):
    """An update that is lost: the very draft that there was comes back, with a gradient and a learning rate."""
    monkeypatch.setattr(
        draft_lessons, "update_draft", lambda parts, state, *_: (state, {"draft/loss": 1.0, "draft/grad_norm": 1.0})
    )
    with pytest.raises(UserError, match="step 1: 1 lesson changed nothing of the draft"):
        train(tiny_config(tiny_folder, tmp_path / "run", "steps=2", "compare=false"))


def test_a_checkpoint_with_an_older_draft_is_noticed(straight, tiny_folder, tmp_path):
    folder = tmp_path / "mixed"
    settings = ("save_steps=1", "compare=false", "save_total_limit=9")
    train(tiny_config(tiny_folder, folder, *settings, "steps=2"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[1]["draft/fingerprint"], lines[0]["draft/fingerprint"] = (line["draft/fingerprint"] for line in lines)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="step 3 would guess with another .* than step 2 left .*, but that of step 1"):
        train(tiny_config(tiny_folder, folder, *settings, "steps=3"), resume=True)


def test_what_decides_on_lessons_goes_on_after_a_resume(tiny_folder, tmp_path):
    folder = tmp_path / "adaptive"
    settings = ("save_steps=1", "compare=false", "draft.adaptive=true")
    train(tiny_config(tiny_folder, folder, *settings, "steps=2"))
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    numbers = json.loads((checkpoint / "meta.json").read_text())["meta"]["lessons"]
    state = LessonState.of_numbers(numbers)
    assert state.step == 2 and state.lesson_seconds > 0 and state.found > 0
    train(tiny_config(tiny_folder, folder, *settings, "steps=3"), resume=True)
    records = read_records(folder / "metrics.jsonl")
    assert all({"draft/seconds_spent", "draft/lessons", "draft/fingerprint"} <= set(record) for record in records)
    later = latest_checkpoint(folder)
    assert later is not None and json.loads((later / "meta.json").read_text())["meta"]["lessons"]["step"] == 3
