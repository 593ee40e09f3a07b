import json
import tomllib

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from eqx_specgrpo.cli import app, main
from eqx_specgrpo.config import rate_advice
from eqx_specgrpo.config._load import check_resume, draft_flags, dump_config, load_config
from eqx_specgrpo.config._toml import toml_value
from eqx_specgrpo.config._tree import RunConfig
from eqx_specgrpo.errors import ConfigError, UserError


def fails(*overrides, path=None):
    with pytest.raises(ConfigError) as info:
        load_config(path, overrides)
    return str(info.value)


def test_layers(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('steps = 7\nseed = 3\n[grpo]\nbeta = 0.1\nepsilon = 0.3\n[task]\nname = "arithmetic"\ndepth = 2\n')
    config = load_config(file, ["grpo.beta=0.2", "task.depth=4", "out=a b"], {"seed": 9, "steps": None})
    assert (config.steps, config.seed, config.grpo.beta, config.grpo.epsilon) == (7, 9, 0.2, 0.3)
    assert config.out == "a b"
    assert config.task.options == {"depth": 4}
    assert config.grpo.learning_rate == 1e-6  # A file is not mixed with the preset.


def test_preset_is_for_the_embedded_model_only():
    preset = load_config()
    assert preset.grpo.learning_rate > RunConfig().grpo.learning_rate
    assert load_config(flags={"model.path": "somewhere"}).grpo == RunConfig().grpo
    assert load_config(overrides=["model.path=somewhere"]).grpo == RunConfig().grpo


def test_another_task_does_not_inherit_options(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[task]\nname = "arithmetic"\ndepth = 2\n')
    assert load_config(file, flags={"task.name": "arithmetic"}).task.options == {"depth": 2}
    assert load_config(file, flags={"task.name": "x.jsonl"}).task.options == {}


def test_trl_defaults():
    grpo = RunConfig().grpo
    assert (grpo.num_generations, grpo.temperature, grpo.learning_rate, grpo.beta) == (8, 1.0, 1e-6, 0.0)
    assert (grpo.loss_type, grpo.epsilon, grpo.epsilon_high, grpo.delta) == ("dapo", 0.2, None, None)
    assert (grpo.scale_rewards, grpo.num_iterations, grpo.mask_truncated_completions) == ("group", 1, False)
    assert (grpo.adam_beta1, grpo.adam_beta2, grpo.adam_epsilon, grpo.weight_decay) == (0.9, 0.999, 1e-8, 0.0)
    assert (grpo.max_grad_norm, grpo.lr_scheduler_type) == (1.0, "linear")


def test_text_keys_need_no_quotes():
    assert load_config(overrides=["out=2024-01-01"]).out == "2024-01-01"
    assert load_config(overrides=["out=12"]).out == "12"
    assert load_config(overrides=['out="12"']).out == "12"
    assert load_config(overrides=["draft.path=none"]).draft.path is None
    assert load_config(overrides=["out=a=b"]).out == "a=b"
    assert load_config(overrides=["out=1\nseed = 5"]).seed == 0


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["grpo.epsilon_high=0.28", "grpo.delta=2", "grpo.adam_epsilon=1e-20"],
        ["reward.functions=['a.b:c', 'd.py:e']", "reward.weights=[1, 0.5]"],
        ["draft.kind=none"],
        ["save_total_limit=none", "grpo.importance_sampling_correction=true", "grpo.importance_sampling_clip_max=none"],
        ["eval.task=a.jsonl", "eval.options={split = 'test', n = 1}", "num_train_epochs=2", "save_best=eval/pass@8"],
        ['out="a\\"b\\\\c\\n\\u007f\\u0001é\U0001f600 # no comment"'],
        ["task.name=t.jsonl", 'task."odd key"=1', "task.nested={a = [1, 2.5, true], b = {c = 1979-05-27}}"],
    ],
)
def test_dump_round_trip(overrides, tmp_path):
    config = load_config(None, overrides)
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-320, 1e300, -0.0, 2**53 + 1, "", "\t", [], {}, [[1], ["a"]]])
def test_toml_values_are_exact(value):
    assert repr(tomllib.loads(f"x = {toml_value(value)}")["x"]) == repr(value)


