"""`specgrpo bench`: its arithmetic on made-up times, its order, what it prints, and what it refuses."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import jax.random as jr
import pytest
from helpers import quick_compilation
from tiny_run import as_flags, main_like, tiny_folder as tiny_folder, tiny_model

from eqx_specgrpo.bench import BenchSettings, plot_bench
from eqx_specgrpo.bench._measure import PLAIN, ArmRun, rotating
from eqx_specgrpo.bench._result import BenchResult, expected_length, summarize
from eqx_specgrpo.drafts import HydraHeads, save_draft

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "drafts.py"


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@pytest.fixture
def specgrpo(monkeypatch, capsys):
    """Runs the command line in this process: exit code, stdout and stderr."""
    return lambda *arguments: main_like(monkeypatch, capsys, *map(str, arguments))


def small(folder: Path, *more) -> list:
    settings = [
        "task.prompt='{expression}='",
        "grpo.num_generations=2",
        "grpo.prompts_per_step=2",
        "draft.fraction=0.5",
    ]
    common = [
        "--rows",
        4,
        "--samples",
        2,
        "--max-completion-length",
        8,
        "--rounds",
        2,
        "--lengths",
        "1,2",
        "--minutes",
        0.01,
    ]
    return ["bench", "--model", folder, *as_flags(settings), *common, *more]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "draft"
    save_draft(folder, HydraHeads(32, 2, key=jr.key(0)), tiny_model(), "tiny")
    return folder


#
# Order and arithmetic
#


@pytest.mark.parametrize("arms", [1, 2, 5])
def test_every_arm_once_a_round_and_in_every_place(arms):
    order = list(rotating(arms, 2 * arms))
    for number in range(2 * arms):
        of_round = [(place, arm) for r, place, arm in order if r == number]
        assert [place for place, _ in of_round] == list(range(arms))
        assert sorted(arm for _, arm in of_round) == list(range(arms)) and of_round[0][1] == number % arms
    for arm in range(arms):
        assert sorted(place for _, place, a in order if a == arm) == sorted(2 * list(range(arms)))


def made_up(
    draft, number, seconds, tokens, segments, *, length=0, forwards=10, emitted=10, drafted=(), accepted=(), stolen=None
):
    verifier = None if draft == PLAIN else "block"
    names = ("rows", "rounds", "seconds", "active_rounds", "tokens")
    seen = tuple({"length": length, **dict(zip(names, segment, strict=True))} for segment in segments)
    return ArmRun(
        rows=8, draft=draft, verifier=verifier, length=length, round=number, place=0, seconds=seconds, tokens=tokens,
        target_forwards=forwards, emitted=emitted, drafted=drafted, accepted=accepted, segments=seen,
        compile_seconds=0.0, stolen_seconds=stolen,
    )  # fmt: skip


def test_rates_ratios_and_costs():
    """In the second round the machine is five times as slow: only ratios within a round mean anything."""
    runs = [
        made_up(PLAIN, 0, 2.0, 200, [(8, 10, 1.0, 80, 80), (4, 5, 0.2, 20, 20)]),
        made_up("d", 1, 10.0, 400, [(8, 10, 8.0, 60, 120)],
                length=2, forwards=30, emitted=60, drafted=(30, 30), accepted=(20, 10)),
        made_up(PLAIN, 1, 10.0, 200, [(8, 10, 5.0, 80, 80)]),
        made_up("d", 0, 1.0, 150, [(8, 4, 0.5, 30, 60), (8, 4, 0.7, 30, 45), (4, 1, 0.1, 4, 6)],
                length=2, forwards=10, emitted=18, drafted=(10, 10), accepted=(6, 2)),
    ]  # fmt: skip
    plain, row = summarize(runs)
    assert (plain["draft"], row["draft"], row["verifier"], row["length"], row["rows"]) == (PLAIN, "d", "block", 2, 8)
    assert plain["tokens_per_second"] == {"median": 60.0, "min": 20.0, "max": 100.0}
    assert plain["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert row["tokens_per_second"] == {"median": 95.0, "min": 40.0, "max": 150.0}
    assert row["ratio"] == {"median": 1.75, "min": 1.5, "max": 2.0}
    assert row["acceptance_length"] == pytest.approx(78 / 40)
    assert row["acceptance_rate_by_position"] == pytest.approx([26 / 40, 12 / 40])
    assert row["draft_length"] == 2.0 and plain["draft_length"] == 0.0
    # A round of all eight rows: 0.1 and 0.5 s plainly; 1.2 / 8 and 0.8 s with the draft.
    assert [row["cost_ratio"][name] for name in ("median", "min", "max")] == pytest.approx([1.55, 1.5, 1.6])
    assert row["predicted_ratio"] == pytest.approx(78 / 40 / 1.55)
    assert set(row["by_rows"]) == {"8", "4"} and row["by_rows"]["4"]["tokens_per_round"] == 1.5
    assert row["by_rows"]["8"]["rounds"] == 18
    assert row["by_rows"]["8"]["tokens_per_round"] == pytest.approx((60 + 45 + 120) / 120)
    assert row["mean_completion_length"] == 550 / 16


def test_without_a_round_of_all_rows_there_is_no_cost():
    runs = [made_up(PLAIN, 0, 1.0, 8, []), made_up("d", 0, 1.0, 8, [(8, 1, 1.0, 8, 8)], length=1)]
    row = summarize(runs)[1]
    assert row["cost_ratio"] is None and row["predicted_ratio"] is None and row["ratio"]["median"] == 1.0


@pytest.mark.parametrize("stolen, told", [((None, None), None), ((0.0, 0.3), None), ((None, 3.0), 3), ((1.5, 3.0), 4)])
def test_what_other_machines_took_is_said(stolen, told):
    runs = tuple(made_up(PLAIN, number, 5.0, 8, [], stolen=s) for number, s in enumerate(stolen))
    settings = {"ignore_eos": told is None, "max_rows": 8 if told is None else None}
    found = BenchResult(settings, {}, {}, {}, [], runs, {}).footnote()
    assert ("Ends of sequence were ignored." in found) == (told is None)
    assert ("At most 8 rows were decoded at a time" in found) == (told is None)
    assert ("to others" in found) == (told is not None)
    assert told is None or f"gave {told} s of its processors' time to others in these 10 s." in found


def test_expected_length():
    assert expected_length([0.5, 0.4], 2) == pytest.approx(1 + 0.5 + 0.2)
    assert expected_length([0.5, 0.4], 1) == 1.5
    assert expected_length([0.5], 3) == pytest.approx(1.875)
    assert expected_length([1.0], 8) == 9.0


#
# The command
#


@pytest.fixture(scope="module")
def measured(tiny_folder, saved, tmp_path_factory):
    """One benchmark: a saved draft, and a lookup before a kind that has to be distilled."""
    from typer.testing import CliRunner

    from eqx_specgrpo.cli import app

    picture = tmp_path_factory.mktemp("plot") / "bench.png"
    drafts = ["--draft", saved, "--draft", "ngram+medusa"]
    more = ["--verifiers", "coupled", "--adaptive", "--json", "--plot", picture]
    outcome = CliRunner().invoke(app, list(map(str, small(tiny_folder, *drafts, *more))))
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout), picture, outcome.stderr


def test_json_says_all(measured, saved, tiny_folder):
    found, picture, stderr = measured
    assert set(found) == {
        "settings", "about", "model", "policy", "drafts", "compile_seconds", "results", "runs"
    }  # fmt: skip
    settings = found["settings"]
    assert settings["lengths"] == [0, 1, 2] and settings["verifiers"] == ["coupled"] and settings["dtype"] == "float32"
    assert settings["task"] == {"name": "arithmetic", "prompt": "{expression}="} and settings["seed"] == 0
    assert {"device", "processor", "cores", "load", "versions", "commit", "time"} <= set(found["about"])
    assert found["about"]["versions"]["jax"]
    assert found["model"]["name"] == str(tiny_folder) and found["model"]["vocab_size"] == 260
    assert 0 < found["policy"]["entropy"] < math.log(260) and found["policy"]["tokens"] > 0
    hydra, both = found["drafts"]
    assert hydra["prepared"] == {"distilled": False, "loaded_from": str(saved)} and hydra["class"] == "HydraHeads"
    assert len(hydra["expected_acceptance"]) == 2 and all(0 <= a <= 1 for a in hydra["expected_acceptance"])
    assert both["class"] == "FallbackDraft" and both["prepared"]["updates"] >= 1
    assert both["prepared"]["learned_from_tokens"] > 0 and both["expected_acceptance"] is None
    assert sum(found["compile_seconds"]["4"].values()) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "updates, expected acceptance by position" in stderr and "measured 7 arms in 2 rounds" in stderr
    assert ("too few to judge it by" in stderr) == (both["prepared"]["updates"] < 20)


def test_results_follow_from_the_raw_figures(measured):
    found, _, _ = measured
    arms = {(row["draft"], row["length"]) for row in found["results"]}
    names = [draft["name"] for draft in found["drafts"]]
    assert arms == {(PLAIN, 0)} | {(name, length) for name in names for length in (1, 2, "adaptive")}
    assert len(found["runs"]) == 2 * len(arms)
    assert all(run["stolen_seconds"] is None or run["stolen_seconds"] >= 0 for run in found["runs"])
    # A controller may still ask for a program that it has not had.
    assert all(run["compile_seconds"] == 0 for run in found["runs"] if run["length"] != "adaptive")
    fields = ("drafted", "accepted", "segments")
    runs = [ArmRun(**{**run, **{name: tuple(run[name]) for name in fields}}) for run in found["runs"]]
    again = json.loads(json.dumps(summarize(runs)))
    for row, other in zip(found["results"], again, strict=True):
        expected = row.pop("expected_acceptance_length")
        assert row == other
        assert (expected is None) == (row["draft"] in (PLAIN, *names[1:]) or row["length"] == "adaptive")
        if row["draft"] == PLAIN:
            assert row["acceptance_length"] == 1.0 and row["acceptance_rate_by_position"] == []
        else:
            assert len(row["acceptance_rate_by_position"]) == (2 if row["length"] == "adaptive" else row["length"])
            assert 1 <= row["acceptance_length"] <= 3


def test_every_arm_has_the_same_prompts_and_random_numbers(measured):
    """Coupled completions do not depend on the draft: with the same prompts and keys they are as long."""
    found, _, _ = measured
    for number in (0, 1):
        tokens = {run["tokens"] for run in found["runs"] if run["round"] == number and run["draft"] != PLAIN}
        assert len(tokens) == 1, tokens
    places = [(run["round"], run["place"]) for run in found["runs"]]
    assert places == [(number, place) for number in (0, 1) for place in range(7)]
    assert found["runs"][0]["draft"] == PLAIN and found["runs"][7]["draft"] != PLAIN


def test_table_for_people_and_a_draft_that_is_too_short(tiny_folder, saved, specgrpo):
    more = ["--lengths", "1,4", "--temperature", 0, "--rounds", 1]
    code, out, err = specgrpo(*small(tiny_folder, "--draft", saved, *more))
    assert code == 0, err
    assert "drafts at most 2 tokens: it is not measured at 4" in err
    assert "nats a token" in out and "accept" in out and "greedy" in out and "plain" in out
    assert "expected: " in out  # the explanation below


def test_ends_of_sequence_can_be_ignored_and_rows_held_back(tiny_folder, specgrpo):
    """Two settings in one pair of runs: each takes some seconds."""
    tokens, rows = {}, {}
    for changed in (False, True):
        options = ["--ignore-eos", *as_flags(["grpo.max_rows=8"])] if changed else []
        more = ["--draft", "ngram", "--rows", 16, "--max-completion-length", 48, "--lengths", 2, "--json", *options]
        code, out, err = specgrpo(*small(tiny_folder, *more))
        assert code == 0, err
        found = json.loads(out)
        assert found["settings"]["ignore_eos"] == changed and found["settings"]["max_rows"] == (8 if changed else None)
        tokens[changed] = [run["tokens"] for run in found["runs"]]
        rows[changed] = max(segment["rows"] for run in found["runs"] for segment in run["segments"])
    assert tokens[True] == [16 * 48] * 4 and min(tokens[False]) < 16 * 48
    # `found` is the run with rows held back: a round costs what one with as many as may be in it does.
    assert all(row["cost_ratio"]["median"] > 0 for row in found["results"])
    assert rows == {False: 16, True: 8}


def test_same_arms_of_several_seeds_are_one_line(tmp_path):
    rows = [
        {"rows": 4, "draft": "d", "verifier": "block", "length": length, "ratio": {"median": ratio},
         "acceptance_length": 1.5}
        for length, ratio in ((1, 0.9), (1, 1.1), (2, 1.0), ("adaptive", 1.2))
    ]  # fmt: skip
    assert plot_bench(rows, tmp_path / "a.png", "made up").stat().st_size > 1000


#
# Bad input
#


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--lengths", "9"], "--lengths: a draft length of 9 was asked for, but lengths are 0 to 8"),
        (["--lengths", "0"], "--lengths names no length above 0"),
        (["--lengths", "1,1"], "--lengths 1,1 names something twice"),
        (["--lengths", "a"], "--lengths a: write whole numbers with commas"),
        (["--rows", "4,6", "--samples", "4"], "--rows 6 is no multiple of --samples 4"),
        (["--rows", "0"], "--rows names no number of rows of at least 1"),
        (["--verifiers", "blok"], "there is no verifier 'blok'. Did you mean 'block'?"),
        (["--verifiers", "greedy"], "'greedy' keeps only the likeliest tokens"),
        (["--temperature", "-1"], "--temperature is -1.0, but must be at least 0"),
        (["--top-p", "0"], "--top-p is 0.0, but must be above 0"),
        (["--rounds", "0"], "--rounds is 0, but must be at least 1"),
        (["--minutes", "0"], "--minutes is 0.0, but a draft needs some time"),
        (["--draft", "medussa"], "Did you mean 'medusa'?"),
        (["--draft", "ngram", "--draft", "ngram"], "--draft ngram is given twice"),
        (["--draft", "none"], "--draft none is plain decoding, which is measured anyway"),
        (["--draft", "SAVED", "--lengths", "3,4"], "drafts at most 2 tokens, but --lengths begins with 3"),
        (["--dtype", "float16"], 'it must be one of "float32", "bfloat16"'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_with_a_sentence(arguments, words, tiny_folder, saved, specgrpo):
    arguments = [str(saved) if argument == "SAVED" else argument for argument in arguments]
    code, out, err = specgrpo(*small(tiny_folder, *arguments))
    assert code == 2 and words in err and "Traceback" not in out + err, (code, err)


def test_default_rule_follows_the_temperature():
    assert list(BenchSettings().rules) == ["block"] and list(BenchSettings(temperature=0.0).rules) == ["greedy"]


#
# benchmarks/drafts.py
#


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("benchmark_of_drafts", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_goes_on_where_it_was_stopped(script, tiny_folder, tmp_path, monkeypatch, capsys):
    """A line that was cut short is measured again; what is there is kept; other settings are refused."""
    common = [
        "--rows",
        4,
        "--samples",
        2,
        "--max-completion-length",
        8,
        "--rounds",
        1,
        "--lengths",
        1,
        "--seeds",
        0,
        "--minutes",
        0.01,
    ]
    common += ["--verifiers", "rejection", "--policy", f"tiny={tiny_folder}", "--set", "task.prompt='{expression}='"]
    common += ["--set", "grpo.num_generations=2", "--set", "grpo.prompts_per_step=2", "--out", tmp_path]
    common += ["--set", "hydra:draft.learning_rate=0.002"]

    def run(*more) -> int:
        monkeypatch.setattr(sys, "argv", ["drafts.py", *map(str, [*common, *more])])
        return script.main()

    assert run("--kinds", "hydra,ngram+hydra") == 0
    path = tmp_path / "results.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n" + second[:100])
    assert run("--kinds", "hydra,ngram+hydra") == 0
    records = [json.loads(line) for line in path.read_text().splitlines() if not line == second[:100] and line]
    assert [(r["policy"], r["seed"], r["kind"]) for r in records] == [("tiny", 0, "hydra"), ("tiny", 0, "ngram+hydra")]
    assert path.read_text().startswith(first + "\n")
    hydra, both = records
    assert hydra["drafts"][0]["prepared"]["updates"] >= 1 and hydra["policy_entropy"]["entropy"] > 0
    assert both["drafts"][0]["prepared"] == {"distilled": True, "same_as": "hydra"}
    assert [r["drafts"][0]["settings"]["learning_rate"] for r in records] == [0.002, 0.001]
    assert str(tiny_folder) not in path.read_text()  # results are for sharing
    assert (tmp_path / "tiny-rejection.png").stat().st_size > 1000
    table = (tmp_path / "results.md").read_text()
    assert "| tiny |" in table and "| ngram+hydra | rejection | 4 | 1 | 1 |" in table
    before = path.read_text()
    assert run("--kinds", "hydra") == 0 and path.read_text() == before
    with pytest.raises(SystemExit, match="results with other settings \\(rounds\\)"):
        run("--rounds", 2)
