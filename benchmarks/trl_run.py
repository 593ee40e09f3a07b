"""The run that a configuration describes, made by TRL's `GRPOTrainer`, with the same records as `specgrpo run`.

    pip install trl
    python benchmarks/trl_run.py --out runs/trl --set model.path=path/to/folder --set grpo.learning_rate=1e-5 --steps 20

Prompts, rewards, group size, lengths, sampling and the options of the loss come from the configuration; all else is
TRL's own default. `OUT/metrics.jsonl` gets a line a step with reward, entropy, lengths and times.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from eqx_specgrpo.config import load_config, load_task_and_rewards
from eqx_specgrpo.records import machine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A GRPO run by TRL.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, help="TOML file, as for specgrpo run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for specgrpo; repeatable")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["float32", "bfloat16", "bfloat16_weights"],
        help="bfloat16: float32 weights and autocast, TRL's default; bfloat16_weights: the model itself too",
    )
    parser.add_argument("--no-gradient-checkpointing", action="store_true", help="TRL's default is to use it")
    return parser.parse_args()


class Clock:
    """Seconds of a step, by phase."""

    def __init__(self):
        self.phases: dict[str, float] = {}

    def timed(self, phase: str, function):
        def call(*args: Any, **kwargs: Any):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - begin

        return call


def main() -> int:
    arguments = parse_arguments()
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    flags = {"steps": arguments.steps, "seed": arguments.seed, "out": str(arguments.out)}
    config = load_config(arguments.config, arguments.set, flags)
    task, rewards = load_task_and_rewards(config)
    grpo = config.grpo
    examples = [task.at(position) for position in range(arguments.steps * grpo.prompts_per_step)]
    dataset = Dataset.from_list([{"prompt": example.prompt, **example.columns} for example in examples])
    functions = []
    for name, function in zip(rewards.names, rewards.functions, strict=True):
        function.__name__ = name
        functions.append(function)
    settings = GRPOConfig(
        output_dir=str(arguments.out / "trl"),
        max_steps=arguments.steps,
        seed=arguments.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        shuffle_dataset=False,
        bf16=arguments.dtype != "float32",
        model_init_kwargs={"dtype": "bfloat16" if arguments.dtype == "bfloat16_weights" else "float32"},
        per_device_train_batch_size=grpo.num_generations * grpo.prompts_per_step,
        num_generations=grpo.num_generations,
        max_completion_length=grpo.max_completion_length,
        temperature=grpo.temperature,
        learning_rate=grpo.learning_rate,
        lr_scheduler_type=grpo.lr_scheduler_type,
        max_grad_norm=grpo.max_grad_norm,
        num_iterations=grpo.num_iterations,
        beta=grpo.beta,
        epsilon=grpo.epsilon,
        loss_type=grpo.loss_type,
        scale_rewards=grpo.scale_rewards,
        reward_weights=None if config.reward.weights is None else list(config.reward.weights),
        **({"gradient_checkpointing": False} if arguments.no_gradient_checkpointing else {}),
    )
    clock, records = Clock(), []
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = {"from_step": 1} | machine()
    about["versions"] |= {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
    (arguments.out / "machine.jsonl").write_text(json.dumps(about) + "\n", encoding="utf-8")

    class Recorder(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.begin = time.perf_counter()

        def on_log(self, args, state, control, logs=None, **kwargs):
            logs = logs or {}
            if "reward" not in logs:
                return
            # What is generated for a step is generated inside its first training step.
            phases, clock.phases = clock.phases, {}
            seconds = time.perf_counter() - self.begin
            rollout = phases.get("rollout", 0.0)
            record = {
                "step": state.global_step,
                **{key: logs[key] for key in ("reward", "reward_std", "entropy", "loss", "grad_norm") if key in logs},
                "completions/mean_length": logs.get("completions/mean_length"),
                "time/rollout": rollout,
                "time/reward": phases.get("reward", 0.0),
                "time/update": seconds - rollout - phases.get("reward", 0.0),
                "time/step": seconds,
            }
            records.append(record)
            with (arguments.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(f"step {len(records)}: reward {record['reward']:.3f}, {seconds:.1f} s, rollout {rollout:.1f} s")

    trainer = GRPOTrainer(
        model=config.model.path,
        reward_funcs=functions,
        args=settings,
        train_dataset=dataset,
        callbacks=[Recorder()],
    )
    trainer._generate = clock.timed("rollout", trainer._generate)
    trainer._calculate_rewards = clock.timed("reward", trainer._calculate_rewards)
    trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
