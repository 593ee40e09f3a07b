"""`specgrpo generate`, a command of `cli.py`."""

import sys
import tomllib
from typing import Annotated, Any

import typer

from ._cli_options import DRAFT_WORDS, LARGEST_SEED, MOST_ROWS, Adapter, Renamed
from .errors import UserError
from .runtime import as_typed, check_jax, check_output_arrived, ending_on_our_terms


def _say_num_generations(given: str | None) -> None:
    if given is not None:
        raise UserError(
            f"the number of completions is --num-generations, as grpo.num_generations: write --num-generations {given}"
        )


_RenamedNum = Annotated[str | None, typer.Option("--num", hidden=True, callback=_say_num_generations)]


def _template_variables(text: str | None) -> dict[str, Any]:
    """The table of `--chat-template-kwargs`."""
    try:
        table = tomllib.loads(f"value = {text}")["value"] if text else {}
    except ValueError as error:
        raise UserError(f"--chat-template-kwargs {text}: no table of TOML: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"--chat-template-kwargs {text}: write a table, such as '{{enable_thinking = false}}'")
    return table


def generate(
    prompt: Annotated[str, typer.Option(help="The prompt's text.")],
    model: Annotated[str, typer.Option(help="Folder, .gguf file or org/name; without it, the embedded model.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of org/name (model.revision).")] = None,
    adapter: Adapter = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(metavar="TABLE", help="What the template is told: '{enable_thinking = false}'.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help=f"Folder of a saved draft, {DRAFT_WORDS}; without it, plain decoding.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample among the likeliest tokens that make up this probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample among tokens of at least this share of the likeliest one's."),
    ] = None,
    max_completion_length: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 128,
    renamed: Renamed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Ends a completion, at the first token that completes it. Repeatable."),
    ] = None,
    num_generations: Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="Completions of the prompt.")] = 1,
    renamed_num: _RenamedNum = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the sampling.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a completion.")] = False,
) -> None:
    """Complete a prompt, speculatively where a draft is given; the distribution is the model's either way."""
    del renamed, renamed_num
    if not prompt:
        raise UserError("--prompt is empty: give it some text")
    if not all(stop or ()):
        raise UserError("--stop is empty: give it some text")
    check_jax()
    from . import train
    from .files import print_json

    with ending_on_our_terms("Stopped."):
        completions: list[dict[str, Any]] = train.generate_text(
            as_typed(prompt),
            model=model,
            revision=revision,
            adapter=adapter,
            chat=chat,
            chat_template_kwargs=_template_variables(chat_template_kwargs),
            draft=draft,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            max_completion_length=max_completion_length,
            stop=[as_typed(text) for text in stop or ()],
            num_generations=num_generations,
            seed=seed,
        )
    for number, completion in enumerate(completions):
        if json_:
            print_json(completion)
            continue
        if number:
            print("---")
        print(completion["text"])
        print(
            f"[{len(completion['tokens'])} tokens, {completion['target_forwards']} target passes, acceptance length "
            f"{completion['acceptance_length']:.2f}, stopped by {completion['stop_reason']}]",
            file=sys.stderr,
        )
    check_output_arrived()
