"""Tasks of the reasoning-gym library: its generators, and its scorers as the reward."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from ..errors import UserError, did_you_mean
from ._base import AbstractTask, Example, check_index
from ._kind import TaskKind
from ._rewards import completion_text


class ReasoningGymTask(AbstractTask):
    """A dataset of [reasoning-gym](https://github.com/open-thought/reasoning-gym) (extra `reasoning-gym`).

    The reward `reasoning_gym` hands what stands between the last `<answer>` and `</answer>` of a completion to the
    dataset's own scorer. Columns: `answer` (the library's, `None` where many are right) and `entry` (its whole item).
    Item i of that library depends on `seed + i`, so neighbouring seeds share most items.
    """

    seed: int
    size: int | None
    name: str
    instruction: str
    chat: bool
    dataset: Any

    def __init__(
        self,
        name: str,
        size: int = 500,
        seed: int = 0,
        instruction: str = "Think step by step, then give the final answer between <answer> and </answer>.",
        chat: bool = True,
        **options: Any,
    ):
        """**Arguments:**

        - `name`: of the dataset, such as `"chain_sum"`.
        - `size`: number of items.
        - `seed`: of the items and of their order.
        - `instruction`: put below each question; it must ask for the answer in the tags that the reward looks for.
        - `chat`: whether the prompt is one user message, or plain text for a model without a chat template.
        - `options`: of the dataset.
        """
        if size < 1:
            raise UserError(f"`size` is {size}: give at least 1 item")
        module, datasets = _import_library()
        if name not in datasets:
            raise UserError(f"reasoning-gym has no dataset {name!r}.{did_you_mean(name, datasets)}")
        _, config_class = datasets[name]
        known = set(inspect.signature(config_class).parameters) - {"seed", "size"}
        for option in options:
            if option not in known:
                own = known | {"size", "instruction", "chat"}
                raise UserError(
                    f"the reasoning-gym dataset {name!r} has no option {option!r}.{did_you_mean(option, own)}"
                )
        try:
            self.dataset = module.create_dataset(name, size=size, seed=seed, **options)
        except (AssertionError, TypeError, ValueError) as error:  # how that library says no
            raise UserError(f"reasoning-gym refuses the options of {name!r}: {error}") from error
        self.seed = seed
        self.size = size
        self.name = name
        self.instruction = instruction
        self.chat = chat

    def example(self, index: int) -> Example:
        check_index(index, self.size)
        entry = self.dataset[index]
        content = f"{entry['question']}\n\n{self.instruction}" if self.instruction else entry["question"]
        prompt = [{"role": "user", "content": content}] if self.chat else content
        return Example(prompt, {"answer": entry["answer"], "entry": entry})

    def default_rewards(self) -> Mapping[str, Callable[..., Any]]:
        def reasoning_gym(completions: Sequence[Any], entry: Sequence[Any], **kwargs: Any) -> list[float]:
            del kwargs
            return [
                _score(self.dataset, completion_text(completion), item)
                for completion, item in zip(completions, entry, strict=True)
            ]

        return {"reasoning_gym": reasoning_gym}


def _score(dataset: Any, text: str, entry: Any) -> float:
    before, opening, rest = text.rpartition("<answer>")
    del before
    answer, closing, _ = rest.partition("</answer>")
    if not opening or not closing:
        return 0.0
    try:
        return float(dataset.score_answer(answer.strip(), entry))
    except Exception:  # several of its scorers parse the answer and raise on what doesn't parse: a wrong answer
        return 0.0


def _import_library() -> tuple[ModuleType, Mapping[str, tuple[Any, Any]]]:
    try:
        return importlib.import_module("reasoning_gym"), importlib.import_module("reasoning_gym.factory").DATASETS
    except ModuleNotFoundError as error:
        raise UserError(
            f"tasks named reasoning_gym:NAME need a package that isn't installed ({error.name}): "
            "pip install 'eqx_specgrpo[reasoning-gym]'"
        ) from error


def _dataset(name: str) -> tuple[str, ...] | None:
    library, colon, dataset = name.partition(":")
    return (dataset,) if library == "reasoning_gym" and colon else None


TASK = TaskKind(ReasoningGymTask, _dataset)
