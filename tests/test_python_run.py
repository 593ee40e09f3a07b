"""A run from Python: with rows, functions, callbacks, a loaded policy and a draft in place of names."""

import functools as ft
import io
import json
import shutil
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from test_data_files import write_rows
from tiny_run import main_like, tiny_folder as tiny_folder

import eqx_specgrpo as sg
from eqx_specgrpo import UserError
from eqx_specgrpo.config import dump_config, given_and_named, load_config, load_trained_policy, resume_command
from eqx_specgrpo.config._given_names import given_name, reward_name, shown_name
from eqx_specgrpo.drafts import MedusaHeads, NoDraft
from eqx_specgrpo.errors import ConfigError
from eqx_specgrpo.models import AdaptedTransformer, Transformer, cast_weights
from eqx_specgrpo.tasks import Arithmetic, arithmetic_reward, soft_overlong
from eqx_specgrpo.train._callbacks import NoCallback, as_callback

ROWS = [{"question": f"{number} + 1 =", "answer": str(number + 1)} for number in range(6)]
MEASURED = ("time/", "compile/", "spec/tokens_per_second", "spec/seconds", "draft/seconds")


def short(completion_ids, **kwargs):
    """Shorter is better, and odd tokens are worse."""
    return [-len(ids) / 16 - sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


class Doubled:
    """An object that can be called."""

    def __call__(self, answer, **kwargs):
        return [2.0 * float(value) for value in answer]


class Told(sg.AbstractCallback):
    """Writes down what it was told, and raises after a step if it is to."""

    def __init__(self, raise_at=None):
        self.calls, self.raise_at = [], raise_at

    def begin(self, run):
        self.calls.append(("begin", run.done))

    def step(self, run, metrics):
        assert metrics["step"] == run.done and run.tokenizer.vocab_size == 260
        self.calls.append(("step", run.done, float(jnp.abs(run.policy.embedding).sum())))
        if run.done == self.raise_at:
            raise OSError("no more")

    def end(self, run):
        assert (run.folder / "policy" / "config.json").exists()
        self.calls.append(("end", run.done))


def settings(out, steps, **others):
    grpo = {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": 16, "learning_rate": 3e-3}
    return {
        "out": out,
        "steps": steps,
        "save_steps": 100,
        "compare": False,
        "grpo": grpo | {"logprob_chunk": 24},
        "task.columns": {"question": "prompt"},
        "reward.weights": (1.0, 0.25),
        "draft": {"length": 3, "adaptive": False, "fraction": 0.5},
        **others,
    }


def quietly(config, **options):
    return sg.run(config, console=Console(file=io.StringIO(), width=200), **options)


@pytest.fixture(scope="module")
def objects(tiny_folder):
    """A loaded policy, and a draft for it."""
    model, tokenizer = sg.load_pretrained(tiny_folder)
    return {
        "task": ROWS,
        "rewards": [short, Doubled()],
        "policy": (model, tokenizer),
        "draft": MedusaHeads.fresh(model.hidden_size, 3),
    }


@pytest.fixture(scope="module")
def straight(objects, tmp_path_factory):
    """Four steps in one go."""
    told = Told()
    out = tmp_path_factory.mktemp("python") / "run"
    return quietly(settings(out, 4), callbacks=told, **objects), told, out


def test_what_comes_back(straight, objects):
    result, told, out = straight
    assert result.folder == out and isinstance(result, sg.RunResult)
    assert result.metrics["step"].tolist() == [1, 2, 3, 4]
    assert len(result.metrics["reward"]) == 4 and result.metrics["reward"].dtype == np.float64
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert result.metrics["rewards/Doubled/mean"].tolist() == [line["rewards/Doubled/mean"] for line in written]
    assert result.metrics["reward"] == pytest.approx(
        result.metrics["rewards/short/mean"] + 0.25 * result.metrics["rewards/Doubled/mean"]
    )
    assert "4 steps, reward" in repr(result) and len(repr(result)) < 300
    # What was handed over is as it was; what was trained is what policy/ holds.
    model, _ = objects["policy"]
    saved, _ = sg.load_pretrained(out / "policy")
    assert eqx.tree_equal(saved, result.policy) and not eqx.tree_equal(model, result.policy)
    assert eqx.tree_equal(sg.load_draft(out / "draft", result.policy), result.draft)
    assert not eqx.tree_equal(objects["draft"], result.draft)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(eqx.filter((model, objects["draft"]), eqx.is_array)))
    # Callbacks, with the policy as it was then.
    assert [call[:2] for call in told.calls] == [("begin", 0), *(("step", n) for n in (1, 2, 3, 4)), ("end", 4)]
    assert len({call[2] for call in told.calls if call[0] == "step"}) == 4


def test_what_the_folder_says(straight):
    _, _, out = straight
    config = load_config(out / "config.toml")
    assert config.task.name == "python:builtins.list" and config.task.options == {"columns": {"question": "prompt"}}
    assert config.model.path == "python:eqx_specgrpo.models._transformer.Transformer"
    assert config.draft.kind == "python:eqx_specgrpo.drafts._medusa.MedusaHeads" and config.draft.max_length == 3
    assert config.reward.functions[1] == f"python:{__name__}.Doubled" and config.reward.weights == [1.0, 0.25]
    assert config.reward.functions[0].endswith(":short")  # which its module leads to
    inputs = json.loads((out / "inputs.jsonl").read_text())["inputs"]
    assert set(inputs) == {"task", "reward 1", "reward 2", "model: handed over, its weights",
                           "model: handed over, its tokenizer"}  # fmt: skip
    assert json.loads((out / "draft" / "draft.json").read_text())["kind"] == "medusa"


def records(result) -> tuple[dict, bytes]:
    columns = {name: values for name, values in result.metrics.items() if not name.startswith(MEASURED)}
    return columns, (result.folder / "completions.jsonl").read_bytes()


def test_a_callback_that_raises_and_a_resume(straight, objects, tmp_path):
    """The steps that are done are kept, and what follows is the same to the bit."""
    whole, _, _ = straight
    with pytest.raises(OSError, match="no more"):
        quietly(settings(tmp_path / "run", 4), callbacks=[Told(raise_at=2)], **objects)
    assert (tmp_path / "run" / "checkpoints" / "step-000002").exists()
    with pytest.raises(UserError) as caught:
        quietly({"out": tmp_path / "run"}, resume=True, rewards=objects["rewards"])
    for words in (
        "task.name is 'python:builtins.list', model.path is 'python:", "draft.kind is 'python:",
        "resume=True)", "task=..., rewards=..., policy=..., draft=..., resume",
    ):  # fmt: skip
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="reward.functions was .*short.* is now|reward.functions was"):
        quietly({"out": tmp_path / "run"}, resume=True, **objects | {"rewards": [short, short_too]})
    told = Told()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing has changed
        again = quietly({"out": tmp_path / "run"}, resume=True, callbacks=(told,), **objects)
    assert [call[:2] for call in told.calls] == [("begin", 2), ("step", 3), ("step", 4), ("end", 4)]
    (expected, completions), (found, same) = records(whole), records(again)
    assert found.keys() == expected.keys() and same == completions
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert eqx.tree_equal(again.policy, whole.policy)


