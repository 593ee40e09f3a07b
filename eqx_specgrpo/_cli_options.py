"""Options that several commands of `cli.py` take."""

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from .choices import DRAFTS, TASKS, listed
from .errors import UserError

DRAFT_WORDS = f"{', '.join(DRAFTS)} or file.py:Class"
LARGEST_SEED = 2**32 - 1
MOST_ROWS = 2**16


def _say_its_name(given: str | None) -> None:
    if given is not None:
        raise UserError(
            "the longest completion is --max-completion-length in every command, as grpo.max_completion_length: write "
            f"--max-completion-length {given}"
        )


# What one thing is called elsewhere, or was here: answered with its name.
Renamed = Annotated[
    str | None, typer.Option("--max-new-tokens", "--max-new", "--new", hidden=True, callback=_say_its_name)
]


def _say_num_generations(given: str | None) -> None:
    if given is not None:
        raise UserError(
            f"the number of completions is --num-generations, as grpo.num_generations: write --num-generations {given}"
        )


RenamedNum = Annotated[str | None, typer.Option("--num", hidden=True, callback=_say_num_generations)]


def template_variables(text: str | None) -> dict[str, Any]:
    """The table of `--chat-template-kwargs`."""
    try:
        table = tomllib.loads(f"value = {text}")["value"] if text else {}
    except ValueError as error:
        raise UserError(f"--chat-template-kwargs {text}: no table of TOML: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"--chat-template-kwargs {text}: write a table, such as '{{enable_thinking = false}}'")
    return table


# What several commands take.
Config = Annotated[
    Path | None, typer.Argument(metavar="CONFIG.toml", help="Configuration; without one, the embedded default.")
]
Adapter = Annotated[str | None, typer.Option(help="Folder of an adapter in PEFT's format (model.adapter).")]
Model = Annotated[str | None, typer.Option(help="Folder, .gguf file or org/name (model.path).")]
Task = Annotated[str | None, typer.Option(help=f"{listed(TASKS)} (task.name).")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set grpo.beta=0.01. Repeatable."),
]
