"""The command line: it parses, calls and prints. JAX is imported inside the commands, so that `--help` is immediate."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ._cli_devices import devices
from ._cli_eval import evaluate
from ._cli_generate import generate
from ._cli_options import (
    DRAFT_WORDS,
    LARGEST_SEED,
    MOST_ROWS,
    Adapter,
    Config,
    Model,
    Renamed,
    Set,
    Task,
)
from ._cli_report import report
from .choices import DRAFT_LOSSES, REWARDS, VERIFIERS, listed
from .errors import UserError
from .runtime import (
    check_jax,
    check_output_arrived,
    ending_of_one_of,
    ending_on_our_terms,
    guarded_streams,
    hold_standard_descriptors,
    keep_compiled_programs,
    keep_freed_memory,
    package_version,
    plain_lines_in_notebooks,
    plain_messages,
)

app = typer.Typer(
    name="specgrpo",
    help="GRPO with lossless, continuously distilled speculative decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Runs the command line."""
    hold_standard_descriptors()
    plain_lines_in_notebooks()
    keep_compiled_programs()
    keep_freed_memory()
    with guarded_streams(), plain_messages():
        app()


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
    config: Config = None,
    set_: Set = None,
    model: Model = None,
    adapter: Adapter = None,
    task: Task = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help=f"{listed([*REWARDS, 'package.module:function', 'file.py:function'])}. Repeatable."),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help=f"Folder of a saved draft (draft.path), or {DRAFT_WORDS} (draft.kind)."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps in all, including those before a resume.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random number.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes",
            help="Resume even if the task's data or the starting model has changed since the run began.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved configuration, check what it names, and stop. Calls no reward."
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the processes of a run meet: the first one's host, and a free port. srun and mpirun say so.",
        ),
    ] = None,
    process: Annotated[int | None, typer.Option(min=0, help="Which of the processes this is, from 0.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="How many processes do the run together.")] = None,
) -> None:
    """Train a policy with GRPO, its rollouts decoded speculatively by a draft that keeps learning."""
    from .config import draft_flags, dump_config, load_config

    flags = {} if draft is None else draft_flags(draft)
    flags |= {
        "model.path": model,
        "model.adapter": adapter,
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
        from .config import check_places, load_held_out, load_task_and_rewards, with_steps_of_epochs

        chosen, _ = load_task_and_rewards(resolved)
        load_held_out(resolved)
        resolved = with_steps_of_epochs(resolved, chosen)
        check_places(resolved, resume)
        print(dump_config(resolved), end="")
        check_output_arrived()
        return
    from .layout import join_processes, process_place

    # Before JAX looks for devices, those of the other processes among them.
    together = join_processes(process_place(os.environ, coordinator, process, processes), environment=os.environ)
    check_jax()
    from . import train

    # In a step the first signal only asks; at once is before the steps, after them, or a second time.
    with (
        ending_of_one_of(together.count),
        ending_on_our_terms(
            f"Stopped at once. What was saved in {resolved.out} is whole; go on with: "
            f"specgrpo run --resume --out {shlex.quote(resolved.out)}"
        ),
    ):
        train.run(resolved, resume=resume, accept_changes=accept_changes, processes=together)
        together.close()


@app.command()
def distill(
    config: Config = None,
    out: Annotated[Path, typer.Option(help="The folder to write the draft to.")] = ...,  # pyright: ignore[reportArgumentType]
    set_: Set = None,
    model: Model = None,
    adapter: Adapter = None,
    task: Task = None,
    draft: Annotated[str | None, typer.Option(help=f"Folder of a saved draft to go on with, or {DRAFT_WORDS}.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="The most updates to make; 300 without --minutes.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.01, help="The most time to learn, from the first update on; 10 without --steps."),
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts per batch of rollouts (grpo.prompts_per_step).")] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(help="Longest completion, in tokens (grpo.max_completion_length).")
    ] = None,
    renamed: Renamed = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of sampling (grpo.temperature).")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate (draft.learning_rate).")] = None,
    loss: Annotated[str | None, typer.Option(help=f"Loss of the draft: {listed(DRAFT_LOSSES)} (draft.loss).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random number.")] = None,
) -> None:
    """Train a draft on the model's own completions of a task, for `specgrpo run --draft` and `generate --draft`."""
    del renamed
    from .config import draft_flags, load_config

    flags = {} if draft is None else draft_flags(draft)
    flags |= {
        "model.path": model,
        "model.adapter": adapter,
        "task.name": task,
        "grpo.prompts_per_step": prompts,
        "grpo.max_completion_length": max_completion_length,
        "grpo.temperature": temperature,
        "draft.learning_rate": learning_rate,
        "draft.loss": loss,
        "out": str(out),
        "seed": seed,
    }
    resolved = load_config(config, set_ or [], flags)
    check_jax()
    from . import train

    with ending_on_our_terms(
        f"Stopped at once. What was saved in {resolved.out}, if anything, is whole; go on with it by --draft."
    ):
        train.distill(resolved, steps=steps, minutes=minutes)


