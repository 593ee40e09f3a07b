"""Rollouts of long and uneven completions, plain and speculative in turns, by a policy that stands still.

    python benchmarks/long_rollouts.py --out results/long_rollouts --model path/to/model --prompts 2 --steps 8

The task of `long_runs.py` without its updates of the policy: in each step the same prompts are decoded plainly and
speculatively, one first and then the other, and the draft has its lessons within its budget, as in a run. So it takes
minutes where whole runs take hours, and what it says of rollouts is paired. Writes `NAME.json` and `NAME.md`, the name
being that of the policy, the rows and the seed.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from long_runs import same_completions
from many_sums import write_task

from eqx_specgrpo.config import RunParts, load_config, load_trained_policy, make_draft, make_parts
from eqx_specgrpo.decoding import CompileBehind, CompileSparingly, FixedLength
from eqx_specgrpo.drafts import NoDraft, remember
from eqx_specgrpo.grpo import compute_copy, make_update_batch
from eqx_specgrpo.records import machine
from eqx_specgrpo.runtime import count_compilations, keep_freed_memory
from eqx_specgrpo.train._draft_step import draft_rows, features_of, found_acceptance, update_draft
from eqx_specgrpo.train._lesson_budget import lesson_plan
from eqx_specgrpo.train._lessons import CHOOSE, DECODE, learn_lesson, make_lesson, updates_per_warm_up_lesson
from eqx_specgrpo.train._roll_out import roll_out
from eqx_specgrpo.train._segments import SegmentLog
from eqx_specgrpo.train._state import RunState
from eqx_specgrpo.train._step import next_examples, step_key

HERE = Path(__file__).parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rollouts of long and uneven completions, paired.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--name", default="policy", help="what to call the policy")
    parser.add_argument("--sums", default="2-70")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile-behind", action="store_true", help="in a thread, which a run does not do")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for specgrpo run")
    return parser.parse_args()


def warmed_up(parts: RunParts, state: RunState, target: Any) -> tuple[RunState, float]:
    """As a run warms its draft up, and the seconds that it took, compiling left out."""
    began, lesson = time.perf_counter(), None
    plain = dataclasses.replace(parts, length=FixedLength(0))
    with count_compilations() as compiled:
        for update in range(parts.config.draft.warmup if state.draft.train_length > 0 else 0):
            number, within = divmod(update, updates_per_warm_up_lesson(parts.config.draft))
            if lesson is None or within == 0:
                draft = compute_copy(state.draft, parts.config.model.dtype)
                lesson = make_lesson(plain, target, draft, state.draft.layers, number)
                state = dataclasses.replace(state, draft=remember(state.draft, lesson.rollouts))
            state, _ = learn_lesson(parts, state, target, lesson, update)
        jax.block_until_ready(eqx.filter(state.draft, eqx.is_array))
    return state, time.perf_counter() - began - compiled.seconds


def main() -> int:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    task = arguments.out / "sums.jsonl"
    write_task(task, 400, arguments.sums, 12)
    flags = {
        "model.path": arguments.model,
        "task.name": str(task),
        "seed": arguments.seed,
        "reward.functions": [f"{HERE / 'many_sums.py'}:sums_right"],
        "grpo.prompts_per_step": arguments.prompts,
        "grpo.num_generations": 8,
        "grpo.max_completion_length": arguments.tokens,
    }
    config = load_config(None, arguments.set, flags)
    policy, tokenizer = load_trained_policy(config)
    target = compute_copy(policy, config.model.dtype)
    draft = make_draft(config.draft, policy, config.seed, tokenizer)
    parts = make_parts(config, tokenizer, draft)
    state = RunState.frozen_policy(policy, draft, parts.draft_optimizer)
    state, warm_up = warmed_up(parts, state, target)
    plan = lesson_plan(config.draft.lesson_share, adaptive=config.draft.adaptive)
    arms = {
        "plain": (dataclasses.replace(parts, length=FixedLength(0)), SegmentLog(FixedLength(0))),
        "speculative": (
            parts,
            SegmentLog(parts.length, CompileBehind() if arguments.compile_behind else CompileSparingly()),
        ),
    }
    name = f"{arguments.name}-{arguments.prompts}x8-{arguments.seed}"
    record: dict[str, Any] = {"about": machine(), "asked": {k: str(v) for k, v in vars(arguments).items()}}
    record |= {"warm_up": warm_up, "steps": []}
    for step in range(arguments.steps):
        line: dict[str, Any] = {"step": step}
        _, prompts = next_examples(
            parts.task, tokenizer, target, step * arguments.prompts, arguments.prompts, arguments.tokens
        )
        for arm in list(arms) if (step + arguments.seed) % 2 == 0 else list(arms)[::-1]:
            mine, segments = arms[arm]
            guesser = NoDraft() if arm == "plain" else compute_copy(state.draft, config.model.dtype)
            segments.after_training(guesser.max_length, state.draft_acceptance, step, arguments.steps - step)
            began = time.perf_counter()
            with count_compilations() as compiled:
                rollouts = roll_out(mine, target, guesser, prompts, step_key(config.seed, step, DECODE), None, segments)
            seconds = time.perf_counter() - began
            line[arm] = {
                "seconds": seconds - compiled.seconds,
                "compiling": compiled.seconds,
                "behind": compiled.seconds_behind,
                "tokens": int(rollouts.lengths.sum()),
                "lengths": rollouts.lengths.tolist(),
                "longest": int(rollouts.lengths.max()),
                "acceptance_length": rollouts.statistics.acceptance_length,
                **segments.metrics(),
            }
        lessons = plan.lessons(state.lessons, line["speculative"]["seconds"]) if state.draft.train_length > 0 else 0
        state = dataclasses.replace(state, draft=remember(state.draft, rollouts))
        batch = make_update_batch(rollouts, np.zeros(len(rollouts.group), np.float32))
        features = features_of(target, batch, state.draft.layers) if lessons else None  # free in a run
        jax.block_until_ready(features)
        began, found = time.perf_counter(), {}
        with count_compilations() as compiled:
            for number in range(lessons):
                rows = draft_rows(step_key(config.seed, step, CHOOSE + number), len(rollouts.group), 0.25)
                assert features is not None
                state, lesson = update_draft(parts, state, target, features, batch, rollouts.lengths, rows, step)
                found = found or lesson
            jax.block_until_ready(eqx.filter(state.draft, eqx.is_array))
        spent = time.perf_counter() - began - compiled.seconds
        saved = line["speculative"].get("draft/seconds_saved")
        arms["speculative"][1].learned(found_acceptance(found))
        accepted = found.get("draft/expected_acceptance_pos_0")
        state = dataclasses.replace(state, lessons=plan.update(state.lessons, lessons, saved, spent, accepted))
        line |= {"lessons": lessons, "spent": spent, "found": found}
        record["steps"].append(line)
        (arguments.out / f"{name}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        (arguments.out / f"{name}.md").write_text(table(name, record), encoding="utf-8")
        print(table(name, record), file=sys.stderr, flush=True)
    return 0


def table(name: str, record: dict[str, Any]) -> str:
    lines = [
        f"{name}: warm-up {record['warm_up']:.0f} s",
        "",
        "| step | plain, s | tokens | speculative, s | tokens | ratio | a token | accepted | compiling, s | behind, s "
        "| saved, s | lessons, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    sums = np.zeros(6)
    for step in record["steps"]:
        plain, spec = step["plain"], step["speculative"]
        saved = spec.get("draft/seconds_saved", 0.0)
        sums += [plain["seconds"], plain["tokens"], spec["seconds"], spec["tokens"], saved, step["spent"]]
        lines.append(_line(str(step["step"]), plain["seconds"], plain["tokens"], spec["seconds"], spec["tokens"],
                           f"{spec['acceptance_length']:.2f}", spec["compiling"], spec["behind"], saved,
                           step["spent"]))  # fmt: skip
    lines.append(_line("sum", *sums[:4], "", sum(s["speculative"]["compiling"] for s in record["steps"]),
                       sum(s["speculative"]["behind"] for s in record["steps"]), *sums[4:]))  # fmt: skip
    arms = ({"steps": [step[arm] for step in record["steps"]]} for arm in ("plain", "speculative"))
    plain_rounds, rounds = same_completions(*arms)
    same = f"Rounds of these completions: {plain_rounds:.1f} s at the plain arm's costs, {rounds:.1f} s speculative"
    return "\n".join([*lines, "", same]) + "\n"


def _line(
    step: str,
    plain: float,
    plain_tokens: float,
    spec: float,
    spec_tokens: float,
    accepted: str,
    compiling: float,
    behind: float,
    saved: float,
    spent: float,
) -> str:
    each = plain / plain_tokens / (spec / spec_tokens)
    return (
        f"| {step} | {plain:.1f} | {plain_tokens:.0f} | {spec:.1f} | {spec_tokens:.0f} | {plain / spec:.2f} | "
        f"{each:.2f} | {accepted} | {compiling:.0f} | {behind:.0f} | {saved:.1f} | {spent:.1f} |"
    )


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
