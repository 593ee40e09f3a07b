"""Drafts from the command line: distilled, continued by a run, of a class of one's own; and refused with a sentence."""

import json
import signal
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation
from safetensors.numpy import load_file
from tiny_run import (
    as_flags,
    main_like,
    tiny_config,
    tiny_folder as tiny_folder,
    tiny_model,
    tiny_settings,
    tiny_tokenizer,
)

from eqx_specgrpo.config import draft_flags, load_config, named_draft
from eqx_specgrpo.config._parts import make_draft, make_parts
from eqx_specgrpo.drafts import (
    AbstractDraft,
    DraftError,
    DraftWarning,
    EagleDraft,
    FallbackDraft,
    HydraHeads,
    LayerSkipDraft,
    MedusaHeads,
    ModelDraft,
    NGramDraft,
    NoDraft,
    describe_saved_draft,
    load_draft,
    save_draft,
)
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.models import cast_weights, load_pretrained
from eqx_specgrpo.records import read_records
from eqx_specgrpo.train._lessons import with_scheduled_rate

EXAMPLE = f"{Path(__file__).parents[1] / 'examples' / 'custom_draft.py'}:MyDraft"


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@pytest.fixture
def specgrpo(monkeypatch, capsys):
    """Runs the command line in this process: exit code, stdout and stderr."""
    return lambda *arguments: main_like(monkeypatch, capsys, *map(str, arguments))


@pytest.fixture
def refused(specgrpo):
    """Runs it on bad input: the one sentence it says."""

    def run(*arguments) -> str:
        code, out, err = specgrpo(*arguments)
        assert code == 2 and err.startswith("error: ") and "Traceback" not in out + err, (code, out, err)
        return err

    return run


def settings(folder: Path, *more: str) -> list[str]:
    """Of the tiny run, without what the flags say."""
    own = [text for text in tiny_settings(folder, folder, *more) if not text.startswith(("out=", "draft.kind="))]
    return as_flags(own)


def distil(folder: Path, out: Path, *arguments) -> list:
    return ["distill", "--out", out, *settings(folder), *arguments]


@pytest.fixture(scope="module")
def distilled(tiny_folder, tmp_path_factory):
    """A short distillation: its folder, and what was printed."""
    out = tmp_path_factory.mktemp("distilled") / "draft"
    with pytest.MonkeyPatch.context() as patch:
        from io import StringIO

        printed = StringIO()
        patch.setattr("sys.stdout", printed)
        # As users have it; what is measured at the end is the length that the draft is meant for all the same.
        more = ["--draft", "hydra", "--steps", 40, "--set", "draft.adaptive=true"]
        patch.setattr("sys.argv", ["specgrpo", *map(str, distil(tiny_folder, out, *more))])
        from eqx_specgrpo.cli import main

        with pytest.raises(SystemExit) as info:
            main()
        assert not info.value.code
    return out, printed.getvalue()


def test_distilling_teaches(distilled, tiny_folder):
    """On rollouts that it has not learned from; and the folder says how it came about."""
    out, text = distilled
    assert {path.name for path in out.iterdir()} == {"draft.json", "draft.safetensors", "distill.json"}
    record = json.loads((out / "distill.json").read_text())
    assert record["finished"] and record["updates"] == 40 and record["started_from"] is None
    assert record["draft"]["kind"] == "hydra" and record["model"] == str(tiny_folder)
    held_out = record["held_out"]
    before, after = held_out["expected_acceptance_before"], held_out["expected_acceptance_after"]
    assert len(before) == len(after) == 3
    assert np.mean(after) > np.mean(before) + 0.05 and held_out["loss_after"] < held_out["loss_before"]
    assert held_out["entropy"] > 0
    assert [entry["update"] for entry in record["history"]] == [1, 10, 20, 30, 40]
    assert 1 < record["decoding"]["acceptance_length"] <= 4
    for words in ("before: ", "update 40/40", "after: ", "acceptance length", f"Draft: {out}"):
        assert words in text, words
    about = json.loads((out / "draft.json").read_text())
    assert (about["kind"], about["max_length"]) == ("hydra", 3)
    assert about["target"]["name"] == str(tiny_folder)


