"""`specgrpo bench`: loads a model, gets drafts ready, measures them against plain decoding."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from rich.console import Console

from ..config import (
    RunConfig,
    RunParts,
    draft_flags,
    dtype_advice,
    load_config,
    load_policy,
    make_draft,
    make_parts,
    model_name,
)
from ..drafts import AbstractDraft, NoDraft
from ..errors import UserError
from ..grpo import compute_copy, make_update_batch
from ..layout import OneDevice
from ..models import AbstractLanguageModel, Tokenizer
from ..records import RunProgress, machine
from ..sampling import make_sampling
from ..train import Lesson, features_of, mean_entropy, next_examples, out_of_memory_advice, step_key
from ._drafts import Generations, collect_generations, distil_on, expected_acceptance
from ._measure import Arm, Workload, measure, plain_arm
from ._result import BenchResult
from ._settings import BenchSettings

DEFAULT_DRAFTS = ("ngram", "medusa")
# Prompts far from those that drafts learn from, which begin with the task's first.
_FIRST_POSITION = 1 << 20
_COLLECT_SHARE = 0.5  # of the time to prepare a draft; the rest is for learning
_LEAST_SHARE = 0.25  # for learning, also where generating took longer than planned
_FEW_UPDATES = 20  # fewer than a run warms a fresh draft up with
_PURPOSE = 3  # of random numbers, apart from those of `_lessons.py`
_LOOKUP = "ngram+"


class Contender(eqx.Module):
    """A draft that is ready to be measured.

    **Arguments:**

    - `name`: as it was given.
    - `parts`: made for it.
    - `draft`: float32.
    - `record`: JSON-able, how it was prepared.
    """

    name: str
    parts: RunParts
    draft: AbstractDraft
    record: dict[str, Any]


def bench(
    settings: BenchSettings,
    drafts: Sequence[str] = (),
    *,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> BenchResult:
    """Measures drafts against plain decoding on a task's prompts.

    **Arguments:**

    - `settings`: what to measure.
    - `drafts`: for each the folder of a saved one, a kind, or a class as `file.py:Class`; with `ngram+` before it, an
        n-gram lookup in front. What is not saved and can learn is distilled first, on the target's own completions.
        By default an n-gram lookup and Medusa heads.
    - `path`, `overrides`, `flags`: the configuration, see `load_config`. What matters of it: `model`, `task`, `seed`,
        `draft`, how many completions are decoded at a time (`grpo.max_rows`), and how many are made at a time to distil
        from.
    - `console`: for progress.

    **Raises:**

    `UserError` for whatever the user can mend.
    """
    names = tuple(drafts) or DEFAULT_DRAFTS
    if len(set(names)) < len(names):
        raise UserError(f"--draft {max(names, key=names.count)} is given twice: name each draft once")
    configs = {name: draft_run_config(name, settings, path, overrides, flags) for name in names}
    base = next(iter(configs.values()))
    with RunProgress(Console(stderr=True) if console is None else console) as progress, out_of_memory_advice():
        progress.phase(f"loading {model_name(base)}")
        about = machine()  # before the work, which may take long: commit and load are those that were found
        policy, tokenizer = load_policy(base.model.path, base.model.adapter, base.model.revision)
        progress.advise(dtype_advice(base.model.dtype, policy.hidden_size))
        made = [make_contender(name, config, policy, tokenizer) for name, config in configs.items()]
        for contender in made:
            _measurable(contender, settings)
        target = compute_copy(policy, base.model.dtype)
        generations = generate_for(made, target, settings.minutes, progress)
        contenders = [prepare(one, target, settings.minutes, progress, generations) for one in made]
        return measure_drafts(contenders, target, settings, progress, about)


def make_contender(name: str, config: RunConfig, policy: AbstractLanguageModel, tokenizer: Tokenizer) -> Contender:
    """A draft as its configuration says, not distilled yet."""
    draft = make_draft(config.draft, policy, config.seed, tokenizer)
    if isinstance(draft, NoDraft):
        raise UserError(f"--draft {name} is plain decoding, which is measured anyway: name another draft")
    parts = make_parts(config, tokenizer, draft, with_rewards=False)
    # What is measured is one device.
    return Contender(name, dataclasses.replace(parts, mesh=OneDevice()), draft, {})


def draft_run_config(
    name: str,
    settings: BenchSettings,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration under which one draft is made and distilled: as a run's, but that it drafts as far ahead as is
    measured."""
    spec = name.removeprefix(_LOOKUP)
    its_flags = draft_flags(spec)
    if "draft.path" not in its_flags or its_flags["draft.path"] == "none":
        its_flags |= {"draft.max_length": max(settings.drafted), "draft.length": max(settings.drafted)}
    if name != spec:
        its_flags["draft.ngram"] = True
    common = {
        "grpo.max_completion_length": settings.max_completion_length,
        "grpo.temperature": float(settings.temperature) or None,
    }
    return load_config(path, overrides, {**common, **(flags or {}), **its_flags})


