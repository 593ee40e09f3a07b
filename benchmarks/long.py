"""Long traces of very different lengths: what shrinking the batch, refilling it, and an adaptive draft length give.

    python benchmarks/long.py --out results/long
    python benchmarks/long.py --out results/long --model path/to/folder --set model.dtype=bfloat16 --rows 32

Every token ends its row with probability `1 / --mean`, in place of what the model thinks of ending: lengths are then
spread geometrically, the few longest several times the mean, as reasoning traces are. Every arm decodes the same
prompts in every round, one after the other in one process. Writes `long.json`, `long.md` and `long.png`.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int
from rich.console import Console

from eqx_specgrpo import Prompts
from eqx_specgrpo.bench import BenchSettings, draft_run_config, generate_for, make_contender, prepare, rotating
from eqx_specgrpo.config import load_policy
from eqx_specgrpo.decoding import AdaptiveLength, Coupled, FixedLength, decode
from eqx_specgrpo.drafts import AbstractDraft, NoDraft
from eqx_specgrpo.grpo import compute_copy
from eqx_specgrpo.models import AbstractLanguageModel, Cache, Features
from eqx_specgrpo.records import RunProgress, machine
from eqx_specgrpo.runtime import keep_freed_memory
from eqx_specgrpo.train import next_examples


class EndsAtRandom(AbstractLanguageModel):
    """A model in whose texts every token is the last with the same probability.

    **Arguments:**

    - `model`: what all other probabilities are in proportion to.
    - `eos_id`: the token that ends a row.
    - `mean`: tokens of a completion on average, the last one included.
    - `max_length`: the longest sequence; positions beyond those that the model was trained at cost what others do.
    """

    model: AbstractLanguageModel
    eos_id: int = eqx.field(static=True)
    mean: float = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)
    max_length: int = eqx.field(static=True)

    def __init__(self, model: AbstractLanguageModel, eos_id: int, mean: float, max_length: int):
        self.model, self.eos_id, self.mean, self.max_length = model, eos_id, mean, max_length
        self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size

    def init_cache(self, batch: int, capacity: int, dtype: DTypeLike) -> Cache:
        return self.model.init_cache(batch, capacity, dtype)

    def no_cache(self) -> Cache:
        return self.model.no_cache()

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        cache: Cache,
        *,
        layers: tuple[int, ...] = (),
    ) -> tuple[Features, Cache]:
        return self.model.hidden(tokens, positions, cache, layers=layers)

    def unembed(
        self, hidden: Float[Array, "*batch hidden"], ids: Int[Array, " size"] | None = None
    ) -> Float[Array, "*batch vocab_or_size"]:
        logits = self.model.unembed(hidden)
        others = jax.nn.logsumexp(logits.at[..., self.eos_id].set(-jnp.inf), axis=-1)
        logits = logits.at[..., self.eos_id].set(others - jnp.log(self.mean - 1.0))
        return logits if ids is None else logits[..., ids]

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        return self.model.embed(tokens)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Shrinking, refilling and adapting on long traces.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", default="", help="folder or .gguf file; the embedded model by default")
    parser.add_argument("--draft", default="medusa", help="folder of a saved draft, or a kind")
    parser.add_argument("--length", type=int, default=2, help="tokens drafted a round where that is fixed")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=16, help="rows at a time, where not all")
    parser.add_argument("--max-completion-length", type=int, default=1024, help="longest completion")
    parser.add_argument("--mean", type=float, default=200.0, help="tokens of a completion on average")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=2.0, help="to get a draft ready that is not a saved one")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for specgrpo; repeatable")
    return parser.parse_args()


Decoding = Callable[[int], Iterator[Any]]


def make_arms(
    target: EndsAtRandom, draft: AbstractDraft, prompts: Sequence[Prompts], samples: int, arguments: argparse.Namespace
) -> dict[str, Decoding]:
    """By name, what decodes the prompts of a round, and yields one or several `Rollouts`."""
    rows, at_once = arguments.rows, arguments.at_once
    length_states: dict[str, Any] = {}

    def call(batch: Prompts, seed: int, name: str, draft=NoDraft(), length=FixedLength(0), **options: Any):
        # Coupled: the same tokens whatever is drafted, so that all arms do the same work.
        def keep(_, state):
            length_states[name] = state

        return decode(
            target, batch, draft=draft, verifier=Coupled(), length=length, length_state=length_states.get(name),
            key=jr.key(seed), max_new_tokens=arguments.max_completion_length, eos_ids=(target.eos_id,), samples=samples,
            on_segment=keep, **options,
        )  # fmt: skip

    def whole(name: str, *what: Any, **options: Any) -> Decoding:
        def arm(number: int):
            yield call(prompts[number], number, name, *what, **options)

        return arm

    def in_parts(name: str, **options: Any) -> Decoding:
        def arm(number: int):
            for place, part in enumerate(prompts[number].parts(at_once // samples)):
                yield call(part, 1000 * number + place, name, **options)

        return arm

    fixed, adaptive = FixedLength(arguments.length), AdaptiveLength(draft.max_length)
    all_rows, few = f"{rows} rows", f"{at_once} of {rows} at a time"
    return {
        f"{all_rows}, as they are": whole("a", smallest_bucket=rows),
        f"{all_rows}, shrinking": whole("b"),
        f"{all_rows}, shrinking, length {arguments.length}": whole("c", draft, fixed),
        f"{all_rows}, shrinking, adaptive": whole("d", draft, adaptive),
        f"{few}, as they are": in_parts("e", smallest_bucket=at_once),
        f"{few}, shrinking": in_parts("f"),
        f"{few}, refilling, shrinking": whole("g", max_rows=at_once),
        f"{few}, refilling, shrinking, length {arguments.length}": whole("h", draft, fixed, max_rows=at_once),
        f"{few}, refilling, shrinking, adaptive": whole("i", draft, adaptive, max_rows=at_once),
    }


def measure(arms: dict[str, Decoding], rounds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every arm in every round; first each is called twice with the prompts that warm up."""
    for name, arm in arms.items():
        for again in range(2):
            say(f"warming up: {name}" + (", again" if again else ""))
            list(arm(0))
    runs, names = [], list(arms)
    for number, _, index in rotating(len(arms), rounds):
        say(f"round {number + 1} of {rounds}, {names[index]}")
        begin = time.perf_counter()
        found = list(arms[names[index]](number + 1))
        seconds = time.perf_counter() - begin
        lengths = np.concatenate([rollouts.lengths for rollouts in found])
        forwards = sum(int(rollouts.statistics.target_forwards.sum()) for rollouts in found)
        emitted = sum(int(rollouts.statistics.emitted.sum()) for rollouts in found)
        runs.append(
            {
                "arm": names[index],
                "round": number,
                "seconds": seconds,
                "tokens": int(lengths.sum()),
                "lengths": lengths.tolist(),
                "acceptance_length": emitted / forwards,
            }
        )
    return runs


