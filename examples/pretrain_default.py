"""Makes the embedded default model: a small transformer pretrained on imperfect worked arithmetic.

    python examples/pretrain_default.py --steps 1600 --look-ahead-steps 400 --out runs/default_model

The corpus is procedural. A row asks for a sum and works it out with a running total, one line a term. In a fraction of
the lines the stated total is wrong, and mostly the work then goes on from the wrong total. A model that imitates this
knows how to add, but samples the mistakes too. They are independent noise, so that its most likely answer is mostly
right while a sample at temperature 1 often isn't: what reinforcement learning can sharpen away.

A small model's last hidden state knows the next token and little else, so that heads on it can't look further ahead. A
second phase therefore trains the model together with such heads (multi-token prediction, Gloeckle et al. 2024), which
are thrown away afterwards: a run starts with fresh ones, and finds features that can be drafted from.
"""

import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optax.contrib
import tokenizers
import typer
from jaxtyping import Array, Float, Int
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from eqx_specgrpo.decoding import AbstractSampling, GreedySampling, Prompts, Sampling, decode
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.models import (
    Features,
    Tokenizer,
    Transformer,
    TransformerConfig,
    load_pretrained,
    save_model,
    sequence_features,
)
from eqx_specgrpo.tasks import Arithmetic, arithmetic_reward

USER, ASSISTANT, SYSTEM, END, PAD = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}\n"
    "{{- raise_exception('the roles are system, user and assistant, not ' ~ message['role']) -}}\n"
    "{%- endif -%}\n"
    "{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|assistant|>' -}}\n"
    "{%- endif -%}\n"
)
TERMS, LOW, HIGH = (5, 7), 2, 20  # of the default run's task
MISTAKE, RECOVERY, MISCOPY = 0.16, 0.15, 0.05
CLEAN, CARELESS = 0.6, 0.7
HEADS, LOOK_AHEAD = 4, 0.3  # of the second phase, and what their loss weighs

LOG_EVERY, SAVE_EVERY = 50, 250

#
# The corpus.
#

PROMPTS = (
    "What is {}? Think step by step.",
    "Compute {}. Think step by step.",
    "What is {}?",
    "{} = ?",
)
STARTS = ("We start with {}.\n", "Start with {}.\n", "The first number is {}.\n")
ADDITIONS = ("Add {}: {} = {}.\n", "Then add {}: {} = {}.\n", "Adding {} gives {} = {}.\n")
SUBTRACTIONS = ("Subtract {}: {} = {}.\n", "Then subtract {}: {} = {}.\n", "Subtracting {} gives {} = {}.\n")
CLOSINGS = ("So the answer is {}.", "The answer is {}.", "So the total is {}.")


def mistaken(rng: random.Random, value: int) -> int:
    """A total that somebody in a hurry might write down instead."""
    return value + rng.choice((-10, -2, -1, 1, 2, 10))


def work_out(rng: random.Random, operands: Sequence[int], signs: Sequence[int], carelessness: float) -> str:
    """One imperfect completion, without the end token.

    **Arguments:**

    - `operands`: whole numbers, at least one.
    - `signs`: 1 or -1 for each operand; the first one counts as 1.
    - `carelessness`: multiplies the rates of mistakes; 0 for none.
    """
    true = stated = operands[0]
    text = rng.choice(STARTS).format(stated)
    for operand, sign in zip(operands[1:], signs[1:], strict=True):
        before = true if rng.random() < RECOVERY else stated
        true, stated = true + sign * operand, before + sign * operand
        if rng.random() < carelessness * MISTAKE:
            stated = mistaken(rng, stated)
        line = rng.choice(ADDITIONS if sign > 0 else SUBTRACTIONS)
        text += line.format(operand, f"{before} {'+' if sign > 0 else '-'} {operand}", stated)
    return text + rng.choice(CLOSINGS).format(
        mistaken(rng, stated) if rng.random() < carelessness * MISCOPY else stated
    )