def generate_for(
    made: Sequence[Contender],
    target: AbstractLanguageModel,
    minutes: float,
    progress: RunProgress,
    batches: int | None = None,
) -> Generations | None:
    """The target's own completions for all drafts that have to be distilled; `None` if none has to be.

    **Arguments:**

    - `minutes`: to get a draft ready; half of it is for this.
    - `batches`: exactly so many instead.
    """
    learning = [contender for contender in made if _learns(contender)]
    if not learning:
        return None
    generations = collect_generations(
        learning[0].parts,
        target,
        tuple(layer for contender in learning for layer in contender.draft.layers),
        seconds=60 * minutes * _COLLECT_SHARE,
        batches=batches,
        on_phase=progress.phase,
        on_progress=progress.decoding,
    )
    progress.say(f"{generations.tokens} tokens of the target's own to learn from, in {generations.seconds:.0f} s")
    return generations


def prepare(
    made: Contender,
    target: AbstractLanguageModel,
    minutes: float,
    progress: RunProgress,
    generations: Generations | None,
) -> Contender:
    """Distils the draft if it is fresh and can learn, and DONATES it then."""
    if generations is None or not _learns(made):
        return Contender(
            made.name,
            made.parts,
            made.draft,
            {"distilled": False, "loaded_from": made.parts.config.draft.path},
        )
    draft, record = distil_on(
        made.parts,
        made.draft,
        target,
        generations,
        seconds=max(60 * minutes * _LEAST_SHARE, 60 * minutes - generations.seconds),
        on_phase=progress.phase,
    )
    after = " ".join(f"{value:.2f}" for value in record["expected_acceptance_after"])
    progress.say(f"{made.name}: {record['updates']} updates, expected acceptance by position {after}")
    if record["updates"] < _FEW_UPDATES:
        progress.advise(
            f"{made.name} had time for {record['updates']} updates, too few to judge it by: give more than --minutes "
            f"{minutes:g}, of which compiling and generating take their part"
        )
    return Contender(made.name, made.parts, draft, record)


def _learns(contender: Contender) -> bool:
    return contender.draft.train_length > 0 and contender.parts.config.draft.path is None