@pytest.mark.parametrize("value", [None, object(), {1, 2}])
def test_toml_refuses_what_it_cannot_hold(value):
    with pytest.raises(ConfigError, match="cannot be written as TOML"):
        toml_value(value)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("grpo.num_generation", "grpo.num_generations"),
        ("grpo.lr_sheduler_type", "grpo.lr_scheduler_type"),
        ("draft.lenght", "draft.length"),
        ("step", "steps"),
        ("beta", "grpo.beta"),
        ("grp.beta", "grpo.beta"),
        ("learning_rate", "grpo.learning_rate or draft.learning_rate"),
        ("draft.num_generations", "grpo.num_generations"),
        ("draft.vocab", "draft.vocabulary"),
        ("gradient_accumulation", "grpo.gradient_accumulation_steps"),
        ("draft.length_max", "draft.max_length"),
    ],
)
def test_unknown_key_suggests(key, suggestion, tmp_path):
    expected = f"unknown configuration key {key}: did you mean {suggestion}?"
    assert fails(f"{key}=1") == expected
    file = tmp_path / "c.toml"
    file.write_text(f"{key} = 1")
    assert fails(path=file) == expected


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("grpo.steps_per_generation", "grpo.num_iterations updates"),
        ("grpo.per_device_train_batch_size", "grpo.prompts_per_step times grpo.num_generations"),
        ("grpo.max_steps", "set steps"),
        ("grpo.output_dir", "set out"),
        ("eval_steps", "set eval.every"),
        ("grpo.eval_steps", "set eval.every"),
        ("grpo.max_new_tokens", "set grpo.max_completion_length"),
        ("model.name", "set model.path"),
    ],
)
def test_names_of_trl_are_answered_with_ours(key, advice):
    message = fails(f"{key}=1")
    assert message.startswith(f"unknown configuration key {key}: ") and advice in message
    assert "did you mean" not in message


@pytest.mark.parametrize("key", ["grpo.top_q", "grpo.cooldown_steps", "num_heads", "grpo.max_loss"])
def test_what_names_share_makes_no_name_alike(key):
    """A section, or a word such as `steps`, `num` or `max`."""
    message = fails(f"{key}=1")
    assert "did you mean" not in message and "the keys there are" in message