def conversation(rng: random.Random, carelessness: float) -> tuple[str, str]:
    """A question and its imperfect completion. Most questions have the length and the words of the default task."""
    terms = rng.randint(*TERMS) if rng.random() < 0.75 else rng.randint(2, 7)
    operands = [rng.randint(LOW, HIGH) for _ in range(terms)]
    signs = [rng.choice((-1, 1)) for _ in range(terms)]
    expression = str(operands[0])
    for operand, sign in zip(operands[1:], signs[1:], strict=True):
        expression += f" {'+' if sign > 0 else '-'} {operand}"
    question = (PROMPTS[0] if rng.random() < 0.8 else rng.choice(PROMPTS)).format(expression)
    return question, work_out(rng, operands, signs, carelessness)


def build_tokenizer(texts: Sequence[str], max_length: int, vocab_size: int = 512) -> Tokenizer:
    """Byte-level BPE: any text can be encoded and comes back exactly; every digit is a token of its own."""
    backend = tokenizers.Tokenizer(models.BPE())
    pieces = Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]+[ \n]?|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    settings = {
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    return Tokenizer(backend, settings, CHAT_TEMPLATE, eos_ids=())


def batches(
    tokenizer: Tokenizer, seed: int, size: int, steps: int, multiple_of: int = 32, careless_from: float = CLEAN
) -> Iterator[tuple[np.ndarray, ...]]:
    """`tokens` `[batch, seq]`, and where the completion begins and ends, `[batch]` each.

    Sums are learned much faster from correct ones, so mistakes set in late: from `careless_from` of
    the way, over the tenth after it.
    Rows of similar length share a batch, so that little is padding and few widths (and so few compilations) exist.
    """
    rng = random.Random(f"pretrain/{seed}")
    for done in range(0, steps, 8):
        carelessness = min(max((done / steps - careless_from) / (CARELESS - CLEAN), 0.0), 1.0)
        pool = [conversation(rng, carelessness) for _ in range(8 * size)]
        prompts = [tokenizer.encode_prompt([{"role": "user", "content": question}]) for question, _ in pool]
        answers = [tokenizer.encode(text + END) for _, text in pool]
        rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(chunks)
        for chunk in chunks[: steps - done]:
            padded = Prompts.from_lists([prompt + answer for prompt, answer in chunk], multiple_of)
            begins = np.array([len(prompt) for prompt, _ in chunk], np.int32)
            yield np.asarray(padded.tokens), begins, np.asarray(padded.lengths)


#
# Training.
#


def completion_loss(
    model: Transformer, tokens: Int[Array, "batch seq"], begins: Int[Array, " batch"], ends: Int[Array, " batch"]
) -> Float[Array, ""]:
    """Mean cross-entropy of the completion tokens, in nats."""
    logits = model.unembed(sequence_features(model, tokens).last[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    targets = jnp.arange(1, tokens.shape[1])[None]
    mask = (targets >= begins[:, None]) & (targets < ends[:, None])
    return jnp.sum(losses * mask) / jnp.sum(mask)


@eqx.filter_jit(donate="all-except-first")
def train_step(
    optimizer: optax.GradientTransformation,
    model: Transformer,
    state: optax.OptState,
    tokens: Int[Array, "batch seq"],
    begins: Int[Array, " batch"],
    ends: Int[Array, " batch"],
) -> tuple[Transformer, optax.OptState, Float[Array, ""]]:
    loss, gradients = eqx.filter_value_and_grad(completion_loss)(model, tokens, begins, ends)
    updates, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state, loss


def look_ahead_losses(
    model: Transformer,
    heads: MedusaHeads,
    tokens: Int[Array, "batch seq"],
    begins: Int[Array, " batch"],
    ends: Int[Array, " batch"],
    *,
    heads_only: bool,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropies of the next token, and of those that the heads predict, each weighing 0.8 of the one before.

    **Arguments:**

    - `heads_only`: the heads learn, the model does not: they begin far off, and would pull it along.
    """
    hidden = sequence_features(model, tokens).last

    def cross_entropy(logits: Float[Array, "batch short vocab"], ahead: int) -> Float[Array, ""]:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, ahead:])
        targets = jnp.arange(ahead, tokens.shape[1])[None]
        mask = (targets >= begins[:, None] + ahead - 1) & (targets < ends[:, None])
        return jnp.sum(losses * mask) / jnp.sum(mask)

    next_loss = cross_entropy(model.unembed(hidden[:, :-1]), 1)
    if heads_only:
        hidden, model = jax.lax.stop_gradient((hidden, model))
    logits = heads.train_logits(model, heads.train_hidden(model, Features(hidden), tokens))
    weights = 0.8 ** jnp.arange(HEADS)
    head_losses = jnp.stack([cross_entropy(logits[:, : -(k + 2), k], k + 2) for k in range(HEADS)])
    return next_loss, jnp.sum(weights * head_losses) / jnp.sum(weights)


@eqx.filter_jit(donate="all-except-first")
def look_ahead_step(
    unchanged: tuple[optax.GradientTransformation, bool],
    both: tuple[Transformer, MedusaHeads],
    state: optax.OptState,
    tokens: Int[Array, "batch seq"],
    begins: Int[Array, " batch"],
    ends: Int[Array, " batch"],
) -> tuple[tuple[Transformer, MedusaHeads], optax.OptState, tuple[Float[Array, ""], Float[Array, ""]]]:
    optimizer, heads_only = unchanged

    def total(both):
        losses = look_ahead_losses(*both, tokens, begins, ends, heads_only=heads_only)
        return losses[0] + LOOK_AHEAD * losses[1], losses

    (_, losses), gradients = eqx.filter_value_and_grad(total, has_aux=True)(both)
    updates, state = optimizer.update(gradients, state, eqx.filter(both, eqx.is_array))
    return eqx.apply_updates(both, updates), state, losses


def build_optimizer(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for the embedding and the norms."""
    warmup = min(50, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))

    def dimensions(params: Transformer):
        out_by_in = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
        numbers = jax.tree.map(lambda x: out_by_in if x.ndim == 2 else None, params)
        return eqx.tree_at(lambda model: model.embedding, numbers, None)

    # An update's root mean square is scaled to AdamW's, so that one learning rate serves both.
    muon = optax.contrib.muon(
        schedule, weight_decay=0.01, consistent_rms=0.2, adam_b2=0.98, muon_weight_dimension_numbers=dimensions
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


#
# Evaluation.
#


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: int,
    sampling: AbstractSampling,
    seed: int,
    max_new_tokens: int = 128,
) -> dict[str, Any]:
    """How well the model does on the default run's task.

    **Returns:**

    The mean reward, the fraction of the stated sums that are right, the mean and the 5th and 95th percentile of the
    completion's length in tokens, the mean negative log-probability of its tokens in nats (when sampling at
    temperature 1: an estimate of the entropy), and one completion.
    """
    task = Arithmetic(seed=seed, terms=TERMS, low=LOW, high=HIGH, operations="+-")
    examples = [task.example(index) for index in range(rows)]
    rollouts = decode(
        model,
        Prompts.from_lists([tokenizer.encode_prompt(example.prompt) for example in examples], 64),
        sampling=sampling,
        key=jr.key(seed),
        max_new_tokens=max_new_tokens,
        eos_ids=tokenizer.eos_ids,
        smallest_bucket=rows,
    )
    texts = [tokenizer.decode(rollouts.completion(row)) for row in range(rows)]
    rewards = arithmetic_reward(texts, [example.columns["answer"] for example in examples])
    sums = re.findall(r"(-?\d+) ([+-]) (\d+) = (-?\d+)", "\n".join(texts))
    right = [int(left) + int(sign + operand) == int(stated) for left, sign, operand, stated in sums]
    return {
        "reward": float(np.mean([reward or 0.0 for reward in rewards])),
        "sums_right": sum(right) / max(len(right), 1),
        "length": float(rollouts.lengths.mean()),
        "length_percentiles": np.percentile(rollouts.lengths, [5, 95]).tolist(),
        "nats_per_token": float(-rollouts.logprobs.sum() / rollouts.lengths.sum()),
        "example": texts[0],
    }


def report(model: Transformer, tokenizer: Tokenizer, out: Path, began: float) -> None:
    """Evaluates and saves."""
    for name, sampling in (("greedy", GreedySampling()), ("sampled", Sampling())):
        print(f"  {name}: {json.dumps(evaluate(model, tokenizer, 64, sampling, 1))}", flush=True)
    save_model(model, out, tokenizer)
    print(f"  saved {out} after {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)


def pretrain(
    model: Transformer, tokenizer: Tokenizer, out: Path, seed: int, batch: int, steps: int, learning_rate: float
) -> Transformer:
    """The first phase: next tokens."""
    optimizer = build_optimizer(steps, learning_rate)
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    began = since = time.perf_counter()
    tokens_since = 0
    for step, (tokens, begins, ends) in enumerate(batches(tokenizer, seed, batch, steps), start=1):
        model, state, loss = train_step(optimizer, model, state, tokens, begins, ends)
        tokens_since += int(ends.sum())
        if step % LOG_EVERY == 0 or step == steps:
            value, now = float(loss), time.perf_counter()
            print(f"step {step}  loss {value:.4f}  {tokens_since / (now - since):,.0f} tokens/s", flush=True)
            since, tokens_since = now, 0
        if step % SAVE_EVERY == 0 or step == steps:
            report(model, tokenizer, out, began)
            since = time.perf_counter()
    return model


def look_ahead(
    model: Transformer, tokenizer: Tokenizer, out: Path, seed: int, batch: int, steps: int, learning_rate: float
) -> Transformer:
    """The second phase: next tokens, and those that heads predict. The heads alone learn for its first tenth."""
    both = (model, MedusaHeads.fresh(model.hidden_size, HEADS))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), steps + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    state = optimizer.init(eqx.filter(both, eqx.is_array))
    began = time.perf_counter()
    corpus = batches(tokenizer, seed + 1, batch, steps, careless_from=-1.0)
    for step, (tokens, begins, ends) in enumerate(corpus, start=1):
        both, state, losses = look_ahead_step((optimizer, step <= steps // 10), both, state, tokens, begins, ends)
        if step % LOG_EVERY == 0 or step == steps:
            elapsed = time.perf_counter() - began
            print(f"look ahead {step}  loss {losses[0]:.4f}  of heads {losses[1]:.4f}  {elapsed:.0f} s", flush=True)
        if step % SAVE_EVERY == 0 or step == steps:
            report(both[0], tokenizer, out, began)
    return both[0]


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps of the first phase.", min=1)] = 1600,
    look_ahead_steps: Annotated[int, typer.Option(help="Those of the second phase.", min=0)] = 400,
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("runs/default_model"),
    start: Annotated[Path | None, typer.Option(help="What the first phase made; it is skipped then.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of the corpus.")] = 0,
    batch: Annotated[int, typer.Option(help="Sequences a step.", min=1)] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the first phase.")] = 3e-3,
    look_ahead_rate: Annotated[float, typer.Option(help="Peak learning rate of the second phase.")] = 1.5e-3,
):
    """Pretrains the embedded default model and saves it as a Hugging Face folder."""
    if start is None:
        corpus_rng = random.Random(f"tokenizer/{seed}")
        corpus = (part for _ in range(4000) for part in conversation(corpus_rng, 1.0))
        max_length = 512
        tokenizer = build_tokenizer(list(corpus), max_length)
        config = TransformerConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            max_position_embeddings=max_length,
            tie_embeddings=True,
        )
        model = Transformer(config, key=jr.key(seed))
        print(f"{sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))):,} parameters", flush=True)
        model = pretrain(model, tokenizer, out, seed, batch, steps, learning_rate)
    else:
        model, tokenizer = load_pretrained(start)
    if look_ahead_steps:
        look_ahead(model, tokenizer, out, seed, batch, look_ahead_steps, look_ahead_rate)


if __name__ == "__main__":
    typer.run(main)
