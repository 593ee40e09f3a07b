"""Options that several commands of `cli.py` take."""

from pathlib import Path
from typing import Annotated

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
