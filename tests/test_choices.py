"""What can be chosen by name, and the options of it."""

import inspect
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from eqx_specgrpo.choices import Among, described, listed, options_of, permitted_values
from eqx_specgrpo.decoding import VERIFIER_KINDS, VerifierKind
from eqx_specgrpo.distill import DRAFT_LOSS_KINDS
from eqx_specgrpo.drafts import DRAFT_KINDS, draft_options
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.tasks import REWARD_KINDS, TASK_KINDS, task_options


def test_every_option_is_annotated_and_described():
    """The documentation's tables are made of these."""
    options = [draft_options(kind) for kind in DRAFT_KINDS] + [task_options(form) for form in TASK_KINDS]
    known = [(found.of, option) for found in options for option in found.known]
    assert {option.name for _, option in known} >= {"train_length", "num_layers", "model", "min_ngram", "terms", "size"}
    for of, option in known:
        assert option.description and "\n" not in option.description, f"{of}: {option.name}"
        assert permitted_values(option.annotation), f"{of}: {option.name}"


def test_nothing_is_described_twice():
    drafts = [kind.draft for kind in DRAFT_KINDS.values()]
    others = (VERIFIER_KINDS, DRAFT_LOSS_KINDS, REWARD_KINDS)
    assert len(set(drafts)) == len(drafts)
    summaries = [kind.summary for kinds in others for kind in kinds.values()]
    assert all(summaries) and len(set(summaries)) == len(summaries)
    for form, kind in TASK_KINDS.items():
        assert [other for other in TASK_KINDS if TASK_KINDS[other].arguments(form) is not None] == [form], kind


def test_a_file_without_its_description_is_named():
    with pytest.raises(TypeError, match=r"decoding\._verify .*'new'.* must end with VERIFIER = VerifierKind"):
        described("eqx_specgrpo.decoding", {"new": "_verify"}, "VERIFIER", VerifierKind)


def test_names_in_a_row():
    assert listed(["a"]) == "a" and listed({"a": 1, "b": 2}) == "a or b" and listed("abc", "and") == "a, b and c"


def make(
    target,
    size,
    /,
    rank: Annotated[int, Field(ge=1)] = 4,
    *,
    sides: tuple[int, ...] = (1,),
    place: Path | str = "",
    scale: float | None = None,
    kind: Annotated[str, Among(("a", "b"))] = "a",
    free=0,
    key,
):
    """Makes it.

    **Arguments:**

    - `target`: whom.
    - `rank`, `sides`: how wide,
        and how long.
    - `scale`: of it.

    **Returns:**

    - `free`: not an argument here.
    """


OPTIONS = options_of(make, "the thing 'it'", "thing.options.", given=("key",), first=2)


def test_options_are_the_keyword_arguments():
    assert OPTIONS.names == ("rank", "sides", "place", "scale", "kind", "free") and not OPTIONS.open_ended
    told = {option.name: option.description for option in OPTIONS.known}
    assert told == {"rank": "how wide, and how long", "sides": "how wide, and how long", "scale": "of it",
                    "place": "", "kind": "", "free": ""}  # fmt: skip
    assert [option.name for option in OPTIONS.known if option.is_place] == ["place"]
    assert [option.name for option in OPTIONS.known if option.may_be_unset] == ["scale"]


def test_values_become_what_the_function_takes():
    given = {"rank": 8, "sides": [3, 4], "scale": "none", "free": {"any": [1, "thing"]}}
    assert OPTIONS.read(given) == {"rank": 8, "sides": (3, 4), "scale": None, "free": {"any": [1, "thing"]}}
    assert OPTIONS.read({"scale": 1}) == {"scale": 1.0} and OPTIONS.read({}) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "the option 'rank' of the thing 'it' can't be 0: it must be a whole number of at least 1"),
        ({"rank": "8"}, "can't be '8': it must be a whole number of at least 1"),
        ({"rank": True}, "can't be True: it must be a whole number"),
        ({"scale": "big"}, "can't be 'big': it must be a number or \"none\""),
        ({"kind": "c"}, 'can\'t be \'c\': it must be one of "a", "b"'),
        ({"sides": [1, "2"]}, "it must be a list of whole numbers, such as [1, 2]"),
        ({"rnk": 3}, "the thing 'it' has no option 'rnk'. Did you mean 'rank'?"),
        ({"zzz": 3}, "has no option 'zzz'. The choices are: free, kind, place, rank, scale, sides."),
        ({"key": 3}, "'key' is no option of the thing 'it', it is given beside the options"),
        ({"target": 3}, "'target' is no option of the thing 'it'"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(UserError) as info:
        OPTIONS.read(given)
    assert message in str(info.value) and "\n" not in str(info.value)


def test_an_option_without_a_default_is_asked_for():
    def needs(target, size, *, model: str, key):
        """**Arguments:**

        - `model`: which one.
        """

    options = options_of(needs, "the thing 'it'", "thing.options.", given=("key",), first=2)
    with pytest.raises(UserError, match=r"needs its option 'model' \(which one\): set thing.options.model"):
        options.read({})
    assert options.read({}, complete=False) == {} and options.known[0].default is inspect.Parameter.empty


def test_only_what_is_there_becomes_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert OPTIONS.with_absolute_places({"place": "there", "kind": "there"}) == {
        "place": str(tmp_path / "there"),
        "kind": "there",
    }
    assert OPTIONS.with_absolute_places({"place": "org/name"}) == {"place": "org/name"}


def test_an_unknown_draft_is_answered():
    with pytest.raises(UserError, match="no draft 'hydro'. Did you mean 'hydra'?"):
        draft_options("hydro")
