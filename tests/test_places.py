"""What a run stores is found again from any working directory; and as earlier versions have stored it."""

import json
import shutil
import sys
import tomllib
from pathlib import Path

import equinox as eqx
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation
from safetensors.numpy import load_file
from tiny_run import as_flags, main_like, tiny_folder as tiny_folder, tiny_model, tiny_settings

from eqx_specgrpo.config import dump_config, load_config
from eqx_specgrpo.drafts import (
    DraftError,
    EagleDraft,
    FallbackDraft,
    HydraHeads,
    LayerSkipDraft,
    MedusaHeads,
    NGramDraft,
    TemperedDraft,
    describe_saved_draft,
    draft_options,
    fresh_draft,
    load_draft,
    save_draft,
)
from eqx_specgrpo.errors import CheckpointError, ConfigError, UserError
from eqx_specgrpo.files import absolute_spec, import_callable, is_import_spec
from eqx_specgrpo.models import with_grouped_outputs
from eqx_specgrpo.records import read_records

TARGET = tiny_model()

DRAFT = '''
from eqx_specgrpo.drafts import HydraHeads


class MyDraft(HydraHeads):
    def __init__(self, target, max_length, *, rank: int = 4, key):
        """**Arguments:**

        - `rank`: width of the heads.
        """
        super().__init__(target.hidden_size, max_length, rank, key=key)

    def provenance(self):
        return {"rank": super().provenance()["inner_size"]}


class Forgets(MyDraft):
    def provenance(self):
        return {}
'''
REWARDS = """
def correct(completion_ids, answer, **kwargs):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
"""


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a draft, a reward and a task of one's own, in which one works."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mydraft.py").write_text(DRAFT)
    (folder / "rewards.py").write_text(REWARDS)
    lines = [json.dumps({"prompt": f"{i} + {i} =", "answer": str(2 * i)}) for i in range(6)]
    (folder / "problems.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(folder)
    return folder


def test_a_run_is_resumed_from_another_folder(project, tiny_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_folder, project / "model")
    monkeypatch.chdir(project)
    own = ("model.path=", "reward.functions=", "out=", "task.prompt=", "draft.max_length=", "draft.length=")
    settings = [text for text in tiny_settings(tiny_folder, tmp_path) if not text.startswith(own)]
    settings += ["draft.max_length=1", "draft.length=1", "draft.options.rank=2", "draft.mode=frozen", "save_steps=1"]
    settings += ["draft.warmup=0", "grpo.lr_scheduler_type=constant", "grpo.max_completion_length=4"]
    names = ["--model", "model", "--task", "problems.jsonl", "--reward", "rewards.py:correct"]
    names += ["--draft", "mydraft.py:MyDraft", "--out", "runs/a"]

    def specgrpo(*arguments):
        code, _, err = main_like(monkeypatch, capsys, *arguments)
        assert code == 0, err

    specgrpo("run", *names, "--steps", "1", *as_flags(settings))
    monkeypatch.chdir("/")
    moved = tmp_path / "moved"  # the run, not what it was made of
    (project / "runs" / "a").rename(moved)
    specgrpo("run", "--resume", "--out", str(moved), "--steps", "2")
    assert len(read_records(moved / "metrics.jsonl")) == 2
    kept = tomllib.loads((moved / "config.toml").read_text())
    assert kept["model"]["path"] == str(project / "model") and kept["task"]["name"] == str(project / "problems.jsonl")
    assert kept["draft"]["kind"] == f"{project / 'mydraft.py'}:MyDraft" and kept["draft"]["options"] == {"rank": 2}
    draft = load_draft(moved / "draft", TARGET)
    assert type(draft).__name__ == "MyDraft" and draft.provenance() == {"rank": 2}


def test_names_of_a_configuration_become_absolute(project):
    def resolved(*settings):
        return load_config(None, settings)

    (project / "weights").mkdir()
    (project / "package").mkdir()
    for name in ("__init__.py", "part.py"):
        (project / "package" / name).write_text(REWARDS)
    found = resolved(
        "model.path=weights", "draft.path=weights", "reward.functions=['rewards.py:correct', 'arithmetic']"
    )
    assert (found.model.path, found.draft.path) == (str(project / "weights"),) * 2
    assert found.reward.functions == [f"{project / 'rewards.py'}:correct", "arithmetic"]
    assert resolved("draft.kind=model", "draft.options.model=weights").draft.options == {"model": f"{project}/weights"}
    # What is not there is not touched: the name of a model to be downloaded, a task without a file.
    assert resolved("model.path=org/name", "task.name=nowhere.jsonl").task.name == "nowhere.jsonl"
    assert resolved("model.path=org/name").model.path == "org/name"
    # A module that lies here is kept with the folder, one that Python finds without it as it is.
    found = resolved("reward.functions=['package.part:correct', 'json:dumps']")
    assert found.reward.functions == [f"{project}/package.part:correct", "json:dumps"]
    assert load_config(None, [f"reward.functions={found.reward.functions!r}"]) == found


def test_a_module_is_found_again_by_its_folder(project, monkeypatch):
    (project / "lies_here.py").write_text(REWARDS)
    spec = absolute_spec("lies_here:correct")
    assert spec == f"{project}/lies_here:correct" and is_import_spec(spec) and absolute_spec(spec) == spec
    monkeypatch.chdir("/")
    try:
        assert import_callable(spec, "reward", "function")([[2, 3]], None) == [0.5]
    finally:
        sys.modules.pop("lies_here", None)
    with pytest.raises(UserError, match="'/nowhere/lies_here' of a reward can't be imported"):
        import_callable("/nowhere/lies_here:correct", "reward", "function")
    assert not is_import_spec("org/name:Draft")


def test_options_of_ones_own_draft(project):
    spec = f"{project / 'mydraft.py'}:MyDraft"
    config = load_config(None, ["draft.kind=mydraft.py:MyDraft", "draft.options.rank=8"])
    assert (config.draft.kind, config.draft.options) == (spec, {"rank": 8})
    assert draft_options(spec).known[0].description == "width of the heads"
    (project / "c.toml").write_text(dump_config(config))
    assert load_config(project / "c.toml") == config
    # Another draft does not inherit them.
    assert load_config(project / "c.toml", ["draft.kind=hydra"]).draft.options == {}
    for settings, message in {
        ("rank='8'",): r"the option 'rank' of the draft '.*MyDraft' can't be '8': it must be a whole number",
        ("rnk=8",): "has no option 'rnk'. Did you mean 'rank'",
        ("key=8",): "has no option 'key'",
        ("num_layers=8",): "draft.options.num_layers = 8 is an option of kind 'layer_skip', but draft.kind is",
    }.items():
        with pytest.raises(UserError, match=message):
            load_config(None, [f"draft.kind={spec}", *(f"draft.options.{text}" for text in settings)])
    with pytest.raises(DraftError, match=r"the option 'rank', but Forgets.provenance\(\) does not tell it"):
        fresh_draft(f"{project / 'mydraft.py'}:Forgets", TARGET, 2, options={"rank": 2}, key=jr.key(0))


def test_a_draft_beside_its_class_may_be_moved(project, monkeypatch):
    folder = project / "draft"
    folder.mkdir()
    (project / "mydraft.py").rename(folder / "mydraft.py")
    draft = fresh_draft("draft/mydraft.py:MyDraft", TARGET, 2, options={"rank": 3}, key=jr.key(0))
    save_draft(folder, draft, TARGET, "tiny", "draft/mydraft.py:MyDraft")
    assert json.loads((folder / "draft.json").read_text())["kind"] == "mydraft.py:MyDraft"
    moved = folder.rename(project / "elsewhere")
    monkeypatch.chdir("/")
    assert describe_saved_draft(moved)["kind"] == f"{moved / 'mydraft.py'}:MyDraft"
    loaded = load_draft(moved, TARGET)
    assert eqx.tree_equal(loaded.heads, draft.heads)  # pyright: ignore[reportAttributeAccessIssue]


#
# As earlier versions have stored it
#

OLD_CONFIG = """
steps = 5  # steps in all
[model]
path = "x"
[draft]
kind = "{kind}"  # medusa, hydra, eagle, model, layer_skip, ngram, none (plain decoding), or a class of your own
ngram = {ngram}
length = 2
max_length = 3
{own}
# vocabulary =  # guess only so many tokens
"""


@pytest.mark.parametrize(
    ("kind", "ngram", "own", "options"),
    [
        ("eagle", "false", "train_length = 2", {"train_length": 2}),
        ("layer_skip", "false", "num_layers = 1", {"num_layers": 1}),
        ("model", "false", 'model = "org/name"', {"model": "org/name"}),
        ("ngram", "false", "min_ngram = 5", {"min_ngram": 5}),
        ("hydra", "true", "min_ngram = 4", {"min_ngram": 4}),
        ("eagle", "true", "min_ngram = 4\ntrain_length = 2", {"min_ngram": 4, "train_length": 2}),
    ],
)
def test_a_configuration_in_the_old_spelling(kind, ngram, own, options, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(OLD_CONFIG.format(kind=kind, ngram=ngram, own=own))
    config = load_config(file)
    assert config.draft.options == options
    new = tmp_path / "new.toml"
    new.write_text(dump_config(config))
    assert load_config(new) == config and tomllib.loads(new.read_text())["draft"]["options"] == options
    # On the command line too; a later layer wins, in whichever spelling.
    name, value = next(iter(options.items()))
    if isinstance(value, int):
        assert load_config(file, [f"draft.{name}=3"]).draft.options == {**options, name: 3}
        assert load_config(new, [f"draft.{name}=3"]).draft.options == {**options, name: 3}


def test_old_spellings_of_another_kind_are_answered():
    with pytest.raises(ConfigError, match="draft.options.num_layers = 2 is an option of kind 'layer_skip'"):
        load_config(None, ["draft.num_layers=2"])


def test_a_run_in_the_old_spelling_goes_on(tiny_folder, tmp_path, monkeypatch, capsys):
    """Its checkpoint, and a `config.toml` as it was written before."""
    settings = tiny_settings(tiny_folder, tmp_path, "save_steps=1", "draft.options.min_ngram=1", "draft.length=1")
    settings = [text for text in settings if not text.startswith("out=")] + ["grpo.lr_scheduler_type=constant"]

    def specgrpo(*arguments):
        code, _, err = main_like(monkeypatch, capsys, *map(str, arguments))
        assert code == 0, err

    common = ["run", *as_flags(settings), "--draft", "ngram"]
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    specgrpo(*common, "--out", straight, "--steps", 2)
    specgrpo(*common, "--out", parted, "--steps", 1)
    text, _, options = (parted / "config.toml").read_text().partition("\n[draft.options]\n")
    assert options.startswith("min_ngram = 1")
    (parted / "config.toml").write_text(text.replace("\n[draft]\n", "\n[draft]\nmin_ngram = 1\n"))
    specgrpo("run", "--resume", "--out", parted, "--steps", 2)
    found, expected = (load_file(run / "draft" / "draft.safetensors") for run in (parted, straight))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


# What `draft.json` held besides the target: kind, max_length, settings.
OLD_DRAFTS = {
    "medusa": (MedusaHeads.fresh(32, 2), 2, {"hidden_size": 32, "num_heads": 2}),
    "hydra": (
        HydraHeads(32, 2, 5, key=jr.key(1)),
        2,
        {"hidden_size": 32, "num_heads": 2, "inner_size": 5},
    ),
    "eagle": (
        EagleDraft(32, layers=(0, 1), max_length=3, train_length=2, width=16, num_heads=2, key=jr.key(1)),
        3,
        {
            "hidden_size": 32, "layers": [0, 1], "max_length": 3, "train_length": 2, "width": 16, "num_heads": 2,
            "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 48, "rope_theta": 10000.0,
        },
    ),
    "layer_skip": (
        LayerSkipDraft(32, 1, 3, 5, key=jr.key(1)),
        3,
        {"hidden_size": 32, "num_layers": 1, "max_length": 3, "inner_size": 5},
    ),
    "ngram": (
        NGramDraft(2, min_ngram=3, memory_size=4),
        2,
        {
            "max_length": 2, "max_ngram": 4, "min_ngram": 3, "siblings": 16, "memory_size": 4, "memory_length": 256,
            "recalled": 8,
        },
    ),
    "fallback": (
        FallbackDraft(NGramDraft(2, memory_size=4), TemperedDraft(MedusaHeads.fresh(32, 2))),
        2,
        {
            "first": {
                "kind": "ngram", "max_length": 2,
                "settings": {
                    "max_length": 2, "max_ngram": 4, "min_ngram": 2, "siblings": 16, "memory_size": 4,
                    "memory_length": 256, "recalled": 8,
                },
            },
            "then": {
                "kind": "tempered", "max_length": 2,
                "settings": {
                    "draft": {"kind": "medusa", "max_length": 2, "settings": {"hidden_size": 32, "num_heads": 2}}
                },
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OLD_DRAFTS)
def test_a_draft_saved_before_is_loaded(kind, tmp_path):
    draft, max_length, settings = OLD_DRAFTS[kind]
    save_draft(tmp_path, draft, TARGET, "tiny")
    about = json.loads((tmp_path / "draft.json").read_text())
    old = {"kind": kind, "max_length": max_length, "settings": settings, "target": about["target"]}
    (tmp_path / "draft.json").write_text(json.dumps(old))
    # In such files the outputs of one product did not lie in groups.
    assert eqx.tree_equal(load_draft(tmp_path, TARGET), with_grouped_outputs(draft))
    (tmp_path / "draft.json").write_text(json.dumps({**old, "kind": "medsua"}))
    with pytest.raises(CheckpointError, match="'medsua' can't be loaded by this version: known are 'medusa', 'hydra'"):
        load_draft(tmp_path, TARGET)


def test_a_class_named_by_a_relative_path_before(project):
    spec = f"{project / 'mydraft.py'}:MyDraft"
    draft = fresh_draft(spec, TARGET, 2, key=jr.key(0))
    folder = Path("saved")
    save_draft(folder, draft, TARGET, "tiny", spec)
    about = json.loads((folder / "draft.json").read_text())
    assert about["kind"] == spec
    (folder / "draft.json").write_text(json.dumps({**about, "kind": "mydraft.py:MyDraft"}))
    assert describe_saved_draft(folder)["kind"] == spec
    assert load_draft(folder, TARGET).provenance() == {"rank": 4}
