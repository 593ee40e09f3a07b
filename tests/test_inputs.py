"""What a run is computed from and does not keep: told on resuming if it is not what it was."""

import json
import warnings

import pytest
from tiny_run import main_like, tiny_config, tiny_folder as tiny_folder

from eqx_specgrpo._types import padding_step
from eqx_specgrpo.config import RunConfig, dump_config
from eqx_specgrpo.config._check import load_task_and_rewards
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.records import RunFolder, changed_inputs, fingerprint_file
from eqx_specgrpo.tasks import Arithmetic, load_task
from eqx_specgrpo.train._inputs import ChangedInputWarning, check_inputs, run_inputs

ROWS = [json.dumps({"prompt": f"{number} + 1 =", "answer": number + 1}) for number in range(4)]
CLASS = """
from eqx_specgrpo.drafts import MedusaHeads

def make(target, max_length, *, key):
    return MedusaHeads.fresh(target.hidden_size, max_length)
"""


def test_fingerprints_of_files(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"abc")
    one = fingerprint_file(small)
    assert one["bytes"] == 3 and one["path"] == str(small)
    assert fingerprint_file(small) == one
    small.write_bytes(b"abd")
    assert fingerprint_file(small)["digest"] != one["digest"]
    # Beyond 16 MiB samples are read: what moves all weights is seen, and so are the last bytes and the size.
    with open(large, "wb") as file:
        file.truncate(40 << 20)
    seen = {fingerprint_file(large)["digest"]}
    for place in (0, (16 << 20) - 1, 16 << 20, (40 << 20) - 1, 40 << 20):
        with open(large, "r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.add(fingerprint_file(large)["digest"])
    assert len(seen) == 6
    with pytest.raises(UserError, match="none cannot be read: No such file"):
        fingerprint_file(tmp_path / "none")


def test_fingerprints_of_tasks(tmp_path):
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text("\n".join(ROWS))
    other.write_text("\n".join([*ROWS[:3], ROWS[3].replace("answer", "result")]))
    first, again, another = (load_task(str(path), seed, {}) for path, seed in ((one, 0), (one, 1), (other, 0)))
    assert first.fingerprint() == again.fingerprint() != another.fingerprint()
    assert Arithmetic(seed=0).fingerprint() == Arithmetic(seed=0).fingerprint() != Arithmetic(seed=1).fingerprint()
    assert Arithmetic(size=2).fingerprint()


def test_names_that_changed():
    then = {"a": {"digest": "1", "path": "x"}, "b": {"digest": "2"}, "c": {"digest": "3"}}
    now = {"a": {"digest": "1", "path": "y"}, "b": {"digest": "4"}, "d": {"digest": "5"}}
    assert changed_inputs(then, now) == ["b", "c", "d"]


@pytest.fixture
def stopped(tiny_folder, tmp_path):
    """The folder of a run that has done two steps, its configuration, and a copy of the model."""
    model, data = tmp_path / "model", tmp_path / "p.jsonl"
    model.mkdir()
    for path in tiny_folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    data.write_text("\n".join(ROWS))
    (tmp_path / "own.py").write_text(CLASS)
    out = tmp_path / "run"
    settings = [f"task.name={data}", f"draft.kind={tmp_path / 'own.py'}:make", "draft.warmup=0"]
    config = tiny_config(model, out, *settings)
    # `task.prompt` is of another task.
    config = RunConfig.model_validate(
        {**config.model_dump(exclude={"task"}), "task": {"name": str(data)}},
    )
    with RunFolder(out) as folder:
        folder.write_config(dump_config(config))
        folder.write_inputs(0, run_inputs(config, load_task_and_rewards(config)[0]))
        folder.append_metrics({"step": 0})
    (out / "checkpoints" / "step-000002").mkdir(parents=True)
    return out, config, tmp_path


def compared(stopped, *, accept: bool = False, beta: float = 0.0) -> tuple[str, str]:
    """Warnings and the error of going on."""
    out, config, _ = stopped
    config = config.model_copy(update={"grpo": config.grpo.model_copy(update={"beta": beta})})
    now = run_inputs(config, load_task_and_rewards(config)[0])
    with RunFolder(out, resume=True) as folder, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        error = ""
        try:
            check_inputs(folder, config, now, accept=accept)
        except UserError as raised:
            error = str(raised)
    assert all(issubclass(warning.category, ChangedInputWarning) for warning in told)
    return "\n".join(str(warning.message) for warning in told), error


def test_nothing_changed(stopped):
    assert compared(stopped) == ("", "")
    _, _, place = stopped
    # What is in the folder of a model and has no part in it.
    (place / "model" / "trainer_state.json").write_text("{}")
    assert compared(stopped) == ("", "")
    record = json.loads((stopped[0] / "inputs.jsonl").read_text())["inputs"]
    assert set(record) == {"task", "reward 1", "draft"} | {
        f"model: {name}"
        for name in ("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json")
    }  # fmt: skip
    assert record["task"]["items"] == 4 and record["draft"]["path"] == str(place / "own.py")


def test_a_mended_item_is_a_warning(stopped):
    (stopped[2] / "p.jsonl").write_text("\n".join([*ROWS[:3], ROWS[3].replace("3 + 1", "three + 1")]))
    told, error = compared(stopped)
    assert "the items of the task" in told and "p.jsonl have changed since the run did its first 2 steps" in told
    assert not error


def test_an_item_more_is_an_error_unless_accepted(stopped):
    (stopped[2] / "p.jsonl").write_text("\n".join([*ROWS, ROWS[0]]))
    told, error = compared(stopped)
    assert not told and "had 4 items and has 5 now" in error and "--accept-changes" in error
    told, error = compared(stopped, accept=True)
    assert not error and "had 4 items and has 5 now" in told


def test_code_of_the_users_own_is_a_warning(stopped):
    for name, words in (("model/reward.py", "reward 1"), ("own.py", "draft")):
        path = stopped[2] / name
        path.write_text(path.read_text() + "\n# mended\n")
        told, error = compared(stopped)
        assert f"the file of {words}, {path}, has changed" in told and not error


def test_the_starting_model(stopped):
    model = stopped[2] / "model"
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes() + b" ")
    told, error = compared(stopped)
    assert "model.safetensors, of the starting model, has changed" in told and "without grpo.beta" in told and not error
    told, error = compared(stopped, beta=0.1)
    assert "the KL would be measured from another model" in error and "--accept-changes" in error
    (model / "chat_template.jinja").unlink()
    (model / "added_tokens.json").write_text("{}")
    told, error = compared(stopped)
    assert "chat_template.jinja, of the starting model, is gone" in error and "added_tokens.json" in error
    assert error.count("\n") == 2, "all of them are told, and once what to do"


