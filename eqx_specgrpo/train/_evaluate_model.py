"""Any model, measured as a run measures its policy."""

from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from ..config import RunConfig, dtype_advice, load_held_out, load_policy, model_name, named_draft
from ..decoding import FixedLength, make_verifier
from ..drafts import NoDraft
from ..errors import UserError
from ..evaluation import evaluate, make_evaluation
from ..grpo import compute_copy
from ..records import RunProgress, machine
from ..tasks import TrainerState
from ._interrupt import stopped_at_once
from ._out_of_memory import out_of_memory_advice


class ModelEvaluation(NamedTuple):
    """The result of `specgrpo eval`.

    **Arguments:**

    - `about`: model, task, and how it was measured.
    - `metrics`: by name, as in a run's `eval.jsonl`.
    - `completions`: one JSON-able object per completion.
    """

    about: dict[str, Any]
    metrics: dict[str, float]
    completions: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-able object of everything but the completions."""
        return self.about | {"metrics": self.metrics}

    def table(self) -> Table:
        """Makes a table of the metrics with their intervals."""
        title = f"{self.about['model']} on {self.about['task']}"
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        table.add_column("")
        for name in ("value", "95 % interval, by bootstrap over prompts"):
            table.add_column(name, justify="right")
        for name, value in self.metrics.items():
            if name.endswith(("/low", "/high")):
                continue
            low, high = self.metrics.get(f"{name}/low"), self.metrics.get(f"{name}/high")
            if low is None:
                table.add_row(name.removeprefix("eval/"), f"{value:.4g}", "")
            else:
                table.add_row(name.removeprefix("eval/"), f"{value:.4f}", f"{low:.4f} to {high:.4f}")
        return table


def evaluate_model(
    config: RunConfig, *, draft: str | None = None, apart: bool = True, console: Console | None = None
) -> ModelEvaluation:
    """Loads a model (and a draft), and measures it on held-out items.

    With a run's own configuration, policy and draft it reproduces the metrics of the run's last evaluation.

    **Arguments:**

    - `config`: as of a run. What matters of it: `model`, `eval`, `seed`, `reward`, `task` (whose items are not measured
        on, or from which some are held out), of `grpo` how many completions are decoded at a time and what `[eval]`
        does not say itself, and `draft.length` and `draft.verifier`.
    - `draft`: folder of a saved draft, a kind, or a class as `file.py:Class`; `None` for plain decoding.
    - `apart`: whether `eval.task` may share no prompt with `task`.
    - `console`: where progress goes, by default standard error.

    **Raises:**

    `UserError` for errors that a user can correct.
    """
    held_out = load_held_out(config, apart=apart)  # before the model, which may be large
    if held_out is None:
        raise UserError(
            "there is nothing to measure on: name a task (--task), or set eval.holdout to a number of items"
        )
    with RunProgress(Console(stderr=True) if console is None else console) as progress:
        with stopped_at_once(), out_of_memory_advice():
            progress.phase(f"loading {model_name(config)}")
            policy, tokenizer = load_policy(config.model.path, config.model.adapter)
            progress.advise(dtype_advice(config.model.dtype, policy.hidden_size))
            guesses = NoDraft() if draft is None else named_draft(draft, policy, tokenizer, config.seed)
            length = FixedLength(min(config.draft.length, guesses.max_length))
            verifier = make_verifier(config.draft.verifier)
            evaluation = make_evaluation(config, held_out, tokenizer, policy, verifier, length)
            count, samples = len(evaluation.examples), evaluation.samples
            progress.phase(f"measuring {count} prompts x {samples} completions")
            dtype = config.model.dtype
            target, guesses = compute_copy(policy, dtype), compute_copy(guesses, dtype)
            where = TrainerState(global_step=0, max_steps=config.steps, epoch=None)
            result = evaluate(evaluation, target, guesses, where, progress.decoding)
    about = {
        "model": model_name(config),
        "adapter": config.model.adapter,
        "draft": draft,
        "task": config.eval.task or f"{config.eval.holdout} items of {config.task.name}",
        "temperature": config.grpo.temperature if config.eval.temperature is None else config.eval.temperature,
        "max_completion_length": evaluation.max_completion_length,
        "threshold": evaluation.threshold,
        "seed": config.seed,
        "dtype": dtype,
        "machine": machine(),
    }
    return ModelEvaluation(about, result.metrics, result.completions)