def test_the_rate_rises_then_falls(tiny_folder, tmp_path):
    config = tiny_config(tiny_folder, tmp_path, "draft.learning_rate=0.5")
    parts = make_parts(config, tiny_tokenizer(), NoDraft())

    def rate(update, done):
        return with_scheduled_rate(parts, update, done).config.draft.learning_rate

    assert [rate(0, 0.0), rate(4, 0.1), rate(9, 0.5), rate(50, 0.5)] == pytest.approx([0.05, 0.25, 0.5, 0.5])
    assert [rate(50, 0.75), rate(99, 1.0), rate(1, 0.99)] == pytest.approx([0.25, 0.0, 0.01])


def test_a_run_goes_on_with_it(distilled, tiny_folder, tmp_path, specgrpo):
    """Its kind and length come from the folder; there is no warm-up, and it goes on learning."""
    out = tmp_path / "run"
    code, text, err = specgrpo(
        "run", *settings(tiny_folder, "steps=1"), "--out", out, "--draft", distilled[0], "--set", "draft.warmup=3"
    )
    assert code == 0 and err == "" and "warm-up" not in text, err
    config = load_config(out / "config.toml")
    assert (config.draft.kind, config.draft.max_length, config.draft.path) == ("hydra", 3, str(distilled[0]))
    (record,) = read_records(out / "metrics.jsonl")
    assert record["draft/loss"] > 0
    start, end = load_file(distilled[0] / "draft.safetensors"), load_file(out / "draft" / "draft.safetensors")
    moved = {name: float(np.abs(start[name] - end[name]).max()) for name in start}
    assert set(start) == set(end) and 0 < max(moved.values()) < 0.05