def short_too(completion_ids, **kwargs):
    return short(completion_ids)


def test_another_policy_or_task_is_noticed(straight, objects, tmp_path):
    _, _, out = straight
    shutil.copytree(out, tmp_path / "run")
    model, tokenizer = objects["policy"]
    changed = eqx.tree_at(lambda m: m.norm.weight, model, 2 * model.norm.weight)
    with pytest.warns(UserWarning, match="the model that was handed over, of the starting model, has changed"):
        quietly({"out": tmp_path / "run"}, resume=True, **objects | {"policy": (changed, tokenizer)})
    with pytest.raises(UserError, match="had 6 items and has 5 now"):
        quietly({"out": tmp_path / "run"}, resume=True, **objects | {"task": ROWS[:5]})


@pytest.mark.parametrize("name", ["p.parquet", "folder"])
def test_a_parquet_file_and_a_saved_dataset_are_trained_from(tiny_folder, tmp_path, name):
    """And are compared when the run goes on."""
    place = write_rows(tmp_path / name, ROWS)
    config = settings(tmp_path / "run", 1) | {"model.path": tiny_folder, "draft.max_length": 3, "draft.warmup": 0}
    result = quietly(config, task=place, rewards=[short, Doubled()], draft="medusa")
    prompts = {json.loads(line)["prompt"] for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()}
    assert len(prompts) == 2 and prompts < {row["question"] for row in ROWS}
    assert (
        np.isfinite(result.metrics["loss"]).all() and load_config(tmp_path / "run" / "config.toml").task.name == place
    )
    more = {"out": tmp_path / "run", "steps": 2}
    if name == "folder":
        shutil.rmtree(place)
    write_rows(tmp_path / name, [*ROWS[:5], {"question": "six", "answer": "6"}])
    with pytest.warns(UserWarning, match=f"the items of the task .*{name} have changed"):
        assert len(quietly(more, resume=True, rewards=[short, Doubled()]).metrics["step"]) == 2


