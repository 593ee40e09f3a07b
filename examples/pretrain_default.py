"""Makes the embedded default model: a small transformer pretrained on imperfect worked arithmetic.

    python examples/pretrain_default.py --steps 3000 --out runs/default_model

The corpus is procedural. A row asks for a sum and works it out with a running total, one line a term. In a fraction of
the lines the stated total is wrong, and mostly the work then goes on from the wrong total. A model that imitates this
knows how to add, but samples the mistakes too. They are independent noise, so that its most likely answer is mostly
right while a sample at temperature 1 often isn't: what reinforcement learning can sharpen away.
"""

import json
import random
import re
import shutil
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
import typer
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, Regex, Tokenizer, trainers

from eqx_specgrpo._types import Prompts
from eqx_specgrpo.models import sequence_features, Transformer, TransformerConfig
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
MISTAKE, RECOVERY, MISCOPY = 0.16, 0.15, 0.05
CLEAN, CARELESS = 0.6, 0.7

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
    return text + rng.choice(CLOSINGS).format(mistaken(rng, stated) if rng.random() < carelessness * MISCOPY else stated)


def conversation(rng: random.Random, carelessness: float) -> tuple[str, str]:
    """A question and its imperfect completion. Most questions have the length and the words of the default task."""
    terms = rng.randint(4, 6) if rng.random() < 0.75 else rng.randint(2, 7)
    operands = [rng.randint(2, 49) for _ in range(terms)]
    signs = [rng.choice((-1, 1)) for _ in range(terms)]
    expression = str(operands[0])
    for operand, sign in zip(operands[1:], signs[1:], strict=True):
        expression += f" {'+' if sign > 0 else '-'} {operand}"
    question = (PROMPTS[0] if rng.random() < 0.8 else rng.choice(PROMPTS)).format(expression)
    return question, work_out(rng, operands, signs, carelessness)


