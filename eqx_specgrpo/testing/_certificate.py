"""The certificate of losslessness for a user's own model and draft, for the command line."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.random as jr
from rich.console import Console
from rich.table import Table

from .._types import Prompts
from ..config import draft_config, load_policy, named_draft
from ..decoding import VERIFIER_KINDS, AbstractAcceptanceRule, AbstractVerifier
from ..drafts import AbstractDraft, describe_saved_draft
from ..errors import UserError
from ..files import is_import_spec, user_path
from ..models import AbstractLanguageModel
from ..records import RunProgress
from ._draws import check_draws
from ._gradients import check_gradients
from ._interface import check_interface
from ._law import check_law
from ._one_of import OneOf, verifier_name
from ._pair import make_pair, perturbed
from ._rewind import check_rewind
from ._saving import check_saving
from ._tokens import TokenComparison, compare_tokens
from ._training import check_training
from ._truncated import check_truncation
from ._verifier import check_verifier

# What any tokenizer knows, of unequal lengths.
_PROMPTS = ("7 + 5 =", "12 + 30 = 42, 3", "9", "41 - 8 = 33, 33 - 8 =", "2 + 2", "10 = 4 + 6 = 5 +", "88 + 1 =", "3 - ")
_NOISE = 0.02
_DRIVEN_ROWS = 4
_DRAWS = 1000
# So many rows, or as many as can be judged in a minute or two with a large vocabulary.
_LAW_ROWS, _LAW_LOGITS = 4096, 1 << 25


class Finding(eqx.Module):
    """The outcome of one check.

    **Arguments:**

    - `name`: what was checked.
    - `passed`: whether it holds.
    - `result`: what was found, or what is wrong.
    - `figures`: JSON-able.
    - `seconds`: how long it took, compilation included.
    - `of_output`: whether what is generated depends on it; else only how well the draft guesses, learns and is kept.
    """

    name: str
    passed: bool
    result: str
    figures: dict[str, Any]
    seconds: float
    of_output: bool = True


class Certificate(eqx.Module):
    """All findings on a pair.

    **Arguments:**

    - `model`, `draft`: as they were named.
    - `findings`: in the order in which they were made.
    """

    model: str
    draft: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    @property
    def lossless(self) -> bool:
        return all(finding.passed for finding in self.findings if finding.of_output)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able object."""
        findings = [
            {"name": f.name, "passed": f.passed, "result": f.result, "seconds": round(f.seconds, 2), **f.figures}
            for f in self.findings
        ]
        return {
            "model": self.model,
            "draft": self.draft,
            "passed": self.passed,
            "lossless": self.lossless,
            "checks": findings,
        }

    def table(self) -> Table:
        """For people."""
        table = Table(title=f"{self.model} with the draft {self.draft}", title_justify="left")
        for heading in ("check", "", "found"):
            table.add_column(heading, overflow="fold")
        table.add_column("s", justify="right")
        for finding in self.findings:
            mark = "[green]ok[/]" if finding.passed else "[bold red]FAILED[/]"
            table.add_row(finding.name, mark, finding.result, f"{finding.seconds:.1f}")
        return table

    def verdict(self) -> str:
        """One line."""
        failed = [finding for finding in self.findings if not finding.passed]
        names = ", ".join(finding.name for finding in failed if finding.of_output or self.lossless)
        if not self.lossless:
            return f"NOT lossless as far as was checked: {names} failed."
        if failed:
            return (
                f"Lossless as far as was checked, but the draft is not in order: {names} failed. It may guess badly, "
                "not learn, or not be loaded again."
            )
        return "Lossless as far as was checked: the output is the model's own, whatever the draft says."