def table(record: dict[str, Any]) -> str:
    """In Markdown; ratios are to the first arm, within a round."""
    runs = record["runs"]
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    rates = {arm: {run["round"]: run["tokens"] / run["seconds"] for run in runs if run["arm"] == arm} for arm in arms}
    lengths = list(itertools.chain.from_iterable(run["lengths"] for run in runs if run["arm"] == arms[0]))
    mean, median = statistics.mean(lengths), statistics.median(lengths)
    lines = [
        f"Lengths: mean {mean:.0f}, median {median:.0f}, longest {max(lengths)}.",
        "",
        "| rows | tokens/s | over the first | acceptance length |",
        "| --- | --- | --- | --- |",
    ]
    for arm in arms:
        ratios = [rate / rates[arms[0]][number] for number, rate in rates[arm].items()]
        accepted = statistics.mean(run["acceptance_length"] for run in runs if run["arm"] == arm)
        lines.append(
            f"| {arm} | {statistics.median(rates[arm].values()):.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) | {accepted:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    runs = record["runs"]
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        rates = [run["tokens"] / run["seconds"] for run in runs if run["arm"] == arm]
        axes.barh(place, statistics.median(rates), color="#1b6ca8" if "at a time" in arm else "#5a8f5a")
        axes.plot(rates, [place] * len(rates), ".", color="0.2", markersize=4)
    axes.set_yticks(range(len(arms)), arms, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s, median and every round")
    figure.savefig(path, dpi=120)


def main() -> int:
    arguments = parse_arguments()
    samples = min(8, arguments.at_once)
    if arguments.rows % arguments.at_once or arguments.at_once % samples:
        raise SystemExit(
            f"--rows {arguments.rows} has to be a multiple of --at-once {arguments.at_once}, and that of {samples}"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = BenchSettings(
        rows=(arguments.rows,),
        lengths=(arguments.length,),
        max_completion_length=arguments.max_completion_length,
        samples=samples,
    )
    flags = {"model.path": arguments.model or None, "seed": arguments.seed, "model.dtype": arguments.dtype}
    with RunProgress(Console(stderr=True)) as progress:
        policy, tokenizer = load_policy(arguments.model)
        config = draft_run_config(arguments.draft, settings, None, arguments.set, flags)
        made = make_contender(Path(arguments.draft).name, config, policy, tokenizer)
        widest = 256 + arguments.max_completion_length
        target = EndsAtRandom(
            compute_copy(policy, arguments.dtype), tokenizer.eos_ids[0], arguments.mean, max(policy.max_length, widest)
        )
        # The draft learns from traces such as it will be measured on.
        generations = generate_for([made], target, arguments.minutes, progress)
        ready = prepare(made, target, arguments.minutes, progress, generations)
        count = arguments.rows // samples
        _, prompts = next_examples(
            made.parts.task, tokenizer, target, 1 << 21, count * (1 + arguments.rounds), arguments.max_completion_length
        )
        draft = compute_copy(ready.draft, arguments.dtype)
        arms = make_arms(target, draft, prompts.parts(count), samples, arguments)
        runs = measure(arms, arguments.rounds, progress.phase)
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    del asked["out"]
    asked["model"] = Path(arguments.model or "embedded").name
    record = {"about": machine(), "asked": asked, "runs": runs}
    (arguments.out / "long.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (arguments.out / "long.md").write_text(table(record), encoding="utf-8")
    draw(record, arguments.out / "long.png")
    print(table(record))
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