def build_tokenizer(texts: Sequence[str], vocab_size: int = 512) -> Tokenizer:
    """Byte-level BPE: any text can be encoded and comes back exactly; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]+[ \n]?|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def render(question: str) -> str:
    return f"{USER}{question}{END}{ASSISTANT}"


def batches(
    tokenizer: Tokenizer, seed: int, size: int, steps: int, multiple_of: int = 32
) -> Iterator[tuple[np.ndarray, ...]]:
    """`tokens` `[batch, seq]`, and where the completion begins and ends, `[batch]` each.

    Sums are learned much faster from correct ones, so mistakes set in late: between `CLEAN` and `CARELESS` of the way.
    Rows of similar length share a batch, so that little is padding and few widths (and so few compilations) exist.
    """
    rng = random.Random(f"pretrain/{seed}")
    for done in range(0, steps, 8):
        carelessness = min(max((done / steps - CLEAN) / (CARELESS - CLEAN), 0.0), 1.0)
        pool = [conversation(rng, carelessness) for _ in range(8 * size)]
        prompts = [e.ids for e in tokenizer.encode_batch([render(question) for question, _ in pool])]
        answers = [e.ids for e in tokenizer.encode_batch([text + END for _, text in pool])]
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


def build_optimizer(steps: int, learning_rate: float) -> optax.GradientTransformation:
    warmup = min(100, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    matrices_only = lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.01, mask=matrices_only),
    )


#
# Evaluation.
#


@eqx.filter_jit
def sample(
    model: Transformer,
    tokens: Int[Array, "rows prompt"],
    lengths: Int[Array, " rows"],
    new_tokens: int,
    temperature: Float[Array, ""],
    end: int,
    key: PRNGKeyArray,
) -> tuple[Int[Array, "rows new"], Float[Array, "rows new"]]:
    """Completions (after the end token, end tokens) and the entropy of the model at each token, in nats."""
    rows, width = tokens.shape
    cache = model.init_cache(rows, width + new_tokens, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    features, cache = model.hidden(tokens, positions, cache)
    logits = model.unembed(features.last[jnp.arange(rows), lengths - 1])

    def step(carry, index):
        cache, logits, stopped = carry
        logprobs = jax.nn.log_softmax(logits)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        noise = jr.gumbel(jr.fold_in(key, index), logits.shape)
        token = jnp.where(stopped, end, jnp.argmax(logits + temperature * noise, axis=-1))
        features, cache = model.hidden(token[:, None], (lengths + index)[:, None], cache)
        return (cache, model.unembed(features.last[:, 0]), stopped | (token == end)), (token, entropy)

    carry = cache, logits, jnp.zeros(rows, bool)
    _, (completions, entropies) = lax.scan(step, carry, jnp.arange(new_tokens))
    return completions.T, entropies.T


def evaluate(
    model: Transformer, tokenizer: Tokenizer, rows: int, temperature: float, seed: int, new_tokens: int = 160
) -> dict[str, Any]:
    """Reward on the default task, the fraction of stated sums that are right, lengths in tokens, entropy in nats."""
    end = tokenizer.token_to_id(END)
    task = Arithmetic(seed=seed, terms=(4, 6), low=2, high=49, operations="+-")
    examples = [task.example(index) for index in range(rows)]
    prompts = Prompts.from_lists([tokenizer.encode(render(e.prompt[0]["content"])).ids for e in examples], 64)
    tokens, entropies = sample(
        model,
        jnp.asarray(prompts.tokens),
        jnp.asarray(prompts.lengths),
        new_tokens,
        jnp.asarray(temperature, jnp.float32),
        end,
        jr.key(seed),
    )
    tokens, entropies = np.asarray(tokens), np.asarray(entropies)
    lengths = np.minimum((tokens != end).sum(1) + 1, new_tokens)
    texts = [tokenizer.decode(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True)]
    rewards = arithmetic_reward(texts, [e.columns["answer"] for e in examples])
    sums = [re.fullmatch(r"(-?\d+) ([+-]) (\d+) = (-?\d+)", found) for found in re.findall(r"-?\d+ [+-] \d+ = -?\d+", "\n".join(texts))]
    right = [int(m[1]) + int(m[2] + m[3]) == int(m[4]) for m in sums if m]
    mask = np.arange(new_tokens) < lengths[:, None]
    return {
        "reward": float(np.mean([reward or 0.0 for reward in rewards])),
        "sums_right": float(np.mean(right)) if right else 0.0,
        "length": float(lengths.mean()),
        "lengths_5_95": [int(x) for x in np.percentile(lengths, [5, 95])],
        "entropy": float(entropies[mask].mean()),
        "example": texts[0],
    }


#
# Files.
#


def hf_tensors(model: Transformer) -> dict[str, np.ndarray]:
    """The weights under the names of a Llama checkpoint, with the fused products taken apart."""
    c = model.config
    tensors = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        prefix = f"model.layers.{i}"
        ends = [c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim]
        q, k, v = jnp.split(block.attention.qkv.weight, ends)
        gate, up = jnp.split(block.mlp.gate_up.weight, 2)
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": q,
            f"{prefix}.self_attn.k_proj.weight": k,
            f"{prefix}.self_attn.v_proj.weight": v,
            f"{prefix}.self_attn.o_proj.weight": block.attention.output.weight,
            f"{prefix}.mlp.gate_proj.weight": gate,
            f"{prefix}.mlp.up_proj.weight": up,
            f"{prefix}.mlp.down_proj.weight": block.mlp.down.weight,
            f"{prefix}.input_layernorm.weight": block.attention_norm.weight,
            f"{prefix}.post_attention_layernorm.weight": block.mlp_norm.weight,
        }
    return {name: np.ascontiguousarray(np.asarray(x, np.float32)) for name, x in tensors.items()}


def save(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a Hugging Face folder aside and renames it, so that whoever reads it never meets half a model."""
    c = model.config
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    aside = folder.with_name(folder.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(hf_tensors(model), aside / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(aside / "tokenizer.json"))
    (aside / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    documents: dict[str, dict[str, Any]] = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": c.max_position_embeddings,
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_theta,
            "tie_word_embeddings": c.tie_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": None,
            "eos_token_id": end,
            "pad_token_id": pad,
            "torch_dtype": "float32",
        },
        "generation_config.json": {"eos_token_id": end, "pad_token_id": pad, "do_sample": True, "temperature": 1.0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
            "clean_up_tokenization_spaces": False,
            "model_max_length": c.max_position_embeddings,
        },
    }
    for name, document in documents.items():
        (aside / name).write_text(json.dumps(document, indent=2) + "\n")
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old)
    else:
        aside.rename(folder)


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 3000,
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("runs/default_model"),
    seed: Annotated[int, typer.Option(help="Of the weights and of the corpus.")] = 0,
    batch: Annotated[int, typer.Option(help="Sequences a step.", min=1)] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    log_every: Annotated[int, typer.Option(help="Steps between lines of progress.", min=1)] = 50,
    save_every: Annotated[int, typer.Option(help="Steps between evaluations and saves.", min=1)] = 250,
):
    """Pretrains the embedded default model and saves it as a Hugging Face folder."""
    corpus_rng = random.Random(f"tokenizer/{seed}")
    corpus = (part for _ in range(4000) for part in conversation(corpus_rng, 1.0))
    tokenizer = build_tokenizer(list(corpus))
    config = TransformerConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_embeddings=True,
    )
    model = Transformer(config, key=jr.key(seed))
    optimizer = build_optimizer(steps, learning_rate)
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    print(f"{sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))):,} parameters", flush=True)
    began = since = time.perf_counter()
    tokens_since = 0
    for step, (tokens, begins, ends) in enumerate(batches(tokenizer, seed, batch, steps), start=1):
        model, state, loss = train_step(optimizer, model, state, tokens, begins, ends)
        tokens_since += int(ends.sum())
        if step % log_every == 0 or step == steps:
            value, now = float(loss), time.perf_counter()
            print(f"step {step}  loss {value:.4f}  {tokens_since / (now - since):,.0f} tokens/s", flush=True)
            since, tokens_since = now, 0
        if step % save_every == 0 or step == steps:
            for temperature in (0.0, 1.0):
                print(f"  temperature {temperature:g}:", json.dumps(evaluate(model, tokenizer, 64, temperature, 1)), flush=True)
            save(model, tokenizer, out)
            print(f"  saved {out} after {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)
            since = time.perf_counter()


if __name__ == "__main__":
    typer.run(main)
