"""A run as a whole, on a checkpoint of a few kilobytes: killed, interrupted, failed, resumed, and read by others."""

import dataclasses
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import torch
from helpers import make_rounds_long
from rich.console import Console
from safetensors.numpy import load_file
from tiny_run import (
    as_flags,
    main_like,
    tiny_config,
    tiny_folder as tiny_folder,
    tiny_model,
    tiny_settings,
    tiny_tokenizer,
    write_tiny_folder,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from eqx_specgrpo import train
from eqx_specgrpo._types import ScoredRollouts
from eqx_specgrpo.config import RunConfig, load_config
from eqx_specgrpo.config._parts import make_draft, make_parts
from eqx_specgrpo.decoding import (
    AdaptiveLength,
    CompileAtOnce,
    CompileSparingly,
    FixedLength,
    SegmentObservation,
    decode,
)
from eqx_specgrpo.drafts import MedusaHeads, NoDraft, load_draft
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.grpo import LossSettings, NonFiniteError, compute_copy, make_policy_loss, make_update_batch
from eqx_specgrpo.layout import OneProcess
from eqx_specgrpo.models import load_pretrained, sequence_features
from eqx_specgrpo.records import RunFolder, latest_checkpoint, read_records
from eqx_specgrpo.runtime import Memory, _compile as compile_module
from eqx_specgrpo.train import UpdatePlanner, _loop as train_loop, _sample as train_sample
from eqx_specgrpo.train._draft_step import draft_rows
from eqx_specgrpo.train._segments import SegmentLog
from eqx_specgrpo.train._state import RunState

MEASURED = ("time/", "compile/", "spec/tokens_per_second", "spec/seconds", "draft/seconds")  # differs from run to run

METRICS = {
    # TRL's names, and the steps.
    "step", "num_tokens", "reward", "reward_std", "frac_reward_zero_std", "rewards/even/mean", "rewards/even/std",
    "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/mean_terminated_length", "completions/clipped_ratio",
    "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
    "loss", "grad_norm", "learning_rate", "entropy",
    "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
    # design.md's.
    "spec/acceptance_rate", "spec/acceptance_length", "spec/acceptance_rate_pos_0", "spec/acceptance_rate_pos_1",
    "spec/acceptance_rate_pos_2", "spec/draft_length", "spec/target_forwards", "draft/loss", "draft/grad_norm",
    "time/rollout", "time/reward", "time/update", "time/draft", "time/step", "compile/count",
}  # fmt: skip


def run(config: RunConfig, resume: bool = False) -> str:
    """Runs in this process; what was printed."""
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    with console.capture() as capture:
        result = train.run(config, resume=resume, console=console)
    assert result.folder == Path(config.out)
    return capture.get()


@pytest.fixture(scope="module")
def straight(tiny_folder, tmp_path_factory):
    """Six steps in one go: the folder, and what was printed."""
    jax.clear_caches()  # so that compilations are among it, whichever tests came before
    out = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_module, "_WORTH_TELLING", 0.05)  # a quick machine compiles these in under half a second
        return out, run(tiny_config(tiny_folder, out))


def results(folder: Path) -> dict[str, object]:
    """All that a run has made, but for what was measured with a clock."""
    found: dict[str, object] = {
        "metrics": [
            {name: value for name, value in record.items() if not name.startswith(MEASURED)}
            for record in read_records(folder / "metrics.jsonl")
        ],
        "completions": (folder / "completions.jsonl").read_bytes(),
    }
    for part in ("policy", "draft", "checkpoints/step-000006"):
        for path in sorted((folder / part).glob("*.safetensors")):
            found[f"{part}/{path.name}"] = path.read_bytes()
    return found


def assert_same_as(straight: Path, other: Path) -> None:
    expected, found = results(straight), results(other)
    assert set(found) == set(expected) and len(found) == 2 + 1 + 1 + 5
    assert len(expected["metrics"]) == 6  # pyright: ignore[reportArgumentType]
    for name, value in expected.items():
        assert found[name] == value, name


