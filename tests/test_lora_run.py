"""Runs that train adapters: what they keep and leave, how they go on, and what they refuse."""

import io
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation
from rich.console import Console
from safetensors.numpy import load_file
from tiny_run import as_flags, main_like, tiny_config, tiny_folder as tiny_folder, tiny_model, tiny_tokenizer

from eqx_specgrpo import train
from eqx_specgrpo.config import load_config, make_parts
from eqx_specgrpo.drafts import NoDraft
from eqx_specgrpo.errors import ConfigError, UserError
from eqx_specgrpo.models import (
    ALL_LINEAR,
    AdaptedTransformer,
    Adapters,
    describe_adapter,
    load_adapter,
    load_model,
    save_adapter,
)
from eqx_specgrpo.records import read_records
from eqx_specgrpo.train._loss_state import current_reference, fixed_reference
from eqx_specgrpo.train._state import RunState

LORA = (
    "lora.rank=2",
    "lora.alpha=4",
    "grpo.lr_scheduler_type=constant",
    "draft.kind=medusa",
    "draft.warmup=2",
    "grpo.beta=0.05",
)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def run(folder: Path, out: Path, *settings: str, resume: bool = False) -> tuple[list[dict], str]:
    told = io.StringIO()
    config = tiny_config(folder, out, "steps=4", "save_steps=2", *LORA, *settings)
    train.run(config, resume=resume, console=Console(file=told, width=300))
    return read_records(out / "metrics.jsonl"), told.getvalue()


def last_checkpoint(out: Path) -> dict[str, dict[str, np.ndarray]]:
    return {path.stem: load_file(path) for path in (out / "checkpoints" / "step-000004").glob("*.safetensors")}


@pytest.fixture(scope="module")
def straight(tiny_folder, tmp_path_factory) -> tuple[Path, list[dict], str]:
    out = tmp_path_factory.mktemp("lora") / "run"
    return out, *run(tiny_folder, out, "lora.save_merged=true")


def test_what_is_trained_and_kept(straight, tiny_folder):
    """A checkpoint has the adapters and their two moments, and nothing of the base's size; policy/ has an adapter, and
    the merged model, which differ from the base as one."""
    out, records, _ = straight
    trees = last_checkpoint(out)
    base = load_model(tiny_folder)
    numbers = sum(2 * (shape[0] + shape[1]) for shape in shapes(base).values())
    assert sum(array.size for array in trees["policy"].values()) == numbers
    assert sum(array.size for array in trees["policy_optimizer"].values()) == 2 * numbers + 1
    assert "reference" not in trees
    adapters = load_adapter(out / "policy" / "adapter", base)
    assert all(np.abs(part.up).max() > 0 for part in adapters.layers.values())
    for name, array in trees["policy"].items():
        part = adapters.layers[name.removeprefix("layers.").rpartition(".")[0]]
        np.testing.assert_array_equal(array, part.up if name.endswith(".up") else part.down)
    merged = AdaptedTransformer(base, adapters).merged("float32")
    found = load_model(out / "policy")
    assert eqx.tree_equal(found, merged) and not eqx.tree_equal(found, base)
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6) and records[-1]["kl"] > 1e-5


def shapes(base) -> dict[str, tuple[int, int]]:
    fresh = Adapters.fresh(base.config, 1, 1.0, ALL_LINEAR, key=jr.key(0))
    return {name: (len(part.up), part.down.shape[1]) for name, part in fresh.layers.items()}


def test_rollouts_and_updates_have_the_same_probabilities(straight):
    """At each step, with the weights that have moved, to the rounding of a decoder with full weights."""
    _, records, _ = straight
    assert max(record["sampling/sampling_logp_difference/max"] for record in records) < 1e-4


def test_resumed_is_bitwise_a_straight_run(straight, tiny_folder, tmp_path):
    out, records, _ = straight
    run(tiny_folder, tmp_path / "run", "lora.save_merged=true", "steps=2")
    again, _ = run(tiny_folder, tmp_path / "run", "lora.save_merged=true", resume=True)
    clocks = ("time/", "compile/", "spec/tokens_per_second", "spec/seconds", "draft/seconds")
    for one, other in zip(records, again, strict=True):
        for name in one:
            assert name.startswith(clocks) or one[name] == other[name], name
    one, other = last_checkpoint(out), last_checkpoint(tmp_path / "run")
    assert one.keys() == other.keys()
    for name in one:
        for key in one[name]:
            np.testing.assert_array_equal(one[name][key], other[name][key], err_msg=f"{name} {key}")


