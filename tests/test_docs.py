"""The documentation is true of the code: its Python runs, its commands parse, its tables and links are in order."""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import eqx_specgrpo
from eqx_specgrpo.cli import app
from eqx_specgrpo.config import GRPOConfig, load_config
from eqx_specgrpo.tasks import Arithmetic, ReasoningGymTask

ROOT = Path(__file__).parents[1]
PACKAGE = Path(inspect.getfile(eqx_specgrpo)).parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "results" / "README.md"])
DOCUMENTS = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.ipynb")])


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page, without their fences."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=page_name)
def test_python_blocks_run(page, capsys):
    """In order, in one namespace: a later block may use what an earlier one has made."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, page_name(page), "exec"), namespace)
    printed = capsys.readouterr().out
    if page.name == "losses.md":
        assert "4.5 1.0" in printed
    if any("acceptance length" in block for block in blocks(page, "python")):
        assert re.search(r"acceptance length \d\.\d", printed)


def test_examples_of_the_readme_agree():
    """Its reward function says 1 for the right answer of its task file, and 0 for another."""
    namespace: dict = {}
    reward, _ = blocks(ROOT / "README.md", "python")
    exec(reward, namespace)
    (line,) = blocks(ROOT / "README.md", "json")
    answer = ast.literal_eval(line)["answer"]
    assert namespace["correct"](["It is 16.", "It is 17."], answer=[answer, answer], prompts=None) == [1.0, 0.0]


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
                words = shlex.split(line, comments=True)
                if words[:1] == ["specgrpo"]:
                    yield page_name(page), words[1:]


def test_commands_parse():
    """Every flag exists, and every key that is set."""
    known = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    found = 0
    for page, (name, *arguments) in commands():
        found += 1
        assert name in known, f"{page}: there is no command {name}"
        context = known[name].make_context(name, list(arguments))
        if name == "run":
            load_config(None, context.params["set_"] or [])
    assert found >= 8


SCRIPTS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=page_name)
def test_scripts_use_what_there_is(script):
    """Their imports, and the keywords that they call these with. Most benchmarks run too long for a test, and would
    otherwise be found broken on the day that they are needed."""
    nodes = list(ast.walk(ast.parse(script.read_text(encoding="utf-8"))))
    imported = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eqx_specgrpo"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert alias.name in dir(module), f"{page_name(script)} imports {alias.name} of {node.module}"
                imported[alias.asname or alias.name] = inspect.getattr_static(module, alias.name, None)
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and callable(imported.get(node.func.id)):
            given = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            if not given:
                continue  # exceptions have no signature to look at
            known = inspect.signature(imported[node.func.id]).parameters
            takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
            assert takes_any or given <= set(known), f"{page_name(script)}, line {node.lineno}: {given - set(known)}"


def test_the_test_command_of_the_readme_is_where_ci_looks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    after = text.split("<!-- test-command -->\n")
    assert len(after) == 2 and after[1].startswith("```")
    assert "python -m pytest" in after[1].split("```")[1]


# The fields of GRPOConfig of TRL 1.16 itself, those for vLLM without `vllm_`.
TRL_FIELDS = """
learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32
remove_unused_columns num_generations num_generations_eval max_completion_length ds3_gather_for_generation
shuffle_dataset pad_to_multiple_of generation_batch_size steps_per_generation temperature top_p top_k min_p
generation_kwargs chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_structured_outputs_regex
beta num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos
vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights multi_objective_aggregation scale_rewards
loss_type mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile
entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
max_tool_calling_iterations vllm_importance_sampling_correction vllm_importance_sampling_cap off_policy_mask_threshold
use_bias_correction_kl log_completions log_multimodal num_completions_to_print log_unique_prompts
log_completions_hub_repo use_transformers_continuous_batching transformers_continuous_batching_config
use_transformers_paged logging_steps gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel
torch_empty_cache_steps
""".split()


def test_every_field_of_trl_is_answered():
    """And what is said to have the same name has it."""
    section = (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", section))
    assert len(TRL_FIELDS) == 71 and not set(TRL_FIELDS) - named
    same = re.findall(r"`(\w+)`", section.partition("same meaning:**")[2].partition("\n\n")[0])
    assert len(same) >= 38 and not set(same) - {*GRPOConfig.model_fields, "true", "false"}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page_name(page)} links to {link}"
        if anchor:
            there = target.read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.*)$", there, re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors or f"\n::: {anchor}\n" in there, link


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_no_placeholder_is_left(page):
    """Figures are measured before a page is published."""
    assert not re.findall(r"@@\w+@@", page.read_text(encoding="utf-8"))


def test_every_page_is_on_the_map():
    """`python docs/make_site.py` says so as well, and whether the links of the built site lead somewhere."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = set(re.findall(r"[\w/]+\.md$", navigation, re.MULTILINE))
    pages = {page.relative_to(ROOT / "docs").with_suffix(".md").as_posix() for page in DOCUMENTS}
    assert pages - named == set()


