"""A policy that has learned lists of sums from right answers: what `long_runs.py` and `long_rollouts.py` begin with
where there is no time for reinforcement learning.

    python benchmarks/taught_sums.py --model path/to/SmolLM2-135M-Instruct --out results/taught --steps 15

Each step is one supervised update (cross-entropy of the answer) on four lists that are spread as those of
`long_runs.py`, as far as prompt and answer fit into `--positions`. It takes minutes on two cores, and completions then
are as long as right answers are.
"""

import argparse
import random
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from many_sums import problem

from eqx_specgrpo.grpo import chunked_logprobs, compute_copy
from eqx_specgrpo.models import load_pretrained, save_model, sequence_features
from eqx_specgrpo.runtime import keep_freed_memory

_LISTS = 4  # of an update


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Supervised updates on lists of sums.")
    parser.add_argument("--model", required=True, help="folder or .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the policy")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--sums", default="2-26", help="how many there are in a list")
    parser.add_argument("--positions", type=int, default=640, help="of a padded sequence, prompt and answer")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    return parser.parse_args()


def example(rng: random.Random, tokenizer, sums: str, positions: int) -> tuple[list[int], int]:
    """Prompt and answer as token ids, and how many of them are the prompt's. A list that does not fit is drawn anew."""
    while True:
        asked, texts = problem(rng, sums, 12)
        lines = [f"{number}. {text} = {sum(map(int, text.split(' + ')))}" for number, text in enumerate(texts, 1)]
        prompt = tokenizer.encode_prompt([{"role": "user", "content": asked}])
        answer = tokenizer.encode("\n".join(lines), add_special_tokens=False)
        ids = [*prompt, *answer, tokenizer.eos_ids[0]]
        if len(ids) <= positions:
            return ids, len(prompt)


def main() -> int:
    arguments = parse_arguments()
    model, tokenizer = load_pretrained(arguments.model)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(arguments.learning_rate))
    parameters, fixed = eqx.partition(model, eqx.is_inexact_array)
    opt_state = optimizer.init(parameters)

    @eqx.filter_jit(donate="all")
    def update(parameters, opt_state, tokens, mask):
        def loss(parameters):
            copy = compute_copy(eqx.combine(parameters, fixed), arguments.dtype)
            hidden = sequence_features(copy, tokens[:, :-1]).last
            hidden = hidden.reshape(-1, hidden.shape[-1])
            logprobs, _ = chunked_logprobs(hidden, tokens[:, 1:].reshape(-1), copy.unembed, 1.0, 512)
            return -jnp.sum(logprobs * mask[:, 1:].reshape(-1)) / jnp.sum(mask[:, 1:])

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, new_state = optimizer.update(gradients, opt_state, parameters)
        return eqx.apply_updates(parameters, updates), new_state, value

    rng = random.Random(1)
    for step in range(arguments.steps):
        tokens = np.zeros((_LISTS, arguments.positions), np.int32)
        mask = np.zeros((_LISTS, arguments.positions), np.float32)
        for row in range(_LISTS):
            ids, prompt = example(rng, tokenizer, arguments.sums, arguments.positions)
            tokens[row, : len(ids)], mask[row, prompt : len(ids)] = ids, 1.0
        parameters, opt_state, value = update(parameters, opt_state, jnp.asarray(tokens), jnp.asarray(mask))
        print(f"step {step + 1}: cross-entropy {float(value):.3f}", file=sys.stderr, flush=True)
    save_model(eqx.combine(parameters, fixed), arguments.out, tokenizer)
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
