"""Completions of one prompt, for the command line."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.random as jr
from rich.console import Console

from .._types import StopReason
from ..config import load_policy, named_draft
from ..decoding import decode, make_stop
from ..drafts import NoDraft
from ..errors import UserError
from ..records import RunProgress
from ..sampling import make_sampling


def generate_text(
    prompt: str,
    *,
    model: str = "",
    revision: str | None = None,
    adapter: str | None = None,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    draft: str | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    max_completion_length: int = 128,
    stop: Sequence[str] = (),
    num_generations: int = 1,
    seed: int = 0,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Loads a model (and a draft), and completes a prompt. Arguments have the names that they have in `[grpo]`.

    **Arguments:**

    - `prompt`: text; with `chat` it is put into the chat template as a user's message.
    - `model`: folder, `.gguf` file or `org/name`; the embedded default if empty.
    - `revision`: branch, tag or commit of a model by name.
    - `chat_template_kwargs`: arguments of the chat template, such as `{"enable_thinking": False}`.
    - `draft`: folder of a saved draft, a kind, or a class as `file.py:Class`; `None` for plain decoding.
    - `adapter`: folder of an adapter in PEFT's format, to be merged into the model.
    - `temperature`, `top_k`, `top_p`, `min_p`: see `Sampling`; temperature 0 is greedy.
    - `max_completion_length`: length of the longest completion, in tokens.
    - `stop`: texts that end a completion, at the first token that completes one of them.
    - `num_generations`: number of completions.
    - `console`: where progress goes, by default standard error if that is a terminal.

    **Returns:**

    For each completion a JSON-able object with `prompt_tokens`, `tokens`, `text`, `logprobs`, `stop_reason`,
    `acceptance_length` and `target_forwards`.
    """
    sampling = make_sampling(temperature, top_k, top_p, min_p)
    if console is None:
        console = Console(stderr=True)
        console.quiet = not console.is_terminal  # in a pipe only what was asked for
    with RunProgress(console) as progress:
        progress.phase(f"loading {model or 'the embedded default model'}")
        target, tokenizer = load_policy(model, adapter, revision)
        tokenizer = tokenizer.with_chat_template_kwargs(chat_template_kwargs)
        chosen = NoDraft() if draft is None else named_draft(draft, target, tokenizer, seed)
        ids = tokenizer.encode_prompt([{"role": "user", "content": prompt}] if chat else prompt)
        if not ids:
            raise UserError("the prompt has no tokens: give it some text")
        progress.phase("decoding")
        rollouts = decode(
            target,
            [ids],
            draft=chosen,
            sampling=sampling,
            key=jr.key(seed),
            # Room for more than the model's context holds would be of no use, and may be more than there is.
            max_new_tokens=max(1, min(max_completion_length, target.max_length - len(ids))),
            eos_ids=tokenizer.eos_ids,
            stop=make_stop(stop, tokenizer),
            samples=num_generations,
            smallest_bucket=2,  # one decoding does not earn what a batch of one row would cost to compile
            on_progress=progress.decoding,
        )
    statistics = rollouts.statistics
    completions = []
    for row in range(num_generations):
        tokens = rollouts.completion(row)
        forwards = int(statistics.target_forwards[row])
        completions.append(
            {
                "prompt_tokens": ids,
                "tokens": tokens,
                "text": tokenizer.decode(tokens),
                "logprobs": rollouts.logprobs[row, : len(tokens)].tolist(),
                "stop_reason": StopReason(int(rollouts.stop_reasons[row])).name.lower(),
                "acceptance_length": float(statistics.emitted[row] / forwards) if forwards else 1.0,
                "target_forwards": forwards,
            }
        )
    return completions