def test_going_on_distilling_in_place(distilled, tiny_folder, tmp_path, specgrpo, refused):
    folder = tmp_path / "draft"
    folder.mkdir()
    for path in distilled[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    message = refused(*distil(tiny_folder, folder, "--draft", "hydra", "--steps", 1))
    assert f"the folder {folder} is not empty" in message and "--draft" in message
    code, _, err = specgrpo(*distil(tiny_folder, folder, "--draft", folder, "--steps", 2, "--learning-rate", 1e-3))
    assert code == 0, err
    record = json.loads((folder / "distill.json").read_text())
    earlier = json.loads((distilled[0] / "distill.json").read_text())
    assert record["started_from"] == str(folder) and record["draft"]["learning_rate"] == 1e-3
    assert record["held_out"]["expected_acceptance_before"] == pytest.approx(
        earlier["held_out"]["expected_acceptance_after"], abs=1e-4
    )


def test_ctrl_c_keeps_what_was_learned(tiny_folder, tmp_path, specgrpo, monkeypatch):
    from eqx_specgrpo.train import _distill

    learn, done = _distill.learn_lesson, []

    def learn_and_interrupt(*arguments):
        done.append(None)
        if len(done) == 5:
            signal.raise_signal(signal.SIGINT)
        return learn(*arguments)

    monkeypatch.setattr(_distill, "learn_lesson", learn_and_interrupt)
    before = signal.getsignal(signal.SIGINT)
    code, text, err = specgrpo(*distil(tiny_folder, tmp_path / "draft", "--draft", "hydra", "--minutes", 5))
    assert code == 130 and err == "" and "Ctrl-C: finishing" in text, err
    assert "Stopped by Ctrl-C after 5 updates; what was learned is in" in text
    assert signal.getsignal(signal.SIGINT) is before and len(done) == 5
    record = json.loads((tmp_path / "draft" / "distill.json").read_text())
    assert record["updates"] == 5 and not record["finished"] and "decoding" not in record
    model, _ = load_pretrained(tiny_folder)
    draft = load_draft(tmp_path / "draft", model)
    assert float(jnp.abs(draft.heads[0].down.weight).max()) > 0


def test_the_time_counts_from_the_first_update(tiny_folder, tmp_path, specgrpo, monkeypatch):
    """Loading, compiling and the rollouts before it take longer than there is."""
    from eqx_specgrpo.train import _distill

    make = _distill.make_lesson

    def slow(*arguments):
        time.sleep(0.4)
        return make(*arguments)

    monkeypatch.setattr(_distill, "make_lesson", slow)
    code, text, err = specgrpo(*distil(tiny_folder, tmp_path / "draft", "--draft", "hydra", "--minutes", 0.01))
    record = json.loads((tmp_path / "draft" / "distill.json").read_text())
    assert code == 0 and record["updates"] > 1 and record["finished"] and "after: " in text, err
    assert record["held_out"]["loss_after"] != record["held_out"]["loss_before"]


def test_an_error_keeps_what_was_learned(tiny_folder, tmp_path, refused, monkeypatch):
    from eqx_specgrpo.train import _distill

    learn, done = _distill.learn_lesson, []

    def fail_at_the_third(*arguments):
        done.append(None)
        if len(done) == 3:
            raise UserError("the third update")
        return learn(*arguments)

    monkeypatch.setattr(_distill, "learn_lesson", fail_at_the_third)
    assert "the third update" in refused(*distil(tiny_folder, tmp_path / "draft", "--draft", "hydra", "--steps", 9))
    record = json.loads((tmp_path / "draft" / "distill.json").read_text())
    assert record["updates"] == 2 and not record["finished"]
    assert (tmp_path / "draft" / "draft.safetensors").is_file()


def test_a_stop_before_the_first_update_saves_nothing(tiny_folder, tmp_path, specgrpo, monkeypatch):
    from eqx_specgrpo.train import _distill

    lessons, make = [], _distill.make_lesson

    def terminate_in_the_second(*arguments):
        lessons.append(None)
        if len(lessons) == 2:
            signal.raise_signal(signal.SIGTERM)
        return make(*arguments)

    monkeypatch.setattr(_distill, "make_lesson", terminate_in_the_second)
    code, text, err = specgrpo(*distil(tiny_folder, tmp_path / "draft", "--draft", "hydra", "--steps", 9))
    assert code == 143 and err == "" and "before anything was learned; nothing is saved" in text, err
    assert not (tmp_path / "draft").exists()


def test_the_place_is_tried_before_the_work(tiny_folder, tmp_path, refused, monkeypatch):
    from eqx_specgrpo.train import _distill

    monkeypatch.setattr(_distill, "load_policy", None)  # it does not come to that
    (tmp_path / "file").write_text("")
    message = refused(*distil(tiny_folder, tmp_path / "file" / "draft", "--draft", "hydra", "--steps", 1))
    assert "file/draft cannot be written" in message and "--out" in message
    for limits in ({"steps": 0}, {"minutes": 0.0}, {"minutes": float("nan")}):
        with pytest.raises(UserError, match="leave no time to learn"):
            _distill.distill(tiny_config(tiny_folder, tmp_path / "draft"), **limits)


def test_what_can_not_be_distilled(tiny_folder, tmp_path, refused):
    out = tmp_path / "draft"
    assert "'ngram' has nothing to train" in refused(*distil(tiny_folder, out, "--draft", "ngram"))
    assert "draft.kind = 'none'" in refused(*distil(tiny_folder, out, "--draft", "none"))
    message = refused(*distil(tiny_folder, out, "--draft", "medusas"))
    assert "no saved draft in 'medusas'" in message and "Did you mean 'medusa'" in message
    assert "draft.loss" in refused(*distil(tiny_folder, out, "--loss", "mse"))
    assert not out.exists()


#
# A class of one's own
#


def test_the_example_is_trained_saved_and_goes_on(tiny_folder, tmp_path, specgrpo):
    out = tmp_path / "run"
    code, _, err = specgrpo("run", *settings(tiny_folder, "steps=1"), "--out", out, "--draft", EXAMPLE)
    assert code == 0, err
    (record,) = read_records(out / "metrics.jsonl")
    assert record["draft/loss"] > 0 and record["spec/draft_length"] == 3
    about = json.loads((out / "draft" / "draft.json").read_text())
    assert about["kind"] == EXAMPLE and about["max_length"] == 3
    model, _ = load_pretrained(out / "policy")
    draft = load_draft(out / "draft", model)
    saved = load_file(out / "checkpoints" / "step-000001" / "draft.safetensors")
    assert type(draft).__name__ == "MyDraft"
    for name, array in saved.items():
        module, leaf = name.split(".")
        np.testing.assert_array_equal(vars(vars(draft)[module])[leaf], array)

    resolved = load_config(None, [], draft_flags(str(out / "draft")))
    assert resolved.draft.kind == EXAMPLE and resolved.draft.max_length == 3


OWN = """
from eqx_specgrpo.drafts import HydraHeads, MedusaHeads, NGramDraft

def make(target, max_length, *, key):
    return MedusaHeads.fresh(target.hidden_size, max_length)

def too_short(target, max_length, *, key):
    return MedusaHeads.fresh(target.hidden_size, 1)

def too_wide(target, max_length, *, key):
    return MedusaHeads.fresh(2 * target.hidden_size, max_length)

def raises(target, max_length, *, key):
    return [][max_length]

def nothing(target, max_length, *, key):
    return None
"""


def test_bad_classes(tiny_folder, tmp_path, refused):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    model = tiny_model()
    for name, words in {
        "too_short": ("max_length 4", "returned one of 1"),
        "too_wide": ("size 64", "32"),
        "raises": ("IndexError", "own.py, line "),
        "nothing": ("returned NoneType", "AbstractDraft"),
        "mak": ("no class 'mak'", "Did you mean 'make'"),
    }.items():
        with pytest.raises(UserError) as info:
            named_draft(f"{own}:{name}", model)
        assert all(word in str(info.value) for word in words), str(info.value)
    with pytest.raises(UserError, match="no_such.py doesn't exist"):
        named_draft(f"{tmp_path}/no_such.py:Draft", model)
    message = refused("run", "--dry-run", "--draft", f"{own}:mak", "--out", tmp_path / "run")
    assert "Did you mean 'make'" in message


class Own(AbstractDraft):
    """As the example's, but with sizes that can change between saving and loading."""

    weight: jax.Array
    width: int = eqx.field(static=True)
    max_length: int = eqx.field(static=True)
    train_length: int = eqx.field(static=True, default=1)
    layers: tuple[int, ...] = eqx.field(static=True, default=())

    check = init = propose = commit = train_hidden = train_logits = lambda self, *arguments: None

    def provenance(self):
        return {"width": self.width}


WIDTH = [5]


def make_own(target, max_length, *, key):
    return Own(jr.normal(key, (WIDTH[0],)), WIDTH[0], max_length)


def test_saving_a_class_of_ones_own(tmp_path, monkeypatch):
    target, spec = tiny_model(), f"{__name__}:make_own"
    draft = make_own(target, 2, key=jr.key(3))
    save_draft(tmp_path, draft, target, "tiny", spec)
    assert describe_saved_draft(tmp_path) == {"kind": spec, "max_length": 2, "ngram": False}
    assert eqx.tree_equal(load_draft(tmp_path, target), draft, typematch=True)

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "WIDTH", [6])
        with pytest.raises(UserError, match=r"settings \{'width': 5\}, but the class makes \{'width': 6\} now"):
            load_draft(tmp_path, target)
    save_draft(tmp_path, draft, target, "tiny", "gone_since.py:Draft")
    with pytest.raises(UserError, match="gone_since.py:Draft, which can't be made: .*its new place.*draft.json"):
        load_draft(tmp_path, target)