def test_every_headline_name_is_in_the_reference():
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}
    assert set(eqx_specgrpo.__all__) - documented == set()


@pytest.mark.parametrize(
    "script, line",
    [
        ("make_configuration", "| `draft.fraction` | a number greater than 0 and at most 1 | `0.25` |"),
        ("make_benchmarks", "## Rollouts by rows"),
        ("make_checkpoints", "| `is_causal` | refused unless `true` | attention would see later tokens |"),
    ],
)
def test_tables_of_keys_are_up_to_date(script, line):
    spec = importlib.util.spec_from_file_location(script, ROOT / "docs" / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.page(text) == text, f"run: python docs/{script}.py"
    assert line in text


@pytest.mark.parametrize("task", [Arithmetic, ReasoningGymTask])
def test_options_of_tasks_are_documented(task):
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for name, parameter in inspect.signature(task.__init__).parameters.items():
        if name not in ("self", "seed", "name") and parameter.kind is not parameter.VAR_KEYWORD:
            assert f"| `task.{name}` |" in text, name


def metric_patterns() -> set[str]:
    """The names of metrics as they stand in the source; what is filled in at run time is `{}`."""
    patterns = set()
    of_train = (
        "_step.py",
        "_draft_step.py",
        "_loop.py",
        "_segments.py",
        "_step_records.py",
        "_loss_inputs.py",
        "_sample.py",
    )
    of_train += ("_sample.py", "_draft_lessons.py", "_draft_guard.py")
    files = [*(PACKAGE / "train" / name for name in of_train), PACKAGE / "records" / "_times.py"]
    files.append(PACKAGE / "decoding" / "_adaptive.py")
    for file in [*files, *(PACKAGE / "grpo").rglob("_*.py")]:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        fragments = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            match node:
                case ast.Constant() if id(node) in fragments:
                    continue
                case ast.Constant(value=str(text)):
                    patterns.add(text)
                case ast.JoinedStr():
                    parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                    patterns.add("".join(str(part) for part in parts))
    return patterns


def test_table_of_metrics_is_complete():
    """Each name in the table is in the source, and each name with a slash in the source is in the table."""
    text = (ROOT / "docs" / "run_folder.md").read_text(encoding="utf-8")
    section = text.partition("## Metrics\n")[2].partition("\n## ")[0]
    documented = {re.sub(r"\{\w+\}", "{}", name) for name in re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)}
    patterns = metric_patterns()
    phases = {name for name in documented if name.startswith("time/") and name not in patterns}
    assert {name.removeprefix("time/") for name in phases - {"time/step"}} <= patterns and "time/{}" in patterns
    assert documented - phases <= patterns, "no longer in the source"
    families = (
        "reward",
        "completions/",
        "spec/",
        "sampling/",
        "clip_ratio/",
        "draft/",
        "compile/",
        "dynamic_sampling/",
    )
    named = {name for name in patterns if re.fullmatch(r"\w+(/[\w{}]+)+", name) and name.startswith(families)}
    assert len(named) > 20
    assert named - documented == set(), "not in the table of docs/run_folder.md"
