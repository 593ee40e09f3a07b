"""A policy made on the spot for `gpu.py`: a transformer pretrained for minutes on lists of sums, some of them wrong.

Random weights say nothing of acceptance. This model writes long, regular answers with mistakes in them, so that there
is something to draft, and something for GRPO to teach.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from many_sums import problem

from eqx_specgrpo import Prompts
from eqx_specgrpo.models import Tokenizer, Transformer, TransformerConfig, save_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from pretrain_default import END, build_optimizer, build_tokenizer, train_step

MISTAKES = 0.06
HIGH = 12


def answer(rng: random.Random, sums: list[str], mistakes: float) -> str:
    """The lines that the reward wants, a few of them with a wrong result."""
    lines = []
    for number, text in enumerate(sums, 1):
        value = sum(map(int, text.split(" + ")))
        if rng.random() < mistakes:
            value += rng.choice((-10, -1, 1, 10))
        lines.append(f"{number}. {text} = {value}")
    return "\n".join(lines)


def corpus(tokenizer: Tokenizer, sums: str, batch: int, longest: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Batches without end, all of one width: tokens, and where the completions begin and end."""
    rng = random.Random("corpus")
    while True:
        rows = []
        while len(rows) < batch:
            asked, texts = problem(rng, sums, HIGH)
            prompt = tokenizer.encode_prompt([{"role": "user", "content": asked}])
            row = (prompt, tokenizer.encode(answer(rng, texts, MISTAKES) + END))
            if len(row[0]) + len(row[1]) <= longest:
                rows.append(row)
        padded = Prompts.from_lists([prompt + completion for prompt, completion in rows], longest)
        begins = np.array([len(prompt) for prompt, _ in rows], np.int32)
        yield np.asarray(padded.tokens), begins, np.asarray(padded.lengths)


def make_policy(
    out: Path,
    *,
    hidden: int,
    layers: int,
    sums: str,
    longest: int,
    batch: int,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Pretrains for so many seconds, after the first step, and saves a Hugging Face folder.

    **Returns:**

    Parameters, steps, seconds, tokens a second, and the last loss in nats a token.
    """
    rng = random.Random("tokenizer")
    tokenizer = build_tokenizer(
        [
            text
            for _ in range(2000)
            for asked, sums_ in [problem(rng, sums, HIGH)]
            for text in (asked, answer(rng, sums_, 0))
        ],
        longest,
    )
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_layers=layers,
        num_heads=hidden // 64,
        num_kv_heads=max(1, hidden // 256),
        head_dim=64,
        max_position_embeddings=longest,
        tie_embeddings=True,
    )
    model = Transformer(config, key=jr.key(0))
    # The schedule is in steps and what there is are seconds: so many steps, at most, that none ends with a rate of 0.
    optimizer = build_optimizer(2000, 2e-3)
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    began, steps, tokens, loss = time.perf_counter(), 0, 0, None
    for batch_of_tokens, begins, ends in corpus(tokenizer, sums, batch, longest):
        model, state, loss = train_step(optimizer, model, state, batch_of_tokens, begins, ends)
        if steps == 0:
            jax.block_until_ready(loss)
            say(f"compiled in {time.perf_counter() - began:.0f} s")
            began = time.perf_counter()
        steps, tokens = steps + 1, tokens + int(ends.sum())
        if steps % 20 == 0:
            loss = jax.block_until_ready(loss)
            if steps % 100 == 0:
                say(f"step {steps}, loss {float(loss):.3f}")
        if time.perf_counter() - began > seconds or steps == 2000:
            break
    jax.block_until_ready(loss)
    took = time.perf_counter() - began
    save_model(model, out, tokenizer)
    weights = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    assert loss is not None
    return {
        "parameters": weights,
        "steps": steps,
        "seconds": took,
        "tokens_per_second": tokens / took,
        "loss": float(loss),
    }