def verify_pair(
    *,
    model: str = "",
    adapter: str | None = None,
    draft: str = "medusa",
    rows: int = 8,
    tokens: int = 32,
    seed: int = 0,
    frozen: Sequence[str] = (),
    near_tie: float = 1e-3,
    logprob_tolerance: float = 1e-3,
    console: Console | None = None,
) -> Certificate:
    """Runs the certificate.

    **Arguments:**

    - `model`: folder, `.gguf` file or `org/name`; the embedded default if empty.
    - `adapter`: folder of an adapter in PEFT's format, to be merged into the model.
    - `draft`: folder of a saved draft, a kind, or `file.py:Class`. A fresh one gets a little noise on its weights,
        since as it comes it may be the target's own head.
    - `rows`, `tokens`: how many completions are compared with plain decoding's, and their length.
    - `seed`: of sampling, and of fresh weights.
    - `frozen`: places of weights that are meant not to learn, as in `.adapter.scale`.
    - `near_tie`: two tokens whose scores are as near as this may be swapped by rounding.
    - `logprob_tolerance`: of reported log-probabilities.
    - `console`: for progress.

    **Raises:**

    `UserError` if the model or the draft can't be loaded, or do not fit. What fails a check is in the certificate.
    """
    with RunProgress(Console(stderr=True) if console is None else console) as progress:
        progress.phase("loading the model and the draft")
        target, tokenizer = load_policy(model, adapter)
        chosen = named_draft(draft, target, tokenizer, seed)
        if draft_config(draft).path is None:
            chosen = perturbed(chosen, _NOISE, seed)
        prompts = [tokenizer.encode_prompt(_PROMPTS[row % len(_PROMPTS)]) for row in range(rows)]
        if max(map(len, prompts)) + tokens > target.max_length:
            raise UserError(
                f"completions of {tokens} tokens were asked for, but the model's context holds {target.max_length}, "
                "prompt included: ask for fewer with --tokens"
            )
        findings = []
        # The user's own draft first: the laws of our rules, which need no model, take longest.
        for checks, of_output in (
            (_of_output(chosen, target, progress), True),
            (_of_draft(chosen, target, prompts[:_DRIVEN_ROWS], frozen, _own_kind(draft)), False),
            (_of_verifiers(), True),
        ):
            for name, check in checks:
                progress.phase(f"checking {name}")
                findings.append(_finding(name, check, of_output))
        settings = {"near_tie": near_tie, "logprob_tolerance": logprob_tolerance}
        for name, greedy in (
            ("greedy tokens are plain decoding's", True),
            ("coupled tokens are plain decoding's", False),
        ):
            progress.phase(f"checking {name}")
            findings += _compared(
                name,
                lambda greedy=greedy: compare_tokens(
                    chosen,
                    target,
                    Prompts.from_lists(prompts),
                    greedy=greedy,
                    key=jr.key(seed),
                    max_new_tokens=tokens,
                    length=chosen.max_length,
                    on_progress=progress.decoding,
                ),
                **settings,
            )
        progress.phase("checking truncated sampling")
        findings.append(_truncated(chosen, target, prompts, tokens, seed, progress, **settings))
        return Certificate(model or "the embedded default model", draft, tuple(findings))


Check = Callable[[], tuple[str, dict[str, Any]]]


def _own_kind(draft: str) -> str | None:
    """How the class of a draft of the user's own is found; `None` for ours."""
    config = draft_config(draft)
    kind = config.kind if config.path is None else describe_saved_draft(user_path(config.path))["kind"]
    return kind if is_import_spec(kind) else None


def _finding(name: str, check: Check, of_output: bool = True) -> Finding:
    """A failed check is a finding; so is whatever a draft of the user's own raises."""
    start = time.perf_counter()
    try:
        result, figures = check()
        return Finding(name, True, result, figures, time.perf_counter() - start, of_output)
    except UserError:
        raise
    except AssertionError as error:
        return Finding(name, False, str(error), {}, time.perf_counter() - start, of_output)
    except Exception as error:
        result = f"raised {type(error).__name__}: {error}"
        return Finding(name, False, result, {}, time.perf_counter() - start, of_output)


def _of_verifiers() -> list[tuple[str, Check]]:
    def law_of(verifier: AbstractVerifier, greedy_only: bool, draft_invariant: bool | None) -> Check:
        def check():
            report = check_verifier(verifier, greedy_only=greedy_only, draft_invariant=draft_invariant)
            drawn = f"statistics of what is drawn: least p-value {report.p_value:.3f}"
            if report.law_error is None:
                return f"every drafted chain leads to plain decoding's tokens; {drawn}", {"p_value": report.p_value}
            figures = {"law_error": report.law_error, "laws": report.num_laws, "p_value": report.p_value}
            return f"worst error {report.law_error:.1e} of {report.num_laws} laws enumerated; {drawn}", figures

        return check

    # Those that state their law share a program, and come first.
    kinds = sorted(VERIFIER_KINDS.values(), key=lambda kind: not isinstance(kind.verifier, AbstractAcceptanceRule))
    rules = tuple(kind.verifier for kind in kinds if isinstance(kind.verifier, AbstractAcceptanceRule))
    checks = []
    for kind in kinds:
        verifier = kind.verifier
        name = f"the law of {verifier_name(verifier)}"
        if isinstance(verifier, AbstractAcceptanceRule):
            verifier = OneOf(rules, rules.index(verifier))
        checks.append((name, law_of(verifier, kind.greedy_only, kind.draft_invariant)))
    return checks


