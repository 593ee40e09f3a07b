"""GRPO with speculative rollouts, the whole loop written out by hand: what `specgrpo run` does, without the run folder.

    python examples/by_hand.py --steps 20

Change anything. Each call below is one of the library's public functions, and none of them knows of the others.
"""

import argparse

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqx_specgrpo.config import default_model_path
from eqx_specgrpo.decoding import FixedLength, Prompts, Rejection, Sampling, decode
from eqx_specgrpo.distill import ForwardKL, draft_gradients, select_rows
from eqx_specgrpo.drafts import MedusaHeads
from eqx_specgrpo.grpo import (
    LossNormalizer,
    LossSettings,
    adamw,
    apply_gradients,
    check_finite,
    compute_copy,
    global_norm,
    group_advantages,
    make_update_batch,
    policy_gradients,
)
from eqx_specgrpo.grpo.losses import DAPO
from eqx_specgrpo.models import load_pretrained
from eqx_specgrpo.runtime import keep_compiled_programs
from eqx_specgrpo.tasks import Arithmetic, collate, load_rewards

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--model", default=str(default_model_path()), help="folder, .gguf file or org/name")
arguments = parser.parse_args()

keep_compiled_programs()  # as the command line does, and in the same place: a second start is quick

PROMPTS, SAMPLES, NEW, TEMPERATURE = 4, 8, 128, 1.0

# The policy, in float32. Its draft: four heads on its last hidden state, which begin as copies of its own head.
policy, tokenizer = load_pretrained(arguments.model)
draft = MedusaHeads.fresh(policy.hidden_size, num_heads=4)

# Each has an optimizer of its own.
policy_optimizer = adamw(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, max_grad_norm=1.0)
draft_optimizer = adamw(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, max_grad_norm=1.0)
policy_state, draft_state = policy_optimizer.init(policy), draft_optimizer.init(draft)
policy_rate, draft_rate = jnp.float32(2e-4), jnp.float32(3e-3)
acceptance = jnp.zeros(draft.max_length)

task = Arithmetic(terms=(4, 6), low=2, high=49, operations="+-")
rewards = load_rewards([], None, task)
sampling = Sampling(TEMPERATURE)
settings = LossSettings(temperature=TEMPERATURE, loss=DAPO(), layers=draft.layers)
root = jr.key(0)

for step in range(arguments.steps):
    key = jr.fold_in(root, step)

    # Prompts, and eight completions of each, decoded speculatively. Their law is the policy's, whatever the draft.
    examples = [task.at(step * PROMPTS + i) for i in range(PROMPTS)]
    prompts = Prompts.from_lists([tokenizer.encode_prompt(example.prompt) for example in examples], multiple_of=32)
    rollouts = decode(
        policy,
        prompts,
        draft=draft,
        verifier=Rejection(),
        length=FixedLength(3),
        sampling=sampling,
        key=key,
        max_new_tokens=NEW,
        eos_ids=tokenizer.eos_ids,
        samples=SAMPLES,
    )

    # Rewards, and advantages relative to the other completions of the same prompt.
    ids = [rollouts.completion(row) for row in range(PROMPTS * SAMPLES)]
    texts = [tokenizer.decode(completion) for completion in ids]
    row_prompts, columns = collate([examples[prompt] for prompt in rollouts.group])
    _, reward = rewards(row_prompts, texts, ids, columns)
    advantages = group_advantages(reward, rollouts.group, PROMPTS)

    # The policy. The old log-probabilities came with the rollouts: verification is the policy's own forward.
    batch = make_update_batch(rollouts, advantages)
    normalizer = LossNormalizer.from_mask(batch.completion_mask, NEW)
    weights = compute_copy(policy, "float32")
    part, features = policy_gradients(weights, batch, normalizer, settings)
    check_finite("policy", step, loss=part.loss, grad_norm=global_norm(part.gradients))
    policy, policy_state = apply_gradients((policy_optimizer, part.gradients, policy_rate), policy, policy_state)

    # The draft learns from the features of that same forward, on a quarter of the rollouts.
    rows = jnp.asarray(np.sort(np.asarray(jr.permutation(key, PROMPTS * SAMPLES))[: PROMPTS * SAMPLES // 4]))
    chosen = select_rows(
        features,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.prompt_lengths),
        jnp.asarray(rollouts.lengths),
        rows,
    )
    learned = draft_gradients(
        draft,
        weights,
        chosen,
        ForwardKL(),
        temperature=settings.temperature,
        alpha=acceptance,
        position_decay=jnp.float32(0.8),
        new=batch.completion_tokens.shape[1],
    )
    acceptance = learned.acceptance
    draft, draft_state = apply_gradients((draft_optimizer, learned.gradients, draft_rate), draft, draft_state)

    print(
        f"step {step}: reward {reward.mean():.3f}, acceptance length {rollouts.statistics.acceptance_length:.2f}, "
        f"length {rollouts.lengths.mean():.0f}, draft loss {float(learned.loss):.3f}",
        flush=True,
    )