def test_unknown_key_without_a_near_one_lists():
    assert fails("grpo.zzzz=1").endswith("the keys there are " + ", ".join(type(RunConfig().grpo).model_fields))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.num_generations=1", "grpo.num_generations = 1: it must be a whole number of at least 2 (a group of one"),
        ("steps=0", "steps = 0: it must be a whole number of at least 1"),
        ("steps=1.5", "steps = 1.5: it must be a whole number"),
        ("steps=true", "steps = true: it must be a whole number"),
        ("seed=-1", "seed = -1: it must be a whole number of at least 0"),
        ("out=", 'out = "": it must be text that is not empty'),
        ("grpo.temperature=0", "grpo.temperature = 0: it must be a number greater than 0"),
        ("grpo.temperature=nan", "grpo.temperature = nan: it must be a number greater than 0"),
        ("grpo.top_p=0", "grpo.top_p = 0: it must be a number greater than 0 and at most 1"),
        ("grpo.top_p=1.5", "grpo.top_p = 1.5: it must be a number greater than 0 and at most 1"),
        ("grpo.top_k=-1", "grpo.top_k = -1: it must be a whole number of at least 0"),
        ("grpo.top_k=200", "grpo.top_k = 200 is more than grpo.max_support = 128, the most tokens that are kept: set"),
        ("grpo.min_p=0", 'grpo.min_p = 0: it must be a number greater than 0 and at most 1 or "none"'),
        ("grpo.max_support=64", "grpo.max_support = 64 has no effect without grpo.top_p, top_k or min_p: set that"),
        ("grpo.learning_rate=-1e-5", "grpo.learning_rate = -1e-05: it must be a number of at least 0"),
        ("grpo.epsilon_high=0", 'grpo.epsilon_high = 0: it must be a number greater than 0 or "none"'),
        ("grpo.loss_type=ppo", 'grpo.loss_type = "ppo": it must be one of "dapo", "grpo", "bnpo", "dr_grpo"'),
        ("grpo.mask_truncated_completions=1", "grpo.mask_truncated_completions = 1: it must be true or false"),
        ("draft.length=9", "draft.length = 9: it must be a whole number of at least 0 and at most 8"),
        ("draft.max_length=9", "draft.max_length = 9: it must be"),
        ("draft.length=5", "draft.length = 5 is more than draft.max_length = 2"),
        ("draft.kind=medus", "draft.kind = 'medus': there is no such draft. Did you mean 'medusa'?"),
        ("draft.kind=file.py", "(Or a class of your own as file.py:Class or package.module:Class.)"),
        ("draft.verifier=typical", 'draft.verifier = "typical": it must be one of "rejection", "block", "coupled"'),
        (
            "draft.loss=mse",
            'draft.loss = "mse": it must be one of "kl", "reverse_kl", "tv", "hybrid", "ce_tv", "e2e_tv"',
        ),
        ("draft.mode=onlin", 'draft.mode = "onlin": it must be one of "online", "frozen", "off"'),
        ("model.dtype=float16", 'model.dtype = "float16": it must be one of "float32", "bfloat16"'),
        ("reward.functions=a", 'reward.functions = "a": it must be a list of text'),
        ("reward.weights=[1, true]", "reward.weights[1] = true: it must be a list of numbers"),
        ("grpo.gradient_accumulation_steps=3", "does not divide the 32 rows"),
        ("grpo.delta=1.1", "grpo.delta = 1.1 must be greater than 1 + epsilon_high = 1.2"),
        ("grpo=3", "grpo is a section"),
        ("steps.x=3", "steps is a single value"),
        ("model.path.x=3", "model.path = {x = 3}: it must be text"),
        ("task.options={x = 1}", "write a task's options directly in [task]"),
        ("grpo.beta", "write it as key=value"),
        ("=3", "write it as key=value"),
    ],
)
def test_bad_values_are_one_sentence(override, message):
    text = fails(override)
    assert message in text
    assert "\n" not in text and "pydantic" not in text


def test_contradictions():
    assert "reward.weights has 1 values for 2 functions" in fails("reward.functions=['a', 'b']", "reward.weights=[1]")
    assert "draft.kind says that there is none" in fails("draft.kind=none", "draft.path=x")
    assert "draft.mode says that there is none" in fails("draft.mode=off", "draft.path=x")
    assert "puts an n-gram lookup in front" in fails("draft.ngram=true", "draft.kind=ngram")
    assert "org/name): set draft.options.model" in fails("draft.kind=model")
    assert "draft.options.num_layers = 2 is an option of kind 'layer_skip', but draft.kind is 'medusa'" in fails(
        "draft.options.num_layers=2"
    )
    assert "draft.options.min_ngram = 2 is an option of kind 'ngram' (and of draft.ngram = true)" in fails(
        "draft.options.min_ngram=2"
    )
    assert "draft.options.train_length = 3 is more than draft.max_length = 2" in fails(
        "draft.kind=eagle", "draft.options.train_length=3"
    )
    assert "max_ngram = 2 is less than the 3 tokens" in fails(
        "draft.kind=ngram", "draft.options.min_ngram=3", "draft.options.max_ngram=2"
    )
    assert "never learned" in fails("draft.mode=frozen", "draft.warmup=0")
    assert load_config(None, ["draft.mode=frozen", "draft.warmup=0", "draft.kind=ngram"]).draft.enabled
    assert "grpo holds a value" in fails("grpo=1", "grpo.beta=1")
    assert len(fails("steps=0", "seed=-1", "draft.length=9").splitlines()) == 3