def test_layers_that_the_target_has_not():
    draft = Own(jnp.zeros(2), 2, 3, layers=(0, 7))
    with pytest.raises(DraftError, match=r"layers \(0, 7\), counted from 0, but the target has 2"):
        from eqx_specgrpo.drafts import check_fit

        check_fit(draft, tiny_model())


#
# Kinds
#


@pytest.mark.parametrize(
    "overrides, kind",
    [
        (["draft.kind=medusa"], MedusaHeads),
        (["draft.kind=hydra"], HydraHeads),
        (["draft.kind=eagle", "draft.options.train_length=2"], EagleDraft),
        (["draft.kind=layer_skip", "draft.options.num_layers=1"], LayerSkipDraft),
        (["draft.kind=ngram", "draft.options.min_ngram=5"], NGramDraft),
        (["draft.kind=hydra", "draft.ngram=true"], FallbackDraft),
        (["draft.kind=model"], ModelDraft),
    ],
    ids=lambda value: "" if isinstance(value, list) else value.__name__,
)
def test_every_kind_is_made_saved_and_loaded(overrides, kind, tiny_folder, tmp_path):
    """From the configuration; and again from its folder, which says what it is."""
    target, tokenizer = load_pretrained(tiny_folder)
    if kind is ModelDraft:
        overrides = [*overrides, f"draft.options.model={tiny_folder}"]
    config = load_config(None, ["model.path=x", "draft.max_length=3", *overrides]).draft
    draft = make_draft(config, target, seed=1, tokenizer=tokenizer)
    assert isinstance(draft, kind) and draft.max_length == 3
    match draft:
        case EagleDraft():
            assert draft.train_length == 2
        case LayerSkipDraft():
            assert draft.num_layers == 1
        case NGramDraft():
            assert (draft.min_ngram, draft.max_ngram, draft.train_length) == (5, 5, 0)
        case FallbackDraft():
            assert isinstance(draft.first, NGramDraft) and draft.first.min_ngram == 3
            assert isinstance(draft.then, HydraHeads)
    save_draft(tmp_path, draft, target, "tiny")
    again = named_draft(str(tmp_path), target, tokenizer)
    # Weights that were on the host come back on the device.
    assert eqx.tree_equal(*(jax.tree.map(lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, tree)
                            for tree in (again, draft)))  # fmt: skip
    if kind is FallbackDraft:
        config = load_config(None, [f"draft.path={tmp_path}", "draft.ngram=false"]).draft
        assert isinstance(make_draft(config, target), HydraHeads)


