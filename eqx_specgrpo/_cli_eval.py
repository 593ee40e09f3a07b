"""`specgrpo eval`, a command of `cli.py`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ._cli_options import DRAFT_WORDS, LARGEST_SEED, MOST_ROWS, Adapter, Config, Model, Renamed, Set
from .choices import REWARDS, TASKS, listed
from .errors import UserError
from .runtime import check_jax, check_output_arrived, ending_on_our_terms


def evaluate(
    config: Config = None,
    model: Model = None,
    adapter: Adapter = None,
    draft: Annotated[
        str | None, typer.Option(help=f"Folder of a saved draft, {DRAFT_WORDS}; without it, plain decoding.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help=f"What to measure on: {listed(TASKS)} (eval.task). Without it, what the configuration says."),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help=f"{listed([*REWARDS, 'file.py:function'])} (eval.functions). Repeatable."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, max=MOST_ROWS, help="Completions of each prompt (eval.samples).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The most prompts (eval.limit).")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy (eval.temperature).")] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(min=1, help="Longest completion, in tokens (eval.max_completion_length).")
    ] = None,
    renamed: Renamed = None,
    seed: Annotated[int | None, typer.Option(min=0, max=LARGEST_SEED, help="Seed of every random number.")] = None,
    set_: Set = None,
    completions: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write the completions there, one JSON object each.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model: mean reward, pass@k, the best and the majority of its completions, with intervals."""
    del renamed
    check_jax()
    from .config import load_config
    from .files import print_json
    from .train import evaluate_model

    flags: dict[str, Any] = {
        "model.path": model,
        "model.adapter": adapter,
        "eval.task": task,
        "eval.holdout": None if task is None else 0,
        "eval.functions": reward or None,
        "eval.samples": samples,
        "eval.limit": limit,
        "eval.temperature": temperature,
        "eval.max_completion_length": max_completion_length,
        "seed": seed,
        "save_best": "none",
    }
    resolved = load_config(config, set_ or [], flags)
    with ending_on_our_terms("Stopped before everything was measured; there is nothing to report."):
        found = evaluate_model(resolved, draft=draft, apart=task is None, console=Console(stderr=True))
    if completions is not None:
        _write(completions, found.completions)
    if json_:
        print_json(found.to_json())
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(found.table())
    check_output_arrived()


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    from .files import json_line

    try:
        path.write_text("".join(json_line(record) + "\n" for record in records), "utf-8", "replace")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another file") from error