def test_draft_modes():
    def states(*overrides):
        draft = load_config(None, overrides).draft
        return draft.enabled, draft.learns

    assert states() == (True, True)
    assert states("draft.mode=frozen") == (True, False)
    assert states("draft.mode=off") == states("draft.kind=none") == (False, False)


def saved(folder, kind="hydra", max_length=5, settings=None):
    folder.mkdir()
    target = {"name": "a model", "hidden_size": 8, "vocab_size": 9, "fingerprint": "00"}
    about = {"kind": kind, "max_length": max_length, "settings": settings or {}, "target": target}
    (folder / "draft.json").write_text(json.dumps(about))
    return folder


def test_a_saved_draft_says_what_it_is(tmp_path):
    """Where the layer that names it says nothing else; and a longer draft than it can make is asked for by nobody."""

    def draft(*overrides, flags=None, path=None):
        return load_config(path, overrides, flags).draft

    long, short = saved(tmp_path / "long"), saved(tmp_path / "short", max_length=1)
    found = draft(f"draft.path={long}")
    assert (found.kind, found.max_length, found.ngram, found.path) == ("hydra", 5, False, str(long))
    assert draft("model.path=x", f"draft.path={short}").length == 1
    assert draft(f"draft.path={long}", "draft.kind=medusa").kind == "medusa"  # refused when it is loaded
    parts = {"first": {"kind": "ngram"}, "then": {"kind": "eagle"}}
    both = saved(tmp_path / "both", "fallback", 3, parts)
    assert (draft(f"draft.path={both}").kind, draft(f"draft.path={both}").ngram) == ("eagle", True)
    # In a file, too; a flag that names another draft takes the options of the file's along.
    file = tmp_path / "c.toml"
    file.write_text(f'[draft]\nkind = "layer_skip"\noptions.num_layers = 2\nlength = 2\npath = "{long}"')
    assert draft(path=file).options == {"num_layers": 2}
    over = draft(path=file, flags=draft_flags("eagle"))
    assert (over.kind, over.path, over.options, over.length) == ("eagle", None, {}, 2)
    over = draft(path=file, flags=draft_flags(str(both)))
    assert (over.kind, over.path, over.max_length) == ("eagle", str(both), 3)
    # What was resolved does not need the folder to be read again.
    file.write_text(dump_config(load_config(None, [f"draft.path={long}"])))
    (long / "draft.json").unlink()
    assert draft(path=file) == found


def test_draft_flags(tmp_path):
    folder = saved(tmp_path / "folder")
    assert draft_flags(str(folder)) == {"draft.path": str(folder)}
    for kind in ("medusa", "ngram", "none", "file.py:Class", "package.module:make"):
        assert draft_flags(kind) == {"draft.kind": kind, "draft.path": "none"}
    for text, words in {
        "hydr": "Did you mean 'hydra'?",
        str(tmp_path): "it has no ",
        "a b:c": "file.py:Class",
    }.items():
        with pytest.raises(ConfigError, match="no saved draft in") as info:
            draft_flags(text)
        assert words in str(info.value)