def test_a_draft_without_weights_runs_and_resumes(tiny_folder, tmp_path, specgrpo):
    """Its memory of earlier rollouts grows, is in the checkpoints, and comes back whole."""
    common = [*settings(tiny_folder, "save_steps=1", "grpo.lr_scheduler_type=constant"), "--draft", "ngram"]
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    assert specgrpo("run", *common, "--out", straight, "--steps", 2)[0] == 0
    assert specgrpo("run", *common, "--out", parted, "--steps", 1)[0] == 0
    first = load_file(parted / "draft" / "draft.safetensors")
    code, _, err = specgrpo("run", "--resume", "--out", parted, "--steps", 2)
    assert code == 0, err
    found, expected = (load_file(run / "draft" / "draft.safetensors") for run in (parted, straight))
    assert all(np.issubdtype(array.dtype, np.integer) for array in expected.values())
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert any(not np.array_equal(first[name], expected[name]) for name in first)
    records = read_records(straight / "metrics.jsonl")
    assert all("draft/loss" not in record and record["spec/draft_length"] == 3 for record in records)


#
# Another target
#


def test_a_draft_for_another_model_of_equal_sizes_is_told_of(tmp_path, recwarn):
    target = tiny_model()
    save_draft(tmp_path, MedusaHeads.fresh(32, 3), target, "the first model")
    # Itself, in either dtype, and itself after training.
    noise = 0.01 * float(jnp.std(target.embedding)) * jr.normal(jr.key(1), target.embedding.shape)
    for same in (target, cast_weights(target, jnp.bfloat16), _embedding(target, target.embedding + noise)):
        load_draft(tmp_path, same)
    assert not recwarn
    # Other weights, or the same weights under other token ids.
    another = _embedding(target, 0.4 * jr.normal(jr.key(2), target.embedding.shape))
    for other in (another, _embedding(target, jnp.roll(target.embedding, 1, axis=0))):
        with pytest.warns(DraftWarning, match="trained for 'the first model', and this target is another model"):
            load_draft(tmp_path, other)


def _embedding(model, embedding):
    return eqx.tree_at(lambda m: m.embedding, model, embedding)


def test_the_command_line_shows_the_warning(tiny_folder, tmp_path, specgrpo):
    other = _embedding(tiny_model(), 0.4 * jr.normal(jr.key(2), (260, 32)))
    save_draft(tmp_path, MedusaHeads.fresh(32, 3), other, "another model")
    code, out, err = specgrpo(
        "generate", "--model", tiny_folder, "--prompt", "1 + 2=", "--max-completion-length", 4, "--draft", tmp_path
    )
    assert code == 0 and err.startswith("warning: the draft in ") and "'another model'" in err.splitlines()[0]
    assert ".py" not in err.splitlines()[0]