def test_a_base_in_bfloat16_with_other_targets(tiny_folder, tmp_path):
    """Trained on from where it was left: the adapter says its own rank, alpha and targets."""
    settings = ("model.base_dtype=bfloat16", "model.dtype=bfloat16", "draft.kind=none", "steps=1", "grpo.beta=0.0")
    records, _ = run(tiny_folder, tmp_path / "one", *settings, "lora.targets=['q_proj','down_proj']")
    assert records[-1]["grad_norm"] > 0
    saved = tmp_path / "one" / "policy" / "adapter"
    assert describe_adapter(saved) == {"rank": 2, "alpha": 4.0, "targets": ["down_proj", "q_proj"]}
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]  # not merged, unless asked
    on = load_config(None, [f"model.path={tiny_folder}", f"model.adapter={saved}"])
    assert (on.lora.rank, on.lora.alpha, on.lora.targets) == (2, 4.0, ["down_proj", "q_proj"])


def test_the_reference_is_the_base_itself(tiny_folder, tmp_path):
    base = tiny_model()
    policy = AdaptedTransformer(base, Adapters.fresh(base.config, 2, 4.0, ALL_LINEAR, key=jr.key(0)))
    parts = make_parts(tiny_config(tiny_folder, tmp_path, "grpo.beta=0.1"), tiny_tokenizer(), NoDraft())
    state = RunState.fresh(policy, NoDraft(), parts.policy_optimizer, parts.draft_optimizer)
    assert fixed_reference(parts, policy) is None
    reference = current_reference(parts, state, None)
    assert all(one is other for one, other in zip(jax.tree.leaves(reference), jax.tree.leaves(base), strict=True))


def test_learning_rate_is_suggested(straight, tiny_folder, tmp_path, capsys):
    _, _, told = straight
    assert "adapters learn best" not in told
    _, told = run(tiny_folder, tmp_path / "a", "steps=1", "grpo.learning_rate=1e-6", "draft.kind=none")
    assert "adapters learn best at about 10 times the rate of full weights: --set grpo.learning_rate=1e-05" in told


def test_command_line(straight, tiny_folder, tmp_path, monkeypatch, capsys):
    """An adapter with its base says what the merged model says; for another base it is a sentence and exit code 2."""
    out, adapter = straight[0], str(straight[0] / "policy" / "adapter")
    said = []
    for model in ((str(tiny_folder), "--adapter", adapter), (str(out / "policy"),), (str(tiny_folder),)):
        arguments = ("--prompt", "1+1=", "--max-completion-length", "12", "--temperature", "0", "--json")
        code, printed, _ = main_like(monkeypatch, capsys, "generate", "--model", *model, *arguments)
        assert code == 0
        said.append(json.loads(printed))
    assert said[0] == said[1]
    assert said[0]["logprobs"] != said[2]["logprobs"]

    other = tiny_model(num_layers=1)
    save_adapter(Adapters.fresh(tiny_model().config, 2, 4.0, ["q_proj"], key=jr.key(0)), tmp_path / "b", other, "x")
    flags = as_flags([f"out={tmp_path / 'r'}"])
    for arguments, message in (
        (("generate", "--prompt", "1"), "is for another base: one of the same sizes, but with other weights"),
        (("run", *flags), "is for another base"),
        (("verify",), "is for another base"),
    ):
        code, _, error = main_like(
            monkeypatch, capsys, *arguments, "--model", str(tiny_folder), "--adapter", str(tmp_path / "b")
        )
        assert code == 2 and message in error and error.count("error: ") == 1 and "Traceback" not in error
    code, _, error = main_like(
        monkeypatch, capsys, "run", "--dry-run", "--model", str(tiny_folder), "--adapter", str(tmp_path / "none")
    )
    assert code == 2 and "there is no adapter in" in error


def test_bad_configurations(tiny_folder, tmp_path):
    for settings, message in (
        (("lora.rank=-1",), "lora.rank = -1: it must be a whole number of at least 0"),
        (("lora.rank=2", "lora.alpha=0"), "lora.alpha = 0: it must be a number greater than 0"),
        (("lora.rank=2", "lora.dropout=0.1"), "lora.dropout = 0.1: only 0 is supported"),
        (("lora.rank=2", "lora.targets=[]"), "lora.targets is empty"),
        (("model.base_dtype=bfloat16",), "set a lora.rank"),
        (("lora.rank=2", "grpo.sync_ref_model=true", "grpo.beta=0.1"), "the reference is the base"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny_config(tiny_folder, tmp_path, *settings)
    config = tiny_config(tiny_folder, tmp_path / "run", "lora.rank=2", "lora.targets=['query']")
    with pytest.raises(UserError, match="'query', which matches no layer.*q_proj, k_proj"):
        train.run(config, console=Console(file=io.StringIO()))


def test_an_adapter_of_another_rank_than_is_asked_for(straight, tiny_folder, tmp_path):
    adapter = straight[0] / "policy" / "adapter"
    config = tiny_config(tiny_folder, tmp_path / "run", f"model.adapter={adapter}", "lora.rank=3")
    with pytest.raises(UserError, match="has rank 2, but lora.rank is 3"):
        train.run(config, console=Console(file=io.StringIO()))