def test_a_run_of_an_earlier_version(stopped):
    (stopped[0] / "inputs.jsonl").unlink()
    (stopped[2] / "p.jsonl").write_text(ROWS[0])
    told, error = compared(stopped)
    assert "does not say what its first 2 steps were computed from" in told and not error


def test_steps_that_are_done_again_count_as_not_done(stopped):
    """Only what the steps that are kept were computed from is compared with."""
    out, _, place = stopped
    (place / "p.jsonl").write_text("\n".join(ROWS[:2]))
    with RunFolder(out, resume=True) as folder:
        folder.write_inputs(2, {"task": {"digest": "of steps that were lost"}})
    assert "had 4 items and has 2 now" in compared(stopped)[1]
    (out / "checkpoints" / "step-000002").rmdir()
    assert compared(stopped) == ("", ""), "without a checkpoint the run begins anew"
    with RunFolder(out, resume=True) as folder:
        (out / "inputs.jsonl").write_text('{"from_step": 0}\n')
        with pytest.raises(UserError, match="inputs.jsonl has a line without inputs: remove it"):
            folder.read_inputs(1)


def test_the_command_line(stopped, monkeypatch, capsys):
    """Refused before anything is loaded; accepted, it comes to the checkpoint, which is empty here."""
    out, _, place = stopped
    (place / "p.jsonl").write_text("\n".join(ROWS[:3]))
    before = (out / "inputs.jsonl").read_bytes()
    code, _, err = main_like(monkeypatch, capsys, "run", "--resume", "--out", str(out))
    assert code == 2 and "had 4 items and has 3 now" in err and err.count("error:") == 2 and "Traceback" not in err
    code, _, err = main_like(monkeypatch, capsys, "run", "--resume", "--accept-changes", "--out", str(out))
    assert code == 2 and "warning: the task" in err and "meta.json cannot be read" in err and "Traceback" not in err
    assert (out / "inputs.jsonl").read_bytes() == before


def test_prompts_have_few_widths():
    padded = {longest: -(-longest // padding_step(longest)) * padding_step(longest) for longest in range(1, 2049)}
    assert sorted(set(padded.values())) == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(width - longest < max(32, width / 3) for longest, width in padded.items())