def test_bad_files(tmp_path):
    assert "there is no configuration file" in fails(path=tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = ")
    assert "bad.toml is not valid TOML: " in fails(path=tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "binary.toml is not valid TOML: " in fails(path=tmp_path / "binary.toml")
    assert "cannot be read" in fails(path=tmp_path)


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config().grpo.beta = 1.0  # pyright: ignore


def test_every_key_is_described():
    def check(model):
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)
            else:
                assert field.description and "\n" not in field.description, name

    check(RunConfig)


def test_resume():
    old = load_config(None, ["task.depth=2"])
    check_resume(old, old)
    check_resume(old, load_config(None, ["task.depth=2", "steps=1000", "out=elsewhere", "reward.timeout=9"]))
    for change, key, was, now in [
        (["task.depth=3"], "task.depth", "2", "3"),
        ([], "task.depth", "2", "unset"),
        (["task.depth=2", "task.more=1"], "task.more", "unset", "1"),
        (["task.depth=2", "grpo.epsilon_high=0.3"], "grpo.epsilon_high", "unset", "0.3"),
        (["task.depth=2", "seed=1", "draft.length=1"], "seed", "0", "1"),
        (["task.depth=2", "draft.mode=frozen"], "draft.mode", '"online"', '"frozen"'),
    ]:
        with pytest.raises(ConfigError) as info:
            check_resume(old, load_config(None, change))
        assert str(info.value).startswith(f"{key} was {was} in the run to be resumed and is {now} now")


def test_a_rate_that_rises_again_on_resume_is_told():
    def advice(old: int, new: int, done: int, schedule: str = "linear"):
        common = ["grpo.learning_rate=1e-3", f"grpo.lr_scheduler_type={schedule}"]
        configs = [load_config(None, [*common, f"steps={steps}"]) for steps in (old, new)]
        return rate_advice(*configs, done)

    told = advice(10, 20, 10)
    assert told is not None and "was 0.0001 at step 10 of 10 and is 0.0005 at step 11 of 20" in told
    assert advice(10, 10, 5) is None, "nothing has changed"
    assert advice(10, 11, 10) is None, "it falls on: 0.0001 and 0.00009"
    assert advice(10, 20, 10, "constant") is None


def test_scale_rewards_is_a_boolean_too():
    """As TRL has it."""
    for value, means in (("true", "group"), ("false", "none"), ("batch", "batch")):
        assert load_config(None, [f"grpo.scale_rewards={value}"]).grpo.scale_rewards == means
    with pytest.raises(ConfigError, match='scale_rewards = 1: it must be one of "group", "batch", "none"'):
        load_config(None, ["grpo.scale_rewards=1"])


def test_dry_run_prints_what_can_be_read_back(tmp_path):
    result = CliRunner().invoke(app, ["run", "--dry-run", "--steps", "5", "--set", "grpo.beta=0.1", "--out", "x y"])
    assert result.exit_code == 0, result.output
    path = tmp_path / "c.toml"
    path.write_text(result.output)
    assert load_config(path) == load_config(None, ["grpo.beta=0.1"], {"steps": 5, "out": "x y"})


def test_dry_run_checks_what_is_named():
    for argument in (["--task", "no_such_task"], ["--reward", "no_such_module_here:f"]):
        result = CliRunner().invoke(app, ["run", "--dry-run", *argument])
        assert isinstance(result.exception, UserError) and "no_such" in str(result.exception)
        assert result.stdout == ""


def test_resume_takes_the_configuration_of_the_run(tmp_path):
    config = load_config(None, ["grpo.beta=0.125"], {"out": "moved/since", "steps": 5})
    (tmp_path / "config.toml").write_text(dump_config(config))
    arguments = ["run", "--dry-run", "--resume", "--steps", "9"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    resolved = tomllib.loads(result.output)
    assert (resolved["steps"], resolved["grpo"]["beta"], resolved["out"]) == (9, 0.125, str(tmp_path))
    result = CliRunner().invoke(app, [*arguments, "--set", f"out={tmp_path / 'none'}"])
    assert isinstance(result.exception, UserError) and "no run to resume" in str(result.exception)


def test_errors_leave_with_code_2_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["specgrpo", "run", "--dry-run", "--set", "grpo.bta=[1]"])
    with pytest.raises(SystemExit) as info:
        main()
    assert info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: unknown configuration key grpo.bta: did you mean grpo.beta?\n"
