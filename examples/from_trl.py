"""A script for TRL, and the same run here.

    python examples/from_trl.py --steps 40

With TRL:

    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    dataset = Dataset.from_list(problems(500))

    trainer = GRPOTrainer(
        model="path/to/model",
        args=GRPOConfig(
            output_dir="runs/from_trl",
            max_steps=40,
            num_generations=8,
            per_device_train_batch_size=32,
            max_completion_length=128,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            optim="adamw_torch",
            beta=0.0,
            epsilon=0.2,
            loss_type="dapo",
            reward_weights=[1.0, 0.1],
        ),
        train_dataset=dataset,
        reward_funcs=[correct, brief],
        callbacks=[...],  # a transformers.TrainerCallback
    )
    trainer.train()
    trainer.save_model("runs/from_trl/policy")

What is different: a step has `prompts_per_step` prompts in place of a batch size; rollouts are decoded speculatively,
by a draft that learns as the run goes on; the policy is in `policy/` without asking, and the run resumes to the bit.
Data and rewards are the same objects.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from typing import Any

import eqx_specgrpo as sg
from eqx_specgrpo.tasks import completion_text, last_number


def problems(count: int) -> list[dict[str, Any]]:
    """Rows in TRL's convention: `prompt`, and whatever the rewards name. A `datasets.Dataset` of them does as well."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        terms = [draw.randint(2, 20)] + [draw.choice((1, -1)) * draw.randint(2, 20) for _ in range(draw.randint(4, 6))]
        expression = str(terms[0]) + "".join(f" {'+' if term > 0 else '-'} {abs(term)}" for term in terms[1:])
        content = f"What is {expression}? Think step by step."
        rows.append({"prompt": [{"role": "user", "content": content}], "answer": sum(terms)})
    return rows


def correct(completions: Sequence[Any], answer: Sequence[int], **kwargs: Any) -> list[float]:
    """1 for a completion whose last number is the answer."""
    numbers = [last_number(completion_text(completion)) for completion in completions]
    return [float(number == right) for number, right in zip(numbers, answer, strict=True)]


async def brief(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
    """Fewer tokens are better. Rewards may be `async`, as in TRL."""
    return [1.0 - len(ids) / 128 for ids in completion_ids]


class Best(sg.AbstractCallback):
    """Remembers the step with the highest reward."""

    def __init__(self):
        self.reward, self.at = float("-inf"), 0

    def step(self, run: sg.RunView, metrics: Mapping[str, float]) -> None:
        if metrics["reward"] > self.reward:
            self.reward, self.at = metrics["reward"], run.done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a script for TRL does, here.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", default="runs/from_trl")
    arguments = parser.parse_args()
    sg.keep_compiled_programs()

    best = Best()
    result = sg.run(
        {
            "out": arguments.out,
            "steps": arguments.steps,
            "grpo": {
                "num_generations": 8,
                "prompts_per_step": 4,
                "max_completion_length": 128,
                "learning_rate": 2e-4,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 2,
                "optim": "adamw",
                "beta": 0.0,
                "epsilon": 0.2,
                "loss_type": "dapo",
            },
            "reward": {"weights": [1.0, 0.1]},
            "compare": False,
        },
        task=problems(500),
        rewards=[correct, brief],
        callbacks=best,
        policy=sg.load_pretrained(sg.default_model_path()),
        draft=str(sg.default_draft_path()),
    )
    length = result.metrics["completions/mean_length"][-1]
    print(result)
    print(f"best reward {best.reward:.3f}, in step {best.at}; mean length at the end {length:.0f}")
