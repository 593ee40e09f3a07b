"""The command line as a user meets it: what `generate` prints, and one sentence with exit code 2 for bad input."""

import errno
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import SafetensorError
from tiny_run import (
    CONTEXT,
    as_flags,
    main_like,
    tiny_config,
    tiny_folder as tiny_folder,
    tiny_model,
    tiny_settings,
    tiny_tokenizer,
    write_tiny_folder,
)

from eqx_specgrpo.config import dump_config, load_config
from eqx_specgrpo.drafts import MedusaHeads, save_draft
from eqx_specgrpo.models import save_model
from eqx_specgrpo.records import latest_checkpoint, read_records
from eqx_specgrpo.train import generate_text

# Plain decoding, one step: few programs to compile, the same for all tests.
PLAIN = ("steps=1", "draft.mode=off")


@pytest.fixture
def specgrpo(monkeypatch, capsys):
    """Runs the command line in this process: exit code, stdout and stderr."""
    return lambda *arguments: main_like(monkeypatch, capsys, *map(str, arguments))


@pytest.fixture
def refused(specgrpo):
    """Runs it on bad input: the one sentence it says."""

    def run(*arguments) -> str:
        code, out, err = specgrpo(*arguments)
        assert code == 2, (code, out, err)
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert "Traceback" not in out + err
        return err

    return run


def start(folder: Path, out: Path, *settings: str) -> list[str]:
    return ["run", *as_flags(tiny_settings(folder, out, *PLAIN, *settings))]


@pytest.mark.parametrize(
    "setting, words",
    [
        ("grpo.lerning_rate=1e-5", ("grpo.lerning_rate", "did you mean", "grpo.learning_rate")),
        ("drft.length=2", ("drft.length", "did you mean", "draft.length")),
        ("task.hihg=9", ("hihg", "high")),
        ("grpo.temperature=0", ("grpo.temperature", "greater than 0")),
        ("grpo.loss_type=ppo", ("grpo.loss_type", '"dapo"')),
        ("steps=many", ("steps", "many", "whole number")),
        ("grpo.num_generations=1", ("grpo.num_generations", "at least 2", "group of one")),
        ("grpo.gradient_accumulation_steps=3", ("grpo.gradient_accumulation_steps = 3", "divisor")),
        ("draft.length=4", ("draft.length = 4", "draft.max_length = 3")),
        ("task.name=arithmetics", ("arithmetics", "arithmetic")),
        ("task.low=90", ("low", "high")),
        ("reward.functions=['no_such_reward']", ("no_such_reward",)),
        ("reward.weights=[1.0, 2.0]", ("reward.weights", "2 values for 1 function")),
        ("grpo.beta", ("grpo.beta", "key=value")),
    ],
)
def test_bad_settings(setting, words, refused, tiny_folder, tmp_path):
    message = refused(*start(tiny_folder, tmp_path / "run", setting))
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()  # Nothing was begun.


