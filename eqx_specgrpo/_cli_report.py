"""`specgrpo report`, a command of `cli.py`."""

from pathlib import Path
from typing import Annotated

import typer

from .runtime import check_output_arrived


def report(
    run_folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The folders of runs, side by side.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="The page to write; else report.html in the run's folder, of several here."
        ),
    ] = None,
) -> None:
    """Write a page of runs for a browser: curves, completions to read, configurations. It needs no network."""
    from .records import write_report

    print(write_report(run_folders, out))
    check_output_arrived()
