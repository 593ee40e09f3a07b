"""A task that keeps traces long: a list of sums, each to be written down again with its result.

    python benchmarks/many_sums.py sums.jsonl
    specgrpo run --model path/to/model --task sums.jsonl --reward benchmarks/many_sums.py:sums_right

Two-digit sums alone collapse to a dozen tokens within some fifty steps of GRPO, and then there is little to speed up.
"""

import argparse
import json
import random
from pathlib import Path

from eqx_specgrpo.tasks import completion_text


def sums_right(completions, sums, **kwargs):
    """The share of the sums that stand in a line of their own, numbered, with the right result."""
    rewards = []
    for completion, wanted in zip(completions, sums, strict=True):
        lines = {" ".join(line.split()).partition(". ")[2] for line in completion_text(completion).splitlines()}
        right = [f"{text} = {sum(map(int, text.split(' + ')))}" in lines for text in wanted]
        rewards.append(sum(right) / len(wanted))
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the task as a .jsonl file.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--sums", type=int, default=8, help="in a problem")
    parser.add_argument("--high", type=int, default=12, help="the greatest operand")
    arguments = parser.parse_args()
    rng = random.Random(0)
    lines = []
    for _ in range(arguments.problems):
        sums = [f"{rng.randint(1, arguments.high)} + {rng.randint(1, arguments.high)}" for _ in range(arguments.sums)]
        problem = "\n".join(f"{number}. {text} = ?" for number, text in enumerate(sums, 1))
        prompt = [{"role": "user", "content": f"Write the answers.\n{problem}"}]
        lines.append(json.dumps({"prompt": prompt, "sums": sums}) + "\n")
    arguments.path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