def test_names_of_functions():
    assert reward_name("think_format") == "think_format"
    assert reward_name(arithmetic_reward) == "arithmetic"
    assert reward_name(soft_overlong(8, 2)).startswith(
        "python:eqx_specgrpo.tasks._soft_overlong.soft_overlong.<locals>."
    )
    assert reward_name(len) == "python:builtins.len"
    assert reward_name(lambda **_: []).endswith(".<lambda>") and reward_name(Doubled()).endswith(".Doubled")
    assert reward_name(ft.partial(short)) == f"python:{__name__}.short"
    assert given_name([]) == "python:builtins.list"
    assert shown_name(given_name([])) == "list of the script" and shown_name("task.jsonl") == "task.jsonl"


def test_configurations_of_all_forms(tmp_path):
    nested, _ = given_and_named(
        {"grpo": {"beta": 0.5}, "reward.functions": ("arithmetic",), "task": {"high": np.int64(12)}}
    )
    dotted, _ = given_and_named(
        {"grpo.beta": np.float32(0.5), "reward": {"functions": ["arithmetic"]}, "task.high": 12}
    )
    assert nested == dotted and nested.grpo.beta == 0.5 and nested.steps == load_config(None).steps
    (tmp_path / "config.toml").write_text(dump_config(nested))
    for path in (tmp_path / "config.toml", str(tmp_path / "config.toml")):
        assert given_and_named(path)[0] == nested
    assert given_and_named(nested)[0] is nested
    # Other names, and what belonged to the old ones is gone.
    config, given = given_and_named(nested, task=ROWS, rewards=short, draft=NoDraft())
    assert config.task.name == "python:builtins.list" and not config.task.options and config.draft.kind == "none"
    assert given.rewards == (short,) and not config.draft.enabled and config.grpo.beta == 0.5
    config, given = given_and_named({}, task="arithmetic", draft="ngram")
    assert (config.task.name, config.draft.kind, given.task, given.draft) == ("arithmetic", "ngram", None, None)
    config, _ = given_and_named({"grpo.max_rows": None}, draft=MedusaHeads.fresh(8, 2))
    assert config.grpo.max_rows is None and (config.draft.length, config.draft.max_length) == (2, 2)
    assert not config.draft.warms_up
    config, given = given_and_named({}, task=Arithmetic(seed=3))
    assert given.load_task(config) == Arithmetic(seed=3)


