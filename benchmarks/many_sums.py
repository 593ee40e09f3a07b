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


def number_of_sums(rng: random.Random, asked: str) -> int:
    """`"8"`, or `"2-60"`: spread geometrically, so that completions differ in length by more than a decade."""
    low, _, high = asked.partition("-")
    if not high:
        return int(low)
    return round(int(low) * (int(high) / int(low)) ** rng.random())


def problem(rng: random.Random, sums: str, high: int) -> tuple[str, list[str]]:
    """What is asked, and the sums in it."""
    texts = [f"{rng.randint(1, high)} + {rng.randint(1, high)}" for _ in range(number_of_sums(rng, sums))]
    listed = "\n".join(f"{number}. {text} = ?" for number, text in enumerate(texts, 1))
    return f"Write the answers.\n{listed}", texts


def write_task(path: Path, problems: int, sums: str, high: int) -> None:
    rng = random.Random(0)
    lines = []
    for _ in range(problems):
        asked, texts = problem(rng, sums, high)
        lines.append(json.dumps({"prompt": [{"role": "user", "content": asked}], "sums": texts}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the task as a .jsonl file.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--sums", default="8", help="in a problem; LOW-HIGH spreads their number geometrically")
    parser.add_argument("--high", type=int, default=12, help="the greatest operand")
    arguments = parser.parse_args()
    write_task(arguments.path, arguments.problems, arguments.sums, arguments.high)


if __name__ == "__main__":
    main()
