"""`draft.vocabulary` and `draft.fit_temperature`, from the configuration to a run's folder."""

import json
import runpy
import shutil
import sys

import jax
import numpy as np
import pytest
from helpers import quick_compilation, tiny_transformer
from tiny_run import tiny_config, tiny_folder as tiny_folder, tiny_model, tiny_tokenizer

from eqx_specgrpo.config import load_config
from eqx_specgrpo.config._parts import make_draft
from eqx_specgrpo.drafts import (
    DraftError,
    FallbackDraft,
    MedusaHeads,
    ReducedVocabulary,
    TemperedDraft,
    draft_vocabulary,
    load_draft,
    save_draft,
    tempered_part,
    with_vocabulary,
)
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.models import load_model
from eqx_specgrpo.train import run


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


TARGET = tiny_model()


def made(*settings):
    return make_draft(load_config(None, settings).draft, TARGET, 0, tiny_tokenizer())


def test_a_fresh_vocabulary_begins_with_the_end_of_a_sequence_and_the_lowest_ids():
    draft = made("draft.vocabulary=5")
    ends = list(tiny_tokenizer().eos_ids)
    expected = [*ends, *(i for i in range(9) if i not in ends)][:5]
    assert ends and draft_vocabulary(draft).support.tolist() == expected
    assert draft_vocabulary(made()).size == 0
    draft = made("draft.vocabulary=5", "draft.kind=hydra", "draft.ngram=true", "draft.fit_temperature=true")
    assert isinstance(draft, FallbackDraft) and isinstance(draft.then, TemperedDraft)
    assert draft_vocabulary(draft).size == 5
    assert tempered_part(made()) is None


def test_a_large_vocabulary_is_reduced_unless_told_otherwise():
    large = tiny_transformer(vocab_size=16_385, num_layers=1, hidden_size=4)

    def size(*settings, target=large):
        return draft_vocabulary(make_draft(load_config(None, settings).draft, target, 0, tiny_tokenizer())).size

    assert size() == size("draft.kind=hydra", "draft.ngram=true") == 8192
    assert size("draft.vocabulary=0") == 0 and size("draft.vocabulary=100") == 100
    # Nothing to exchange; and not much larger.
    assert size("draft.kind=ngram") == 0
    assert size(target=tiny_transformer(vocab_size=16_384, num_layers=1, hidden_size=4)) == 0


def test_a_saved_draft_keeps_its_vocabulary_unless_told_otherwise(tmp_path):
    heads = MedusaHeads.fresh(TARGET.hidden_size, 3)
    save_draft(tmp_path, with_vocabulary(heads, ReducedVocabulary([7, 200, 3])), TARGET, "tiny")

    def ids(*settings):
        support = draft_vocabulary(made(f"draft.path={tmp_path}", *settings)).support
        return None if support is None else support.tolist()

    end = tiny_tokenizer().eos_ids[0]
    assert ids() == ids("draft.vocabulary=3") == [7, 200, 3]
    assert ids("draft.vocabulary=2") == [7, 200]
    assert ids("draft.vocabulary=4") == [7, 200, 3, end]
    assert ids("draft.vocabulary=0") is None


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="draft.vocabulary = 261, but the model's has only 260 tokens"):
        made("draft.vocabulary=261")
    for setting in ("draft.vocabulary=5", "draft.fit_temperature=true"):
        with pytest.raises(UserError, match="option of drafts that have probabilities, but draft.kind is 'ngram'"):
            made("draft.kind=ngram", setting)
    with pytest.raises(UserError, match="draft.vocabulary"):
        made("draft.vocabulary=-1")
    assert issubclass(DraftError, UserError)