def measure_drafts(
    contenders: Sequence[Contender],
    target: AbstractLanguageModel,
    settings: BenchSettings,
    progress: RunProgress,
    about: Mapping[str, Any],
) -> BenchResult:
    """Every draft, length and verifier against plain decoding, for each number of rows.

    **Arguments:**

    - `contenders`: of one model, task, seed and dtype.
    - `target`: in the dtype to compute in.
    - `settings`: what to measure.
    - `progress`: for what is going on.
    - `about`: `machine()` as it was before anything was prepared.
    """
    config = contenders[0].parts.config
    arms = [plain_arm(), *_arms(contenders, settings, progress)]
    runs, compiled, plain = [], {}, None
    for rows, workload in _workloads(contenders[0].parts, target, settings):
        found = measure(target, arms, workload, progress.phase, progress.decoding)
        progress.say(f"{rows} rows: measured {len(arms)} arms in {settings.rounds} rounds")
        runs += found.runs
        compiled[str(rows)] = dict(found.compile_seconds)
        plain = found.plain  # of the last, which has most rows
    assert plain is not None
    progress.phase("looking at the policy's own completions")
    batch = make_update_batch(plain, np.zeros(len(plain.group), np.float32))
    lessons = {c.draft.layers: Lesson(plain, batch, features_of(target, batch, c.draft.layers)) for c in contenders}
    about_drafts = []
    for contender in contenders:
        # A truncated law, or that of temperature 0, is not the one that drafts are trained and examined for.
        truncations = (settings.top_k, settings.top_p, settings.min_p)
        whole = settings.temperature > 0 and all(value is None for value in truncations)
        about_drafts.append(
            {
                "name": contender.name,
                "class": type(contender.draft).__name__,
                "max_length": contender.draft.max_length,
                "parameters": _parameters(contender.draft),
                "settings": contender.parts.config.draft.model_dump(),
                "prepared": contender.record,
                "expected_acceptance": (
                    expected_acceptance(contender.parts, contender.draft, target, lessons[contender.draft.layers])
                    if whole
                    else None
                ),
            }
        )
    return BenchResult(
        settings=settings.to_json()
        | {
            "seed": config.seed,
            "dtype": config.model.dtype,
            "max_rows": config.grpo.max_rows,
            "task": {"name": config.task.name, **config.task.options},
        },
        about=dict(about),
        model={"name": model_name(config), "parameters": _parameters(target), "vocab_size": target.vocab_size},
        policy={
            "entropy": mean_entropy(contenders[0].parts, target, next(iter(lessons.values()))),
            "entropy_temperature": config.grpo.temperature,
            "tokens": int(plain.lengths.sum()),
            "mean_completion_length": float(plain.lengths.mean()),
        },
        drafts=about_drafts,
        runs=tuple(runs),
        compile_seconds=compiled,
    )


def _measurable(contender: Contender, settings: BenchSettings) -> list[int]:
    """The lengths that the draft can be measured at."""
    most = contender.draft.max_length
    if most < settings.drafted[0]:
        raise UserError(
            f"the draft {contender.name} drafts at most {most} tokens, but --lengths begins with "
            f"{settings.drafted[0]}: add a length of at most {most}, or leave the draft out"
        )
    return [length for length in settings.drafted if length <= most]


def _arms(contenders: Sequence[Contender], settings: BenchSettings, progress: RunProgress) -> list[Arm]:
    arms = []
    for contender in contenders:
        draft = compute_copy(contender.draft, contender.parts.config.model.dtype)
        lengths: list[int | None] = [*_measurable(contender, settings)]
        longest = min(draft.max_length, max(settings.drafted))
        beyond = settings.drafted[len(lengths) :]
        if beyond:
            progress.say(
                f"{contender.name} drafts at most {draft.max_length} tokens: it is not measured at "
                f"{', '.join(map(str, beyond))}"
            )
        for rule, verifier in settings.rules.items():
            for length in lengths + [None] * settings.adaptive:
                arms.append(Arm(contender.name, draft, rule, verifier, length, longest))
    return arms


def _workloads(parts: RunParts, target: AbstractLanguageModel, settings: BenchSettings) -> list[tuple[int, Workload]]:
    """By ascending number of rows. Prompts differ from round to round, all padded alike: few programs are compiled."""
    most = max(settings.rows) // settings.samples
    _, prompts = next_examples(
        parts.task,
        parts.tokenizer,
        target,
        _FIRST_POSITION,
        most * (settings.rounds + 1),
        settings.max_completion_length,
    )
    sampling = make_sampling(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
    workloads = []
    for rows in sorted(settings.rows):
        count = rows // settings.samples
        by_round = tuple(part.parts(count)[0] for part in prompts.parts(most))
        key = jr.fold_in(step_key(parts.config.seed, 0, _PURPOSE), rows)
        eos_ids = () if settings.ignore_eos else tuple(parts.tokenizer.eos_ids)
        workload = Workload(
            by_round,
            settings.samples,
            settings.max_completion_length,
            sampling,
            eos_ids,
            key,
            max_rows=parts.config.grpo.max_rows,
        )
        workloads.append((rows, workload))
    return workloads


def _parameters(module: eqx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array)))