def test_bad_models(refused, tiny_folder, tmp_path):
    out = tmp_path / "run"
    message = refused(*start(tiny_folder, out), "--model", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message and "does not exist" in message

    bare = tmp_path / "bare"
    save_model(tiny_model(), bare)
    message = refused(*start(tiny_folder, out), "--model", bare)
    assert f"{bare} has no tokenizer" in message and "tokenizer.json" in message

    plain = write_tiny_folder(tmp_path / "plain", chat_template=None)
    message = refused(*start(plain, out))
    assert "no chat template" in message and "plain text" in message

    # Each of them may be mended and started again in the same folder, without --resume.
    assert "no chat template" in refused(*start(plain, out))
    assert not (out / "metrics.jsonl").exists() and not (out / "checkpoints").exists()


def test_a_model_by_name_without_a_network(tmp_path):
    """In a process of its own, from the shell's side: exit code, one sentence, nothing else on stderr."""
    arguments = ["run", "--model", "someone/some-model", "--out", str(tmp_path / "run")]
    finished = subprocess.run(
        [sys.executable, "-c", "from eqx_specgrpo.cli import main; main()", *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1, finished.stderr
    assert "'someone/some-model'" in finished.stderr and "network" in finished.stderr


@pytest.mark.parametrize(
    "lines, words",
    [
        (b'{"prompt": "1 + 1="}\n{"prompt": "1 +\n', ("line 2", "not JSON")),
        (b'{"prompt": "1 + 1="}\n{"question": "1 + 2="}\n', ("line 2", "no `prompt`", "'question'")),
        (b"\n", ("is empty",)),
        (b"", ("is empty",)),
        (b'{"prompt": "1"}\n{"prompt": "' + b"1 + " * CONTEXT + b'"}\n', ("tokens", "context", str(CONTEXT), "item ")),
        (b'{"prompt": [{"role": "user"}]}\n', ("line 1", "message 0", "'content'")),
    ],
    ids=["not json", "no prompt", "blank", "empty", "too long", "half a message"],
)
def test_bad_task_files(lines, words, refused, tiny_folder, tmp_path):
    task = tmp_path / "task.jsonl"
    task.write_bytes(lines)
    # Two prompts a step: the second is reached in the first step, whatever the order.
    settings = [text for text in tiny_settings(tiny_folder, tmp_path / "run", *PLAIN) if not text.startswith("task.")]
    message = refused("run", *as_flags(settings), "--task", task)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


REWARDS = """
def raises(completions, **kwargs):
    return [1 / (i - 5) for i in range(len(completions))] if len(completions) > 1 else [1 / 0]

def one_short(completions, **kwargs):
    return [1.0] * (len(completions) - 1)

def not_a_number(completions, **kwargs):
    return [0.5, 1.0, float("nan"), *[0.0] * (len(completions) - 3)]

def wants_a_column(completions, solution, **kwargs):
    return [0.0] * len(completions)
"""


def test_bad_rewards(refused, specgrpo, tiny_folder, tmp_path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text(REWARDS)
    out = tmp_path / "run"
    for function, words in {
        "raises": ("ZeroDivisionError", "item 0 of 8", "="),
        "one_short": ("returned 7 rewards, expected 8",),
        "not_a_number": ("nan for item 2 of 8",),
        "wants_a_column": ("needs 'solution'", "'answer'"),
    }.items():
        # The same folder each time: a run that has not done a step does not block it.
        message = refused(*start(tiny_folder, out), "--reward", f"{rewards}:{function}")
        assert f"the reward '{function}'" in message and all(word in message for word in words), message
        assert "rewards.py, line" in message or function != "raises"
    assert "no function 'rises'. Did you mean 'raises'" in refused(
        *start(tiny_folder, out), "--reward", f"{rewards}:rises"
    )
    assert not (out / "metrics.jsonl").exists()
    # Mended, it runs; and then the folder is taken.
    code, _, err = specgrpo(*start(tiny_folder, out))
    assert code == 0, err
    assert len(read_records(out / "metrics.jsonl")) == 1
    everything = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    message = refused(*start(tiny_folder, out))
    assert f"the folder {out} already holds a run" in message and "--resume" in message
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == everything


@pytest.mark.parametrize(
    "setting, words",
    [
        ("draft.kind=hydra", ("is of kind 'medusa', but draft.kind is 'hydra'", "draft.kind=medusa")),
        ("draft.max_length=4", ("has a max_length of 3, but draft.max_length is 4", "draft.max_length=3")),
        ("draft.length=9", ("draft.length = 9", "at most 8")),
        ("draft.length=5", ("draft.length = 5 is more than draft.max_length = 3", "or name another draft")),
        ("draft.mode=off", ("names a draft, but draft.mode says that there is none",)),
    ],
)
def test_a_saved_draft_that_is_not_what_was_asked_for(setting, words, refused, tiny_folder, tiny_draft, tmp_path):
    settings = [text for text in tiny_settings(tiny_folder, tmp_path / "run") if not text.startswith("draft.max_")]
    for dry in ([], ["--dry-run"]):
        message = refused("run", *as_flags([*settings, "steps=1", setting]), "--draft", tiny_draft, *dry)
        assert all(word in message for word in words), message


def test_a_file_without_the_name_of_a_class(refused, tmp_path):
    (tmp_path / "mine.py").write_text("class MyDraft: ...")
    message = refused("run", "--draft", tmp_path / "mine.py", "--out", tmp_path / "run")
    assert f"say which class of it is the draft, as in {tmp_path / 'mine.py'}:MyDraft" in message


def test_bad_resumes(refused, tiny_folder, tmp_path):
    message = refused("run", "--resume", "--out", tmp_path / "none")
    assert "there is no run to resume" in message and str(tmp_path / "none") in message
    assert not (tmp_path / "none").exists()

    out = tmp_path / "run"
    out.mkdir()
    (out / "config.toml").write_text(dump_config(tiny_config(tiny_folder, out, *PLAIN)))
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for change, words in {
        "grpo.beta=0.5": ("grpo.beta was 0.0", "is 0.5 now"),
        "draft.mode=online": ('draft.mode was "off"', '"online"'),
        "task.high=90": ("task.high was unset", "is 90 now"),
        "seed=3": ("seed was 0",),
    }.items():
        message = refused("run", "--resume", "--out", out, "--set", change)
        assert all(word in message for word in words), message
    message = refused("run", "--resume", "--out", out, "--model", tmp_path)
    assert "model.path was" in message
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}
    assert after == before

    message = refused("run", "--dry-run", tmp_path / "none.toml")
    assert "there is no configuration file" in message
    (tmp_path / "broken.toml").write_text("[grpo\n")
    assert "is not valid TOML" in refused("run", tmp_path / "broken.toml")
    message = refused("run", "--out", tmp_path / "broken.toml")
    assert "is a file, not a folder" in message


def test_steps_is_the_total(refused, specgrpo, tiny_folder, tmp_path):
    out = tmp_path / "run"
    code, _, err = specgrpo(*start(tiny_folder, out, "grpo.learning_rate=1e-3", "steps=2"))
    assert code == 0, err
    message = refused("run", "--resume", "--out", out, "--steps", 1)
    assert "steps = 1" in message and "has done 2" in message
    assert len(read_records(out / "metrics.jsonl")) == 2
    code, text, err = specgrpo("run", "--resume", "--out", out, "--steps", 6)
    assert code == 0, err
    assert "goes back up: it was 0.0005 at step 2 of 2 and is 0.000667 at step 3 of 6" in text
    assert [record["step"] for record in read_records(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert load_config(out / "config.toml").steps == 6


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_full_disk(refused, specgrpo, monkeypatch, tiny_folder, tmp_path):
    """Wherever it fills up, the run can go on from its last checkpoint once there is room."""
    out = tmp_path / "run"
    arguments = [*start(tiny_folder, out, "save_steps=1", "grpo.lr_scheduler_type=constant")]
    code, _, err = specgrpo(*arguments)
    assert code == 0, err
    resume = ["run", "--resume", "--out", out, "--steps", 2]
    for place, failure, words in (
        ("records._folder._write_all", full, ("completions.jsonl could not be written", "--resume")),
        ("records._checkpoint.write_tensor_file", full, ("the checkpoint of step 2 could not be written", "--resume")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"eqx_specgrpo.{place}", failure)
            message = refused(*resume)
        assert "No space left on device" in message and all(word in message for word in words), message
        assert latest_checkpoint(out) == out / "checkpoints" / "step-000001"
    with monkeypatch.context() as patch:
        patch.setattr("eqx_specgrpo.models._checkpoint.write_tensors", full)
        message = refused(*resume)
    assert "the disk is full" in message and str(out / "policy") in message
    # All steps are done and kept; the policy of the first part of the run is still there, whole.
    assert latest_checkpoint(out) == out / "checkpoints" / "step-000002"
    assert (out / "policy" / "model.safetensors").is_file()
    before = (out / "policy" / "model.safetensors").read_bytes()
    code, _, err = specgrpo(*resume)
    assert code == 0, err
    assert [record["step"] for record in read_records(out / "metrics.jsonl")] == [1, 2]
    assert (out / "policy" / "model.safetensors").read_bytes() != before


def test_full_disk_at_the_draft(monkeypatch, tmp_path):
    monkeypatch.setattr("eqx_specgrpo.drafts._save.save_file", full_in_rust)
    with pytest.raises(ValueError, match="the draft could not be written to .*No space left on device"):
        save_draft(tmp_path / "draft", MedusaHeads.fresh(32, 3), tiny_model(), "tiny")
    monkeypatch.undo()
    monkeypatch.setattr("eqx_specgrpo.drafts._save.os.fsync", full)
    with pytest.raises(ValueError, match="the draft could not be written to .*No space left on device"):
        save_draft(tmp_path / "draft", MedusaHeads.fresh(32, 3), tiny_model(), "tiny")
    assert not list((tmp_path / "draft").iterdir()), "half a file would be in the way of trying again"


def test_dry_run_starts_nothing(specgrpo, tiny_folder, tmp_path):
    out = tmp_path / "run"
    arguments = [*as_flags(tiny_settings(tiny_folder, out, "grpo.epsilon_high=0.28")), "--seed", "7"]
    code, text, err = specgrpo("run", "--dry-run", *arguments)
    assert (code, err) == (0, "") and not out.exists()
    assert tomllib.loads(text)["grpo"]["epsilon_high"] == 0.28
    path = tmp_path / "config.toml"
    path.write_text(text)
    assert load_config(path) == tiny_config(tiny_folder, out, "grpo.epsilon_high=0.28", "seed=7")
    # What is read back resolves to itself, comments and all.
    assert specgrpo("run", "--dry-run", path) == (0, text, "")


def test_dry_run_finds_what_would_stop_the_run(refused, monkeypatch, tiny_folder, tiny_draft, tmp_path):
    """Before any weights are read."""
    monkeypatch.setattr("eqx_specgrpo.models._weights.fill_model", None)
    settings = tiny_settings(tiny_folder, tmp_path / "run")

    def says(*arguments):
        return refused("run", "--dry-run", *as_flags(settings), *arguments)

    bare = tmp_path / "bare"
    bare.mkdir()
    assert f"{bare / 'config.json'}" in says("--model", bare)
    with monkeypatch.context() as patch:
        patch.setattr("eqx_specgrpo.models._locate.hf_hub_download", full)
        assert "downloading the model 'no-such-org/model' failed" in says("--model", "no-such-org/model")
    (tmp_path / "wants.py").write_text("def solved(completions, solution, **kwargs):\n    return [0.0]\n")
    message = says("--reward", f"{tmp_path / 'wants.py'}:solved")
    assert "'solved' needs 'solution', which the task has no column for" in message
    other = tmp_path / "other"
    save_draft(other, MedusaHeads.fresh(64, 3), tiny_model(hidden_size=64), "another")
    assert "'another' with hidden_size 64, but this target's is 32" in says("--draft", other)
    usage = shutil.disk_usage(tmp_path)._replace(free=200_000)
    monkeypatch.setattr("eqx_specgrpo.config._check.shutil.disk_usage", lambda path: usage)
    assert "0.2 MB free, but this model's checkpoints need " in says()
    monkeypatch.setattr("eqx_specgrpo.config._check.os.access", lambda path, mode: False)
    assert "cannot be written" in says()
    assert not (tmp_path / "run").exists()


def test_bench_asks_for_what_it_draws_with_first(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("eqx_specgrpo.bench.bench", None)
    assert "pip install matplotlib" in refused("bench", "--plot", tmp_path / "a.png")


@pytest.mark.parametrize("spelling", ["--max-new", "--new", "--max-new-tokens"])
@pytest.mark.parametrize("command", [("generate", "--prompt", "a"), ("distill", "--out", "b"), ("bench",)])
def test_other_names_of_the_longest_completion_are_answered(command, spelling, refused):
    assert "write --max-completion-length 16" in refused(*command, spelling, 16)


FIELDS = {"prompt_tokens", "tokens", "text", "logprobs", "stop_reason", "acceptance_length", "target_forwards"}


@pytest.fixture(scope="module")
def tiny_draft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft") / "draft"
    save_draft(folder, MedusaHeads.fresh(32, 3), tiny_model(), "tiny")
    return folder


def generate(specgrpo, *arguments) -> list[dict]:
    code, out, err = specgrpo("generate", "--json", *arguments)
    assert (code, err) == (0, ""), err
    completions = [json.loads(line) for line in out.splitlines()]
    for completion in completions:
        assert set(completion) == FIELDS
        count = len(completion["tokens"])
        assert len(completion["logprobs"]) == count and all(logprob <= 0 for logprob in completion["logprobs"])
        assert completion["text"] == tiny_tokenizer().decode(completion["tokens"])
        eos = tiny_tokenizer().eos_ids
        assert (completion["stop_reason"] == "eos") == (completion["tokens"][-1] in eos)
        assert completion["stop_reason"] in ("eos", "length", "stop") and not set(completion["tokens"][:-1]) & set(eos)
        # The prompt's own pass emits the first token; the others come from the passes that are counted.
        forwards = completion["target_forwards"]
        vain = 8 if completion["stop_reason"] == "stop" else 0  # until the host looks
        assert (count - 1) / 4 <= forwards <= count - 1 + vain
        assert completion["acceptance_length"] == pytest.approx((count - 1) / forwards if forwards else 1.0)
    return completions


def test_generate(specgrpo, tiny_folder, tiny_draft):
    common = ["--model", tiny_folder, "--prompt", "12 + 34=", "--max-completion-length", 16]
    (plain,) = generate(specgrpo, *common, "--temperature", 0)
    assert plain["prompt_tokens"] == tiny_tokenizer().encode("12 + 34=")
    assert plain["acceptance_length"] == 1 and plain["target_forwards"] == len(plain["tokens"]) - 1
    assert len(plain["tokens"]) == 16 and plain["stop_reason"] == "length"
    # Greedy decoding gives the same tokens with a draft, in fewer passes.
    (drafted,) = generate(specgrpo, *common, "--temperature", 0, "--draft", tiny_draft)
    assert drafted["tokens"] == plain["tokens"]
    assert drafted["logprobs"] == pytest.approx(plain["logprobs"], abs=1e-4)

    several = generate(specgrpo, *common, "--num-generations", 3, "--seed", 5, "--draft", tiny_draft, "--chat")
    assert len(several) == 3 and len({tuple(completion["tokens"]) for completion in several}) == 3
    messages = [{"role": "user", "content": "12 + 34="}]
    assert all(completion["prompt_tokens"] == tiny_tokenizer().encode_prompt(messages) for completion in several)
    assert generate(specgrpo, *common, "--num-generations", 3, "--seed", 5, "--draft", tiny_draft, "--chat") == several
    assert generate(specgrpo, *common, "--num-generations", 3, "--seed", 6, "--draft", tiny_draft, "--chat") != several

    file = io.StringIO()
    prompt, console = "12 + 34=", Console(file=file, width=200)
    (same,) = generate_text(prompt, model=str(tiny_folder), max_completion_length=16, temperature=0.0, console=console)
    assert same["tokens"] == plain["tokens"]
    assert file.getvalue().startswith(f"loading {tiny_folder} ...") and "\ndecoding ..." in file.getvalue()

    code, out, err = specgrpo("generate", *common, "--temperature", 0)
    assert code == 0 and out == plain["text"] + "\n"
    assert "16 tokens, 15 target passes" in err and "stopped by length" in err

    # A text of two tokens that is in it ends it there, with a draft and without.
    tokenizer = tiny_tokenizer()
    at = next(n for n in range(4, 15) if len(tokenizer.decode(plain["tokens"][n : n + 2])) == 2)
    ending = tokenizer.decode(plain["tokens"][at : at + 2])
    texts = [tokenizer.decode(plain["tokens"][:count]) for count in range(17)]
    first = next(count for count, text in enumerate(texts) if ending in text)
    for more in ((), ("--draft", tiny_draft)):
        (stopped,) = generate(specgrpo, *common, "--temperature", 0, "--stop", ending, *more)
        assert stopped["tokens"] == plain["tokens"][:first] and stopped["stop_reason"] == "stop"


def test_bad_generate(refused, specgrpo, tiny_folder, tiny_draft, tmp_path):
    common = ["generate", "--model", tiny_folder]
    assert "--prompt is empty" in refused(*common, "--prompt", "")
    message = refused(*common, "--prompt", "1" * CONTEXT)
    assert f"{CONTEXT} tokens" in message and "context" in message
    assert "does not exist" in refused("generate", "--model", tmp_path / "none", "--prompt", "1")
    plain = write_tiny_folder(tmp_path / "plain", chat_template=None)
    assert "no chat template" in refused("generate", "--model", plain, "--prompt", "1", "--chat")

    message = refused(*common, "--prompt", "1", "--draft", tmp_path)
    assert str(tmp_path / "draft.json") in message
    save_draft(tmp_path / "other", MedusaHeads.fresh(16, 3), tiny_model(hidden_size=16), "another model")
    message = refused(*common, "--prompt", "1", "--draft", tmp_path / "other")
    assert "'another model'" in message and "16" in message and "32" in message
    weights = tiny_draft / "draft.safetensors"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "draft.json").write_bytes((tiny_draft / "draft.json").read_bytes())
    (broken / "draft.safetensors").write_bytes(weights.read_bytes()[:-8])
    assert "is truncated or corrupt" in refused(*common, "--prompt", "1", "--draft", broken)

    assert "write --num-generations 3" in refused(*common, "--prompt", "1", "--num", 3)
    assert "--stop is empty" in refused(*common, "--prompt", "1", "--stop", "")
    for table, words in (("{think", "no table of TOML"), ("3", "write a table"), ("{think = 1}", "asks for nothing")):
        assert words in refused(*common, "--prompt", "1", "--chat", "--chat-template-kwargs", table)
    assert "model.revision = 'v1' is of a model by name" in refused(*common, "--prompt", "1", "--revision", "v1")
    for option, value in (
        ("--temperature", "-1"),
        ("--top-p", "1.5"),
        ("--num-generations", "0"),
        ("--max-completion-length", "0"),
    ):
        code, _, err = specgrpo(*common, "--prompt", "1", option, value)
        assert code == 2 and option in err and "Traceback" not in err


def test_help_and_version_need_no_jax():
    program = (
        "import sys\nfrom eqx_specgrpo.cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'jax' not in sys.modules, 'jax was imported'"
    )
    for argument, words in (("--help", ("run", "generate", "plot")), ("--version", (".",))):
        finished = subprocess.run([sys.executable, "-c", program, argument], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        assert all(word in finished.stdout for word in words)


def test_a_stop_at_once_says_how_to_go_on(specgrpo, tiny_folder, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("eqx_specgrpo.train._loop._warm_up", interrupted)
    arguments = as_flags(tiny_settings(tiny_folder, tmp_path / "a run"))
    code, _, err = specgrpo("run", *arguments)
    assert code == 130
    assert err.endswith(f"go on with: specgrpo run --resume --out '{tmp_path}/a run'\n")


# Takes and gives back 256 MB, twice; says how many pages the second time has to map anew.
TAKE_TWICE = """
import resource

import numpy as np

from eqx_specgrpo.runtime import keep_freed_memory

keep_freed_memory()


def take():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**28, np.int8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


take()
print(take())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
@pytest.mark.parametrize(
    "environment, kept",
    [
        ({"JAX_PLATFORMS": "cpu"}, True),
        ({"JAX_PLATFORMS": "cuda,cpu"}, False),
        ({"JAX_PLATFORMS": "cpu", "MALLOC_TOP_PAD_": "0"}, False),
        ({"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}, False),
    ],
)
def test_freed_memory_is_kept_on_a_cpu_unless_malloc_was_set_up(environment, kept):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    output = subprocess.run(
        [sys.executable, "-c", TAKE_TWICE], env=clean | environment, capture_output=True, text=True, check=True
    ).stdout
    # A page is 4 KB, or 2 MB where the system gives large ones.
    assert int(output) < 16 if kept else int(output) > 64