def test_a_run_keeps_both_up_to_date_and_resumes(tiny_folder, tmp_path):
    config = tiny_config(
        tiny_folder, tmp_path / "run", "steps=3", "save_steps=2", "draft.vocabulary=40", "draft.fit_temperature=true"
    )
    folder = run(config).folder
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
    for record in records:
        assert 0.1 < record["draft/coverage"] <= 1
        assert 0 < record["draft/tempered_acceptance_pos_2"] <= 1 and record["draft/temperature_pos_2"] > 0
    # Refreshed and fitted, without another program.
    assert records[-1]["compile/count"] == records[0]["compile/count"]

    def draft():
        return load_draft(folder / "draft", load_model(folder / "policy"))

    whole = draft()
    ids = np.asarray(draft_vocabulary(whole).support)
    assert len(ids) == 40 and (ids != draft_vocabulary(made("draft.vocabulary=40")).support).any()
    assert np.asarray(tempered_part(whole).steps).any()

    # The last step once more, from the checkpoint before it.
    shutil.rmtree(folder / "checkpoints" / "step-000003")
    run(config, resume=True)
    np.testing.assert_array_equal(draft_vocabulary(draft()).support, ids)
    np.testing.assert_array_equal(tempered_part(draft()).steps, tempered_part(whole).steps)


MINE = """
from eqx_specgrpo.drafts import FallbackDraft, HydraHeads, NGramDraft


class Mine(HydraHeads):
    def __init__(self, target, max_length, *, key):
        super().__init__(target.hidden_size, max_length, key=key)

    def provenance(self):
        return {}


def both(target, max_length, *, key):
    return FallbackDraft(NGramDraft(max_length), Mine(target, max_length, key=key))
"""


def test_what_a_function_puts_together_comes_back_in_its_own_parts(tmp_path):
    """Its parts are saved by their own classes, not by the function's name; a subclass is not its base."""
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    draft = made(f"draft.kind={path}:both")
    save_draft(tmp_path / "draft", draft, TARGET, "tiny", f"{path}:both")
    loaded = load_draft(tmp_path / "draft", TARGET)
    assert isinstance(loaded, FallbackDraft) and type(loaded.then).__name__ == "Mine"
    assert jax.tree.structure(loaded) == jax.tree.structure(draft)


def test_a_class_of_a_file_is_found_again_by_that_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    for kind in ("Mine", "both"):
        draft = made(f"draft.kind={path}:{kind}")
        save_draft(tmp_path / kind, draft, TARGET, "tiny")
        loaded = load_draft(tmp_path / kind, TARGET)
        assert type(loaded) is type(draft) and jax.tree.structure(loaded) == jax.tree.structure(draft)
    assert json.loads((tmp_path / "Mine" / "draft.json").read_text())["kind"] == f"{path.resolve()}:Mine"


# Saves a draft of a class that it defines itself, and asks for it again.
SCRIPT = (
    MINE
    + """
if __name__ == "__main__":
    import sys
    from pathlib import Path

    import jax.random as jr
    from tiny_run import tiny_model

    from eqx_specgrpo.drafts import load_draft, save_draft

    target, folder = tiny_model(), Path(sys.argv[1])
    save_draft(folder, Mine(target, 2, key=jr.key(0)), target, "tiny")
    assert type(load_draft(folder, target)) is Mine
"""
)


@pytest.mark.parametrize("how", ["python file.py", "python -m package.module"])
def test_a_class_of_a_script_is_found_again(how, tmp_path, monkeypatch):
    package = tmp_path / "package_of_drafts"
    package.mkdir()
    path = package / "script.py"
    path.write_text(SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", str(tmp_path / "draft")])
    if how == "python file.py":
        runpy.run_path(str(path), run_name="__main__")
        kind = f"{path.resolve()}:Mine"
    else:
        runpy.run_module("package_of_drafts.script", run_name="__main__", alter_sys=True)
        kind = "package_of_drafts.script:Mine"
    assert json.loads((tmp_path / "draft" / "draft.json").read_text())["kind"] == kind
    loaded = load_draft(tmp_path / "draft", TARGET)
    assert type(loaded).__name__ == "Mine" and loaded.max_length == 2
    sys.modules.pop("package_of_drafts.script", None)