@pytest.mark.parametrize(
    "config, options, pattern",
    [
        (3, {}, "config is of type int: give the path of a TOML file"),
        ({"grpo": {"bta": 1.0}}, {}, "unknown configuration key grpo.bta: did you mean grpo.beta"),
        ({3: 1}, {}, "has the key 3: keys are text"),
        ({"seed": None}, {}, "seed = "),
        ("nowhere.toml", {}, "there is no configuration file nowhere.toml"),
        ({}, {"rewards": []}, "rewards is empty"),
        ({}, {"rewards": [short, 3]}, "rewards has 3, which can't be called"),
        ({}, {"policy": "org/name"}, r"policy is of type str: give a model and its tokenizer.* A name belongs into"),
        ({}, {"policy": (1, 2)}, "policy is of type int, int"),
        ({}, {"draft": 3}, "draft is of type int"),
        ({}, {"draft": "medsua"}, "Did you mean 'medusa'"),
        ({"draft.options.rank": 3}, {"draft": MedusaHeads.fresh(8, 3)}, "was handed over ready: drop one of them"),
    ],
)
def test_what_cannot_be(config, options, pattern):
    with pytest.raises(UserError, match=pattern):
        given_and_named(config, **options)


def test_how_to_go_on():
    config, _ = given_and_named({"out": "my runs/a"})
    assert resume_command(config) == "specgrpo run --resume --out 'my runs/a'"
    config, _ = given_and_named({"out": "a"}, task=ROWS, rewards=[Doubled(), "think_format"], draft="ngram")
    assert resume_command(config) == "eqx_specgrpo.run({'out': 'a'}, task=..., rewards=..., resume=True)"


def test_callbacks_are_instances():
    with pytest.raises(TypeError, match="callbacks has <class .*Told.*give instances of a class"):
        as_callback([Told])
    with pytest.raises(TypeError, match="abstract"):
        sg.AbstractCallback()  # pyright: ignore[reportAbstractUsage]
    assert isinstance(as_callback(()), NoCallback)
    with pytest.raises(TypeError, match=r"callbacks is the class Told: give an instance, Told\(\)"):
        as_callback(Told)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--task", "nowhere.parquet"), "can't be read: No such file"),
        (("--set", "task.tasks=[]", "--task", "mixture"), "task.tasks is empty"),
        (("--set", "grpo.optim=adam"), '"adafactor"'),
        (("--set", "grpo.stop=['']"), "grpo.stop[0]"),
        (("--set", "grpo.chat_template_kwargs={think=1}", "--dry-run"), ""),
        (("--set", "model.revision=v1", "--dry-run"), "model.revision = 'v1' is of a model by name"),
        (("--set", "reward.functions=['python:__main__.f']"), "eqx_specgrpo.run({'out': "),
    ],
)
def test_the_command_line_says_it_in_a_sentence(monkeypatch, capsys, tmp_path, arguments, words):
    code, out, err = main_like(monkeypatch, capsys, "run", "--out", str(tmp_path / "run"), *arguments)
    assert code == (2 if words else 0), err
    assert words in err and "Traceback" not in err


def test_a_base_beside_adapters_is_not_copied(objects):
    """It stands still; all else is copied, and in float32."""
    config, given = given_and_named({"lora.rank": 2}, policy=objects["policy"])
    adapted, _ = load_trained_policy(config, given)
    model, _ = objects["policy"]
    assert isinstance(adapted, AdaptedTransformer) and adapted.base.embedding is model.embedding
    config, given = given_and_named({}, policy=(cast_weights(model, jnp.bfloat16), objects["policy"][1]))
    whole, _ = load_trained_policy(config, given)
    assert isinstance(whole, Transformer) and whole.embedding.dtype == jnp.float32
    config, given = given_and_named({}, policy=objects["policy"])
    whole, _ = load_trained_policy(config, given)
    assert eqx.tree_equal(whole, model)
    assert isinstance(whole, Transformer) and whole.embedding is not model.embedding