def test_killed_and_resumed_is_bitwise_a_straight_run(straight, tiny_folder, tmp_path, monkeypatch, capsys):
    """SIGKILL after four steps, of which three are in a checkpoint: the fourth is done again."""
    out = tmp_path / "run"
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            "from eqx_specgrpo.cli import main; main()",
            "run",
            *as_flags(tiny_settings(tiny_folder, out)),
        ],
        env=os.environ | {"TINY_RUN_KILL_AT": "4"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [record["step"] for record in read_records(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert latest_checkpoint(out) == out / "checkpoints" / "step-000003"
    assert not (out / "policy").exists()
    code, _, err = main_like(monkeypatch, capsys, "run", "--resume", "--out", str(out))
    assert code == 0, err
    assert_same_as(straight[0], out)


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(straight, tiny_folder, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "a run [bold]"
    with monkeypatch.context() as patch:
        patch.setenv("TINY_RUN_INTERRUPT_AT", "1")
        code, text, err = main_like(patch, capsys, "run", *as_flags(tiny_settings(tiny_folder, out)))
    assert code == 130 and err == "" and "Traceback" not in text
    assert signal.getsignal(signal.SIGINT) is before
    assert "Ctrl-C" in text
    assert [record["step"] for record in read_records(out / "metrics.jsonl")] == [1, 2]
    assert latest_checkpoint(out) == out / "checkpoints" / "step-000002"
    (line,) = [line for line in text.splitlines() if line.startswith("Stopped by Ctrl-C after step 2 of 6;")]
    command = shlex.split(line.partition("Go on with: ")[2])
    assert command == ["specgrpo", "run", "--resume", "--out", str(out)]
    code, _, err = main_like(monkeypatch, capsys, *command[1:])
    assert code == 0, err
    assert_same_as(straight[0], out)


def test_sigterm_leaves_the_rollouts_and_keeps_the_warm_up(straight, tiny_folder, tmp_path, monkeypatch, capsys):
    """A kill may follow. The step is done again; before the first one there is what the draft has learned."""
    out, updates, decoding = tmp_path / "run", [], train_loop.RunProgress.decoding

    def terminate(self, progress):
        decoding(self, progress)
        if updates:  # in the first step, after the warm-up
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train_loop.RunProgress, "warmed", lambda self, update, *_: update == 2 and updates.append(update))
        patch.setattr(train_loop.RunProgress, "decoding", terminate)
        patch.setattr(train_sample, "judge", None)  # it does not come to that
        # Waiting rows make a second segment, before which the step is left.
        code, text, err = main_like(patch, capsys, "run", *as_flags(tiny_settings(tiny_folder, out)))
    assert code == 143 and err == "" and "Stopped by SIGTERM after step 0 of 6" in text, err
    assert latest_checkpoint(out) == out / "checkpoints" / "step-000000"
    code, text, err = main_like(monkeypatch, capsys, "run", "--resume", "--out", str(out))
    assert code == 0 and "warming up" not in text and "in all, of 2 starts" in text, err
    assert_same_as(straight[0], out)


def test_second_ctrl_c_stops_at_once_and_loses_no_checkpoint(tiny_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setenv("TINY_RUN_INTERRUPT_AT", "1")
    monkeypatch.setenv("TINY_RUN_INTERRUPTS", "2")
    code, text, err = main_like(monkeypatch, capsys, "run", *as_flags(tiny_settings(tiny_folder, out, "save_steps=1")))
    assert code != 0 and "Traceback" not in text + err
    assert latest_checkpoint(out) == out / "checkpoints" / "step-000001"
    with RunFolder(out, resume=True):  # The lock is free.
        pass


def test_an_error_in_a_reward_loses_no_step(straight, tiny_folder, tmp_path, monkeypatch, capsys):
    """Two steps are done when the reward raises, and no checkpoint was due yet."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setenv("TINY_RUN_RAISE_AT", "2")
        code, _, err = main_like(patch, capsys, "run", *as_flags(tiny_settings(tiny_folder, out)))
    assert code == 2 and err.count("error:") == 1 and "Traceback" not in err
    assert "the reward 'even' raised ValueError: out of order" in err and "item 0 of 8" in err
    assert latest_checkpoint(out) == out / "checkpoints" / "step-000002"
    code, _, err = main_like(monkeypatch, capsys, "run", "--resume", "--out", str(out))
    assert code == 0, err
    assert_same_as(straight[0], out)


def test_run_folder(straight, tiny_folder):
    out, _ = straight
    names = {path.name for path in out.iterdir()} - {".lock"}
    assert names == {
        "config.toml",
        "metrics.jsonl",
        "completions.jsonl",
        "machine.jsonl",
        "inputs.jsonl",
        "times.jsonl",
        "comparison.json",
        "checkpoints",
        "policy",
        "draft",
    }
    assert load_config(out / "config.toml") == tiny_config(tiny_folder, out)
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-000003", "step-000006"}

    metrics = read_records(out / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, 7))
    for record in metrics:
        assert not METRICS - set(record)
        assert all(isinstance(value, int | float) for value in record.values())
        assert 1 <= record["spec/acceptance_length"] <= 4 and 0 <= record["spec/acceptance_rate"] <= 1
        # The smoke alarm: decoder and trainer agree on the probability of every token.
        assert record["sampling/sampling_logp_difference/max"] < 1e-4
        assert record["draft/loss"] > 0 and record["grad_norm"] > 0

    completions = read_records(out / "completions.jsonl")
    assert len(completions) == 6 * 8
    for step in range(6):
        rows = [record for record in completions if record["step"] == step + 1]
        np.testing.assert_allclose(np.mean([row["reward"] for row in rows]), metrics[step]["reward"], rtol=1e-6)
        np.testing.assert_allclose(
            np.mean([row["length"] for row in rows]), metrics[step]["completions/mean_length"], rtol=1e-6
        )
        assert len({json.dumps(row["prompt"]) for row in rows}) == 2
        assert abs(sum(row["advantage"] for row in rows)) < 1e-4
        # What the reward function logged.
        assert [row["num_even"] / row["length"] for row in rows] == pytest.approx([row["even"] for row in rows])
        assert metrics[step]["most_even"] == max(row["num_even"] for row in rows)
    assert {"prompt", "completion", "length", "stop_reason", "even", "reward", "advantage"} <= set(completions[0])


def test_policy_and_draft_load_elsewhere(straight, tiny_folder):
    out, _ = straight
    model, tokenizer = load_pretrained(out / "policy")
    start, _ = load_pretrained(tiny_folder)
    assert not np.array_equal(model.embedding, start.embedding)
    tokens = np.asarray(jr.randint(jr.key(0), (2, 40), 0, model.vocab_size))
    ours = eqx.filter_jit(lambda m, t: m.unembed(sequence_features(m, t).last))(model, jnp.asarray(tokens))
    with torch.no_grad():
        theirs = (
            AutoModelForCausalLM.from_pretrained(out / "policy").eval()(torch.tensor(tokens.astype(np.int64))).logits
        )
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-3, rtol=1e-4)
    messages = [{"role": "user", "content": "12 + 34="}]
    other = AutoTokenizer.from_pretrained(out / "policy")
    encoded = other.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded == tokenizer.encode_prompt(messages)
    assert other.eos_token_id in tokenizer.eos_ids

    draft = load_draft(out / "draft", model)
    assert isinstance(draft, MedusaHeads) and draft.max_length == 3
    saved = load_file(out / "checkpoints" / "step-000006" / "draft.safetensors")
    np.testing.assert_array_equal(draft.weight, saved["weight"])
    assert np.abs(saved["weight"]).max() > 1e-3  # It has learned something.


def test_summary_is_printed(straight):
    out, text = straight
    for words in (
        "step 1/6",
        "step 6/6",
        "warm-up 2/2",
        "Summary of 6 steps",
        "Reward",
        "Acceptance length",
    ):
        assert words in text, words
    assert re.search(r"compiled .*_segment.* in \d+\.\d s", text)
    assert re.search(r"step 6/6  reward \d\.\d+ .*acceptance length \d\.\d\d .*tokens/s", text)
    for phase in ("loading", "warm-up", "rollout", "reward", "update", "draft", "checkpoints", "saving", "comparison"):
        assert re.search(rf"  {phase} +\d+\.\d +\d+% +\d+\.\d", text), phase
    assert "Against plain decoding" in text and re.search(r"\d+\.\d\dx", text)
    assert re.search(r"  rollouts \(by the comparison\) +[+-]\d+\.\d", text)
    (start,) = read_records(out / "times.jsonl")
    assert sum(start["seconds"].values()) == pytest.approx(start["total"], abs=0.1)
    assert 0 < sum(start["compiling"].values()) < start["total"]
    (comparison,) = read_records(out / "comparison.json")
    assert comparison["steps"] == 6 and comparison["plain"] > 0 and comparison["compiling"] > 0
    assert str(out) in text


def test_the_header_says_what_is_about_to_run(straight):
    _, text = straight
    for words in (
        r"model     \S+: \d[\d,]+ parameters, float32 on 1 x cpu",
        r"task      arithmetic, rewards even\n",
        r"rollouts  6 steps of 2 prompts x 4 completions, each of up to 16 tokens",
        r"draft     medusa \([\d,]+ parameters\), learns at every step; guesses 3 tokens a round, verifier \w+",
        r"compiled  (\d+ programs are in the cache /|at every start anew)",
    ):
        assert re.search(words, text), words
    assert text.index("compiled  ") < text.index("warming up")


@pytest.fixture
def told(monkeypatch) -> list:
    """What the length controller is told after training, in turn."""
    heard = []

    def hear(self, state, expected_acceptance):
        heard.append(expected_acceptance)
        return state

    monkeypatch.setattr(FixedLength, "after_training", hear)
    return heard


@pytest.mark.parametrize("mode", ["frozen", "off"])
def test_a_draft_that_does_not_learn(mode, straight, tiny_folder, tmp_path, told):
    settings = ["steps=1", f"draft.mode={mode}"]
    if mode == "frozen":
        settings.append(f"draft.path={straight[0] / 'draft'}")
    text = run(tiny_config(tiny_folder, tmp_path / "run", *settings))
    (record,) = read_records(tmp_path / "run" / "metrics.jsonl")
    assert "draft/loss" not in record and record["grad_norm"] > 0
    assert told and set(told) == {None}
    draft = tmp_path / "run" / "draft" / "draft.safetensors"
    if mode == "frozen":
        assert draft.read_bytes() == (straight[0] / "draft" / "draft.safetensors").read_bytes()
        assert record["spec/draft_length"] == 3
        assert "Against plain decoding" in text
    else:
        assert not draft.exists() and "Against plain decoding" not in text
        assert record["spec/acceptance_length"] == 1 and record["spec/acceptance_rate"] == 0


def test_the_length_controller_is_told_what_each_step_found(tiny_folder, tmp_path, told):
    """On the completions that were just decoded, by the first lesson on them."""
    run(tiny_config(tiny_folder, tmp_path / "run", "steps=3", "compare=false", "draft.warmup=0"))
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    found = [[record[f"draft/expected_acceptance_pos_{position}"] for position in range(3)] for record in records]
    assert told[0] is None and [one[:3] for one in told[1:3]] == found[:2]


def test_a_run_whose_length_adapts(tiny_folder, tmp_path, monkeypatch):
    """As runs are by default. It drafts, says what it expected
    of that, and under `Coupled` its completions are those of plain decoding."""
    make_rounds_long(monkeypatch)
    clocks, after_training, choose = [], AdaptiveLength.after_training, AdaptiveLength.choose
    compilers = []

    def logged(name, call):
        return lambda self, state, *given: clocks.append((name, state.clock)) or call(self, state, *given)

    def log(length, compiler):
        compilers.append(compiler)
        return SegmentLog(length, compiler)

    monkeypatch.setattr("eqx_specgrpo.train._loop.SegmentLog", log)
    monkeypatch.setattr(AdaptiveLength, "choose", logged("choose", choose))
    monkeypatch.setattr(AdaptiveLength, "after_training", logged("learned", after_training))
    settings = ["steps=3", "draft.verifier=coupled", "draft.max_length=1", "draft.length=1"]
    text = run(tiny_config(tiny_folder, tmp_path / "adaptive", *settings, "draft.adaptive=true"))
    run(tiny_config(tiny_folder, tmp_path / "plain", *settings, "draft.mode=off", "draft.adaptive=true"))
    assert list(map(type, compilers)) == [CompileSparingly, CompileAtOnce], "nothing else may depend on times"
    records = read_records(tmp_path / "adaptive" / "metrics.jsonl")
    rounds = [sum(record.get(f"spec/rounds_length_{length}", 0) for record in records) for length in (0, 1)]
    assert min(rounds) > 0, rounds
    assert any(record.get("spec/expected_acceptance_length", 0) > 1 for record in records)
    assert "Draft length" in text
    found = [(tmp_path / name / "completions.jsonl").read_bytes() for name in ("adaptive", "plain")]
    assert found[0] == found[1]
    steps = [index for index, (name, _) in enumerate(clocks) if name == "learned"]
    before, after = [[clocks[index + more][1] for index in steps[:-1]] for more in (0, 1)]
    assert before == after and before[-1] > 0, "what it has learned is kept from step to step"


def copied(tree):
    return jax.tree.map(lambda x: jnp.array(x) if eqx.is_array(x) else x, tree)


def bits(*trees) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(trees, eqx.is_array))]


class Segments(SegmentLog):
    """Remembers the most rows of a segment."""

    most_rows = 0

    def __call__(self, observation: SegmentObservation, length_state):
        self.most_rows = max(self.most_rows, observation.rows)
        super().__call__(observation, length_state)


def test_rows_that_wait_take_the_places_of_finished_ones(tiny_folder, tmp_path):
    """`grpo.max_rows` bounds the rows of a segment, and changes no completion."""
    policy, tokenizer = load_pretrained(tiny_folder)
    found, most = {}, {}
    for rows in ("none", "3"):
        config = tiny_config(tiny_folder, tmp_path, "draft.mode=off", f"grpo.max_rows={rows}")
        parts = make_parts(config, tokenizer, make_draft(config.draft, policy))
        _, prompts = train.next_examples(parts.task, tokenizer, policy, 0, 2, 16)
        segments = Segments(parts.length)
        found[rows] = train.roll_out(
            parts,
            compute_copy(policy, "float32"),
            make_draft(config.draft, policy),
            prompts,
            jr.key(0),
            segments=segments,
        )
        most[rows] = segments.most_rows
    assert most == {"none": 8, "3": 3}
    np.testing.assert_array_equal(found["3"].tokens, found["none"].tokens)
    assert len(set(found["none"].lengths.tolist())) > 1


def test_the_draft_leaves_the_policy_alone(tiny_folder, tmp_path):
    """Decision 7: with replayed rollouts, three steps are the same to the bit, draft learning, frozen or off."""
    start, tokenizer = load_pretrained(tiny_folder)
    recorded: list[ScoredRollouts] = []
    trajectories = {}
    for mode in ("online", "frozen", "off"):
        config = tiny_config(tiny_folder, tmp_path, f"draft.mode={mode}")
        draft = make_draft(config.draft, start)
        parts = make_parts(config, tokenizer, draft)
        state = RunState.fresh(copied(start), draft, parts.policy_optimizer, parts.draft_optimizer)
        heads_before = bits(state.draft)
        trajectories[mode] = []
        for step in range(3):
            if mode == "online":
                examples, prompts = train.next_examples(parts.task, tokenizer, state.policy, 2 * step, 2, 16)
                rollouts = train.roll_out(
                    parts, compute_copy(state.policy, "float32"), state.draft, prompts, jr.key(step)
                )
                recorded.append(train.score(parts, examples, rollouts, step)[0])
            policy, optimizer, weights, features, batch, metrics, _ = train.update_policy(
                parts, state.policy, state.policy_optimizer, None, recorded[step], 3e-3, step
            )
            state = RunState(policy, optimizer, state.draft, state.draft_optimizer, state.draft_acceptance)
            if config.draft.learns:
                rows = draft_rows(jr.key(100 + step), 8, 0.5)
                lengths = recorded[step].rollouts.lengths
                state, _ = train.update_draft(parts, state, weights, features, batch, lengths, rows, step)
            trajectories[mode].append((bits(state.policy, state.policy_optimizer), metrics))
        changed = [not np.array_equal(a, b) for a, b in zip(heads_before, bits(state.draft), strict=True)]
        assert changed == {"online": [True, True], "frozen": [False, False], "off": []}[mode]
    moved = [not np.array_equal(a, b) for a, b in zip(bits(start), trajectories["off"][0][0], strict=False)]
    assert any(moved)
    for mode in ("frozen", "off"):
        for (found, metrics), (expected, expected_metrics) in zip(
            trajectories[mode], trajectories["online"], strict=True
        ):
            assert metrics == expected_metrics
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def scored():
    rollouts = decode(
        tiny_model(), [[5, 9, 11], [7, 3, 2, 8, 1]], key=jr.key(0), max_new_tokens=16, samples=4, smallest_bucket=8,
        eos_ids=range(26),
    )  # fmt: skip
    assert len(set(rollouts.lengths)) > 2
    rewards = np.array([1.0, 0, 0, 1, 0, 1, 1, 1])
    advantages = np.array([1.0, -1, -1, 1, -1.5, 0.5, 0.5, 0.5])
    return ScoredRollouts(rollouts, rewards[:, None], rewards, advantages)


def test_inner_iterations_reference_and_accumulation_together(scored, tiny_folder, tmp_path):
    config = tiny_config(
        tiny_folder, tmp_path, "grpo.num_iterations=2", "grpo.beta=0.04", "grpo.gradient_accumulation_steps=2"
    )
    parts = make_parts(config, tiny_tokenizer(), MedusaHeads.fresh(32, 3))
    weights_after = []
    for loss_type in ("dapo", "grpo", "bnpo", "dr_grpo"):
        loss = LossSettings(beta=0.04, chunk=24, loss=make_policy_loss(loss_type))
        parts = eqx.tree_at(lambda p: p.loss, parts, loss)
        policy = tiny_model()
        state = RunState.fresh(policy, MedusaHeads.fresh(32, 3), parts.policy_optimizer, parts.draft_optimizer)
        reference = compute_copy(policy, "float32")
        before = [array.copy() for array in bits(reference)]
        policy, optimizer, weights, features, batch, metrics, _ = train.update_policy(
            parts, state.policy, state.policy_optimizer, reference, scored, 1e-2, 0
        )
        # The reference is held through donated updates, and has not moved.
        for a, b in zip(before, bits(reference), strict=True):
            np.testing.assert_array_equal(a, b)
        assert metrics["sampling/sampling_logp_difference/max"] < 1e-4  # of the first iteration
        assert metrics["kl"] > 1e-4  # of the second, after the first has moved the policy
        assert metrics["clip_ratio/region_mean"] > 0
        assert int(optax_count(optimizer)) == 2
        # Features and weights are those of the last forward, for all rows: the draft learns from a pair that fits.
        again = eqx.filter_jit(sequence_features)(weights, jnp.asarray(batch.tokens))
        ends = batch.prompt_lengths + batch.completion_mask.sum(1)
        valid = np.arange(batch.tokens.shape[1])[None] < ends[:, None]
        last = np.asarray(features.features.last)[features.slots]
        np.testing.assert_allclose(last[valid], again.last[valid], atol=1e-5)
        assert not np.array_equal(weights.embedding, before[0])
        assert not np.array_equal(weights.embedding, policy.embedding)
        weights_after.append(np.asarray(policy.embedding))
    assert all(not np.array_equal(weights_after[0], other) for other in weights_after[1:])


def test_an_update_is_planned_by_the_memory_that_there_was(scored, tiny_folder, tmp_path):
    """And a line says so, again only when it changes; whether there is a draft does not matter."""
    batch = make_update_batch(scored.rollouts, scored.advantages)
    little, much = Memory(1 << 10, 1 << 10, is_shared=False), Memory(1 << 40, 1 << 40, is_shared=True)
    auto = tiny_config(tiny_folder, tmp_path)
    for config, memory, expected in (
        (auto, little, True),
        (auto, much, False),
        (auto, None, False),
        (tiny_config(tiny_folder, tmp_path, "grpo.gradient_checkpointing=false"), little, False),
        (tiny_config(tiny_folder, tmp_path, "grpo.gradient_checkpointing=true"), much, True),
    ):
        parts = make_parts(config, tiny_tokenizer(), MedusaHeads.fresh(32, 3))
        said = []
        planner = UpdatePlanner(memory, said.append)
        choices = [planner.choose(parts, tiny_model(), batch) for _ in range(2)]
        assert choices[0] == choices[1] and choices[0].gradient_checkpointing == expected
        assert said == [choices[0].reason]
        without = eqx.tree_at(lambda p: p.loss, parts, replace_fn=lambda loss: dataclasses.replace(loss, layers=(0, 1)))
        assert planner.choose(without, tiny_model(), batch) == choices[0]


def test_a_resumed_run_plans_by_the_memory_that_it_began_with(tiny_folder, tmp_path, monkeypatch):
    then, now = Memory(100, 50, is_shared=True), Memory(100, 20, is_shared=True)
    monkeypatch.setattr(train_loop, "device_memory", lambda: now)
    state = RunState.fresh(tiny_model(), NoDraft(), optax.sgd(1.0), optax.sgd(1.0))
    with RunFolder(tmp_path / "run", False) as folder:
        assert train_loop._memory_at_start(folder, 0, state, OneProcess()) == now
        folder.write_machine(0, {"memory": then._asdict()})
        assert train_loop._memory_at_start(folder, 3, state, OneProcess()) == then
        folder.write_machine(0, {"memory": None})
        assert train_loop._memory_at_start(folder, 3, state, OneProcess()) is None
        folder.write_machine(0, {"cores": 2})  # as an earlier version wrote
        assert train_loop._memory_at_start(folder, 3, state, OneProcess()) == now


def optax_count(state):
    (count,) = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.integer)]
    return count


def test_a_whole_run_with_the_same_options(tmp_path, told):
    settings = ["grpo.num_iterations=2", "grpo.beta=0.04", "grpo.gradient_accumulation_steps=2", "steps=2",
                "grpo.num_generations=2", "draft.fraction=1.0",
                "draft.loss=hybrid", "model.dtype=bfloat16",
                "grpo.scale_rewards=batch", "grpo.delta=1.5", "grpo.epsilon_high=0.28"]  # fmt: skip
    folder = write_tiny_folder(tmp_path / "model", num_layers=1)
    run(tiny_config(folder, tmp_path / "run", *settings))
    first, second = read_records(tmp_path / "run" / "metrics.jsonl")
    assert first["kl"] > 0  # of the second inner iteration
    assert len(told) == 3 and max(told[0]) > 0, "warm-up, and both steps"
    for lesson, record in zip(told[1:], (first, second), strict=True):
        assert lesson == pytest.approx([record[f"draft/expected_acceptance_pos_{i}"] for i in range(3)])
    # bfloat16 may round differently in short blocks and long ones, but not by much.
    assert first["sampling/sampling_logp_difference/mean"] < 0.1
    stored = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "policy.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float32)}  # master weights


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_stops_before_the_weights_are_touched(bad, scored, tiny_folder, tmp_path):
    parts = make_parts(tiny_config(tiny_folder, tmp_path), tiny_tokenizer(), MedusaHeads.fresh(32, 3))
    policy = tiny_model()
    state = RunState.fresh(policy, MedusaHeads.fresh(32, 3), parts.policy_optimizer, parts.draft_optimizer)
    before = [array.copy() for array in bits(state)]
    advantages = scored.advantages.copy()
    advantages[3] = bad
    poisoned = ScoredRollouts(scored.rollouts, scored.rewards_per_function, scored.rewards, advantages)
    with pytest.raises(NonFiniteError, match="^step 17: the policy's loss is (nan|-?inf).*update was not made"):
        train.update_policy(parts, state.policy, state.policy_optimizer, None, poisoned, 1e-3, 17)
    for a, b in zip(before, bits(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_that_diverges_says_so(tiny_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    settings = ["grpo.learning_rate=1e38", "draft.mode=off", "save_steps=1"]
    code, _, err = main_like(monkeypatch, capsys, "run", *as_flags(tiny_settings(tiny_folder, out, *settings)))
    assert code == 2 and "not finite" in err and "Traceback" not in err
    # What was done before is there, as it was.
    (start,) = read_records(out / "machine.jsonl")
    assert start["from_step"] == 1 and start["versions"]["jax"] == jax.__version__
    assert latest_checkpoint(out) == out / "checkpoints" / "step-000001"
    assert [record["step"] for record in read_records(out / "metrics.jsonl")] == [1]


def test_too_little_memory_is_told_with_what_takes_less(tiny_folder, tmp_path, monkeypatch):
    """In a step, where those before it are saved, and anywhere else; other errors of XLA are not the user's."""
    out, settings = tmp_path / "run", ("draft.mode=off", "save_steps=6")

    def failing(message):
        def fail(*_, **__):
            raise jax.errors.JaxRuntimeError(message)

        return fail

    little, calls, real = (
        failing("RESOURCE_EXHAUSTED: Out of memory allocating"),
        itertools.count(),
        train_sample.roll_out,
    )
    with monkeypatch.context() as patch:
        patch.setattr(train_sample, "roll_out", lambda *a: real(*a) if next(calls) == 0 else little())
        with pytest.raises(UserError, match="grpo.max_tokens_per_micro_batch=8192.*RESOURCE_EXHAUSTED"):
            run(tiny_config(tiny_folder, out, *settings))
    assert latest_checkpoint(out) == out / "checkpoints" / "step-000001"
    for message, kind in (("RESOURCE_EXHAUSTED", UserError), ("INTERNAL", jax.errors.JaxRuntimeError)):
        monkeypatch.setattr(train_loop, "load_trained_policy", failing(message))
        with pytest.raises(kind, match=message):
            run(tiny_config(tiny_folder, tmp_path / "other", *settings))


def test_the_machine_of_steps_that_are_done_again_is_forgotten(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        for step, name in ((0, "failed"), (0, "a"), (20, "killed"), (20, "b")):
            folder.write_machine(step, {"device": name})
        assert read_records(folder.machine_path) == [{"from_step": 1, "device": "a"}, {"from_step": 21, "device": "b"}]
