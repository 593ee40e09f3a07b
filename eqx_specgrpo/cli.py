"""The command line: it parses, calls and prints. JAX is imported inside the commands, so that `--help` is immediate."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ._errors import UserError
from ._version import package_version

app = typer.Typer(
    name="specgrpo",
    help="GRPO with lossless, continuously distilled speculative decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Runs the command line. A `UserError` is its message and exit code 2; any other exception is ours, and shown."""
    try:
        app()
    except UserError as error:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        for line in str(error).splitlines():
            console.print(f"[bold red]error:[/] {escape(line)}")
        sys.exit(error.exit_code)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(package_version())
        raise typer.Exit()
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    del version


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="Configuration; without one, the embedded default.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set grpo.beta=0.01. Repeatable."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder, .gguf file or org/name (model.path).")] = None,
    task: Annotated[str | None, typer.Option(help="arithmetic, FILE.jsonl or reasoning_gym:NAME (task.name).")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="Built-in name, package.module:function or file.py:function. Repeatable."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps in all, those before a resume included.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration, check what it names, and stop.")
    ] = False,
) -> None:
    """Train a policy with GRPO, its rollouts decoded speculatively by a draft that keeps learning."""
    from .train._load_config import dump_config, load_config

    flags = {
        "model.path": model,
        "task.name": task,
        "reward.functions": reward or None,
        "steps": steps,
        "out": None if out is None else str(out),
        "seed": seed,
    }
    overrides = set_ or []
    if resume and config is None:
        # What is not said again stays as it was: the run's own configuration is the base.
        elsewhere = [override for override in overrides if override.partition("=")[0].strip() == "out"]
        flags["out"] = flags["out"] or load_config(None, elsewhere).out
        config = Path(flags["out"]) / "config.toml"
        if not config.exists():
            raise UserError(
                f"there is no run to resume in {config.parent}: leave out --resume, or name its folder with --out"
            )
    resolved = load_config(config, overrides, flags)
    if dry_run:
        from .train._check import check_places, load_task_and_rewards

        load_task_and_rewards(resolved)
        check_places(resolved, resume)
        print(dump_config(resolved), end="")
        return
    from . import train

    try:
        train.run(resolved, resume=resume, console=Console())
    except KeyboardInterrupt:
        # In a step the first Ctrl-C only asks; here it came before the steps, after them, or a second time.
        print(
            f"Stopped at once. What was saved in {resolved.out} is whole; go on with: "
            f"specgrpo run --resume --out {shlex.quote(resolved.out)}",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="The prompt's text.")],
    model: Annotated[str, typer.Option(help="Folder, .gguf file or org/name; without it, the embedded model.")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    draft: Annotated[str | None, typer.Option(help="Folder of a saved draft; without it, plain decoding.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample among the likeliest tokens that make up this probability."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 128,
    num: Annotated[int, typer.Option(min=1, help="Completions of the prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a completion.")] = False,
) -> None:
    """Complete a prompt, speculatively where a draft is given; the distribution is the model's either way."""
    if not prompt:
        raise UserError("--prompt is empty: give it some text")
    from . import train

    completions: list[dict[str, Any]] = train.generate_text(
        prompt,
        model=model,
        chat=chat,
        draft=draft,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        num=num,
        seed=seed,
    )
    for number, completion in enumerate(completions):
        if json_:
            print(json.dumps(completion, ensure_ascii=False))
            continue
        if number:
            print("---")
        print(completion["text"])
        print(
            f"[{len(completion['tokens'])} tokens, {completion['target_forwards']} target passes, acceptance length "
            f"{completion['acceptance_length']:.2f}, stopped by {completion['stop_reason']}]",
            file=sys.stderr,
        )


@app.command()
def plot(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]) -> None:
    """Draw a run's reward, acceptance length and times into curves.png of its folder."""
    from .train._report import plot_run

    print(plot_run(run_folder))