def _of_output(draft: AbstractDraft, target: AbstractLanguageModel, progress: RunProgress) -> list[tuple[str, Check]]:
    # Behind random prompts, where the target is uncertain: where it is not, any draft looks honest.
    pair = make_pair(draft, target, None)

    def draws():
        p_value = check_draws(pair, draws=_DRAWS)
        return f"drawn from the distributions that come with them: least p-value {p_value:.3f}", {"p_value": p_value}

    def law():
        rows = max(256, min(_LAW_ROWS, _LAW_LOGITS // target.vocab_size))

        def say(done: int) -> None:
            progress.phase(f"checking the law of what is decoded: {done} of {rows} rows")

        p_value = check_law(pair, draws=rows, on_progress=say)
        return (
            f"{rows} rows, block verification at temperature 1: least p-value {p_value:.3f}",
            {"p_value": p_value, "rows": rows},
        )

    return [("drafted tokens", draws), ("the law of what is decoded", law)]


def _of_draft(
    draft: AbstractDraft,
    target: AbstractLanguageModel,
    prompts: list[list[int]],
    frozen: Sequence[str],
    own_kind: str | None,
) -> list[tuple[str, Check]]:
    pair = make_pair(draft, target, prompts)

    def interface():
        check_interface(pair)
        return "shapes and dtypes are what the decoder needs", {}

    def rewind():
        error = check_rewind(pair)
        return f"a probability is off by at most {error:.1e} from what is committed", {"rewind_error": error}

    def training():
        error = check_training(pair)
        return f"sees what is drafted with, but for {error:.1e} in a probability", {"training_error": error}

    def gradients():
        reached = check_gradients(pair, frozen=frozen)
        return (
            f"{reached:.0f} reaches the target; finite in every weight of the draft"
            if draft.train_length
            else "the draft has nothing to train",
            {"target_gradient": reached},
        )

    def saving():
        by_name = check_saving(pair, own_kind)
        return "comes back to the bit" + ("" if by_name else ", into a draft that is there already"), {}

    return [
        ("the draft's interface", interface),
        ("rewinding", rewind),
        ("training", training),
        ("the draft's gradient", gradients),
        ("saving and loading", saving),
    ]


def _truncated(
    draft: AbstractDraft,
    target: AbstractLanguageModel,
    prompts: list[list[int]],
    tokens: int,
    seed: int,
    progress: RunProgress,
    near_tie: float,
    logprob_tolerance: float,
) -> Finding:
    """Of the sets of tokens that are recorded with what is drawn from them."""

    def check():
        report = check_truncation(
            draft,
            target,
            prompts,
            key=jr.key(seed),
            max_new_tokens=tokens,
            length=draft.max_length,
            near_tie=near_tie,
            logprob_tolerance=logprob_tolerance,
            on_progress=progress.decoding,
        )
        figures = {"kept_mean": report.kept_mean, "edge": report.edge, "logprob_gap_max": report.logprob_gap}
        return report.summary(), figures

    return _finding("the tokens kept by truncated sampling", check)


def _compared(
    name: str, compare: Callable[[], TokenComparison], near_tie: float, logprob_tolerance: float
) -> list[Finding]:
    """Two findings: of the tokens, and of the log-probabilities reported with them."""
    kept: list[TokenComparison] = []

    def tokens():
        found = compare()
        kept.append(found)
        found.require_near_ties(name, near_tie)
        figures = {
            "tokens": found.tokens,
            "equal": found.equal,
            "acceptance_length": found.acceptance_length,
            "near_ties": [difference.behind for difference in found.differences],
        }
        return found.summary(), figures

    def logprobs():
        found = kept[0]
        found.require_logprobs(name, logprob_tolerance)
        figures = {"logprob_gap_mean": found.logprob_gap_mean, "logprob_gap_max": found.logprob_gap_max}
        return (
            f"off by {found.logprob_gap_mean:.1e} on average and {found.logprob_gap_max:.1e} at most from a fresh "
            "forward",
            figures,
        )

    findings = [_finding(name, tokens)]
    if kept:
        findings.append(_finding(f"log-probabilities, {name.split()[0]}", logprobs))
    return findings