app.command("eval")(evaluate)
app.command()(generate)


@app.command()
def verify(
    model: Annotated[str, typer.Option(help="Folder, .gguf file or org/name; without it, the embedded model.")] = "",
    adapter: Adapter = None,
    draft: Annotated[str, typer.Option(help=f"Folder of a saved draft, {DRAFT_WORDS}.")] = "medusa",
    rows: Annotated[int, typer.Option(min=2, max=MOST_ROWS, help="Completions to compare with plain decoding's.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per completion.")] = 32,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the sampling and of fresh weights.")] = 0,
    frozen: Annotated[
        list[str] | None,
        typer.Option(metavar="PLACE", help="A weight that is not to be trained, such as .adapter.scale. Repeatable."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Test that a draft does not change a model's distribution; the exit code is 1 if a check fails."""
    check_jax()
    from .files import print_json
    from .testing import verify_pair

    with ending_on_our_terms("Stopped before everything was checked."):
        certificate = verify_pair(
            model=model,
            adapter=adapter,
            draft=draft,
            rows=rows,
            tokens=tokens,
            seed=seed,
            frozen=frozen or (),
            console=Console(stderr=True),
        )
    if json_:
        print_json(certificate.to_json())
    else:
        console = Console()
        console.print(certificate.table())
        console.print(certificate.verdict(), highlight=False, soft_wrap=True)
    check_output_arrived()
    if not certificate.passed:
        raise typer.Exit(1)


@app.command()
def bench(
    config: Config = None,
    model: Model = None,
    adapter: Adapter = None,
    task: Task = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Folder of a saved draft, {DRAFT_WORDS}; ngram+ before it: behind a lookup. "
            "Repeatable; without it, ngram and medusa."
        ),
    ] = None,
    rows: Annotated[str, typer.Option(help="Completions decoded together.")] = "4,8,16",
    lengths: Annotated[str, typer.Option(help="Tokens drafted per round, besides none.")] = "1,2,3,4",
    adaptive: Annotated[bool, typer.Option("--adaptive", help="Measure a length that adapts as well.")] = False,
    verifiers: Annotated[str, typer.Option(help=f"Some of {listed(VERIFIERS)}; greedy only at temperature 0.")] = "",
    max_completion_length: Annotated[int, typer.Option(help="Longest completion, in tokens.")] = 128,
    renamed: Renamed = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after an end of sequence, to --max-completion-length tokens.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Completions per prompt; must divide the rows.")] = 4,
    temperature: Annotated[float, typer.Option(help="Temperature of sampling; 0 is greedy.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among this number of likeliest tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample among the likeliest tokens whose probabilities add up to this."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Sample among tokens with at least this share of the likeliest token's probability."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Number of times that everything is measured; medians are reported.")] = 5,
    minutes: Annotated[
        float,
        typer.Option(help="Minutes to distil each draft that is not saved, generating completions for it included."),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of every random number.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (model.dtype).")] = None,
    set_: Set = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the figures as well.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object, raw figures included.")] = False,
) -> None:
    """Measure drafts against plain decoding, in turn in one process: acceptance, tokens per second and their ratio."""
    del renamed
    check_jax()
    from .bench import BenchSettings, bench as run_bench, check_plot, plot_bench, whole_numbers
    from .files import print_json

    if plot is not None:
        check_plot(plot)

    settings = BenchSettings(
        rows=whole_numbers("--rows", rows),
        lengths=whole_numbers("--lengths", lengths),
        adaptive=adaptive,
        verifiers=tuple(verifiers.split(",")) if verifiers else (),
        max_completion_length=max_completion_length,
        ignore_eos=ignore_eos,
        samples=samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        rounds=rounds,
        minutes=minutes,
    )
    flags = {"model.path": model, "model.adapter": adapter, "task.name": task, "seed": seed, "model.dtype": dtype}
    check_jax()
    with ending_on_our_terms("Stopped before everything was measured; there is nothing to report."):
        result = run_bench(
            settings, draft or (), path=config, overrides=set_ or [], flags=flags, console=Console(stderr=True)
        )
    if json_:
        print_json(result.to_json())
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(result.table())
        console.print(result.footnote(), highlight=False)
    if plot is not None:
        title = f"{result.model['name']}, {result.policy['entropy']:.2f} nats a token"
        print(plot_bench(result.results(), plot, title), file=sys.stderr)
    check_output_arrived()


@app.command()
def plot(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]) -> None:
    """Draw a run's reward, acceptance length and times into curves.png of its folder (pip install matplotlib)."""
    from .records import plot_run

    print(plot_run(run_folder))
    check_output_arrived()


app.command()(report)
app.command()(devices)
