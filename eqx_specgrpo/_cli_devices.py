"""`specgrpo devices`, a command of `cli.py`."""

import sys
from typing import Annotated

import typer

from ._cli_options import Config, Model, Set
from .runtime import check_jax, check_output_arrived


def devices(
    config: Config = None,
    set_: Set = None,
    model: Model = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="How many devices there will be; by default those of this machine.")
    ] = None,
    memory: Annotated[float | None, typer.Option(metavar="GIB", min=0.0, help="Memory of each, in GiB.")] = None,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 256,
) -> None:
    """Say how a run would be divided over devices, what each of them would hold, and whether that fits."""
    check_jax()
    from rich.console import Console

    from .config import load_config, model_name
    from .train import device_tables, plan_devices

    resolved = load_config(config, set_ or [], {"model.path": model})
    size = None if memory is None else int(memory * 2**30)
    plan = plan_devices(resolved, count=count, memory=size, prompt_length=prompt_length)
    print(f"A run with {model_name(resolved)}:")
    console = Console(width=None if sys.stdout.isatty() else 120)
    for part in device_tables(plan):
        console.print(part, highlight=False)
    check_output_arrived()
