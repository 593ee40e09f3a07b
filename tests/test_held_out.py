"""Items that are measured on are never trained on, and items come in the order that was asked for."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from eqx_specgrpo.config import load_config, load_held_out, load_split, with_steps_of_epochs
from eqx_specgrpo.errors import ConfigError, UserError
from eqx_specgrpo.tasks import (
    AbstractTask,
    Arithmetic,
    EasiestFirst,
    Shuffled,
    TableTask,
    first_items,
    hold_out,
    indices_from,
    keep_apart,
    load_task,
)


def prompts(task: AbstractTask, count: int | None = None) -> list[str]:
    """Of a task without end, so many from the beginning of its stream."""
    size = task.size if count is None else count
    assert size is not None
    return [json.dumps(task.at(position).prompt) for position in range(size)]


def write(path, texts: Sequence[str]) -> TableTask:
    path.write_text("".join(json.dumps({"prompt": text, "answer": "1"}) + "\n" for text in texts))
    task = load_task(str(path), 0, {})
    assert isinstance(task, TableTask)
    return task


def test_held_out_of_a_finite_task(tmp_path):
    task = write(tmp_path / "a.jsonl", [str(number) for number in range(50)])
    training, held = hold_out(task, 10)
    assert held.size == 10 and training.size == 40
    assert not set(prompts(training)) & set(prompts(held))
    assert set(prompts(training)) | set(prompts(held)) == set(prompts(task))
    assert sorted(prompts(held)) != sorted(prompts(task))[:10], "spread over the file"
    again = hold_out(task, 10).held_out
    assert prompts(again) == prompts(held) and again.fingerprint() == held.fingerprint()
    assert hold_out(task, 9).training.fingerprint() != training.fingerprint()
    assert training.example(3).columns == {"answer": "1"}


def test_a_prompt_that_stands_twice_is_held_out_in_both_places(tmp_path):
    task = write(tmp_path / "a.jsonl", ["same", "same", "a", "b", "same"])
    for count in (1, 2):
        training, held = hold_out(task, count)
        assert not set(prompts(training)) & set(prompts(held))


def test_held_out_of_an_endless_task():
    """There are 9 problems: of 200 items no one is one of the held out, though they come up again and again."""
    task = Arithmetic(low=1, high=3)
    training, held = hold_out(task, 3)
    assert training.size is None and held.size == 3
    assert len(set(prompts(task, 200)) & set(prompts(held))) > 0
    assert not set(prompts(training, 200)) & set(prompts(held))
    assert prompts(training, 20) == prompts(training, 20)
    with pytest.raises(UserError, match="hold out fewer"):
        hold_out(Arithmetic(low=1, high=1), 1).training.example(0)


def test_a_task_of_its_own(tmp_path):
    task = write(tmp_path / "a.jsonl", ["a", "b", "c"])
    other = write(tmp_path / "b.jsonl", ["d", "e", "f", "g"])
    training, held = keep_apart(task, other, None)
    assert training is task and held is other
    assert keep_apart(task, other, 2).held_out.size == 2
    with pytest.raises(UserError, match=r"1 of the task's 3 items .* the first of them 'b'.*eval.holdout"):
        keep_apart(task, write(tmp_path / "c.jsonl", ["x", "b"]), None)
    with pytest.raises(UserError, match="no end: say how many .*eval.limit"):
        keep_apart(task, Arithmetic(), None)
    endless, held = keep_apart(Arithmetic(low=1, high=3), Arithmetic(low=1, high=3, seed=1), 2)
    assert not set(prompts(endless, 100)) & set(prompts(held))
    assert first_items(other, 9) is other


@pytest.mark.parametrize("count", [3, 4])
def test_nothing_is_left_to_train_on(tmp_path, count):
    with pytest.raises(UserError, match=f"eval.holdout = {count} leaves nothing to train on of a task of 3 items"):
        hold_out(write(tmp_path / "a.jsonl", ["a", "b", "c"]), count)


def test_configuration_of_an_evaluation(tmp_path):
    def config(*settings: str):
        return load_config(None, ["task.size=40", *settings])

    task, held = load_split(config("eval.holdout=8"))
    assert held is not None and held.size == 8 and task.size is not None and task.size <= 32
    assert load_split(config())[1] is None and load_held_out(config()) is None
    # The run's options are those of a task of the same name.
    found = load_held_out(config("eval.task=arithmetic", "eval.seed=1", "eval.limit=4", "eval.options.low=100",
                                 "eval.options.high=100000"))  # fmt: skip
    assert found is not None and found[0].size == 4
    assert 5 <= len(found[0].example(0).columns["expression"].split()[::2]) <= 7
    with pytest.raises(UserError, match="have a prompt of the evaluation's task as well"):
        load_held_out(config("eval.task=arithmetic"))
    assert load_held_out(config("eval.task=arithmetic"), apart=False) is not None
    with pytest.raises(UserError, match="is empty"):
        empty = tmp_path / "empty.jsonl"
        empty.write_text("")
        load_held_out(config(f"eval.task={empty}"))
    with pytest.raises(UserError, match="needs 'answer'"):
        only = tmp_path / "only.jsonl"
        only.write_text('{"prompt": "a"}\n')
        load_held_out(config(f"eval.task={only}", "eval.functions=['arithmetic']"))


@pytest.mark.parametrize(
    "settings, message",
    [
        (["eval.every=3"], "eval.every = 3 has no effect without eval.task or eval.holdout"),
        (["eval.holdout=3", "eval.limit=3"], "eval.limit = 3 has no effect without eval.task"),
        (["eval.holdout=3", "eval.task=arithmetic"], "drop one of the two"),
        (
            ["eval.holdout=3", "eval.temperature=0", "eval.samples=4"],
            "gives the same completion eval.samples = 4 times",
        ),
        (["save_best=eval/reward"], "needs evaluations: set eval.holdout or eval.task"),
        (["eval.holdout=3", "save_best=eval/pass@3"], "an evaluation has no such metric"),
        (["eval.holdout=3", "save_best=reward"], "Did you mean 'eval/reward'"),
        (["eval_steps=3"], "set eval.every"),
        (["grpo.dynamic_sampling=true"], "set grpo.max_sample_batches"),
        (["num_epochs=3"], "set num_train_epochs"),
        (["save_total_limit=0"], "save_total_limit = 0"),
    ],
)
def test_bad_configurations(settings, message):
    with pytest.raises(ConfigError) as info:
        load_config(None, settings)
    assert message in str(info.value)


def test_epochs_become_steps():
    config = load_config(None, ["num_train_epochs=2.5", "grpo.prompts_per_step=4"])
    assert with_steps_of_epochs(config, Arithmetic(size=10)).steps == math.ceil(25 / 4)
    with pytest.raises(UserError, match="num_train_epochs = 2.5, but the task has no end"):
        with_steps_of_epochs(config, Arithmetic())
    assert with_steps_of_epochs(load_config(None, ["steps=7"]), Arithmetic()).steps == 7


def test_steps_that_are_given_later_go_before_epochs(tmp_path):
    """As TRL's max_steps does: a finished run of two epochs goes on for so many steps."""
    path = tmp_path / "config.toml"
    path.write_text("steps = 20\nnum_train_epochs = 2\n")
    assert load_config(path).num_train_epochs == 2
    assert load_config(path, ["steps=30"]).num_train_epochs is None
    assert load_config(path, ["num_train_epochs=3"]).num_train_epochs == 3
    assert load_config(None, ["num_train_epochs=3"], flags={"steps": 6}).num_train_epochs is None
    assert load_config(None, ["num_train_epochs=3", "steps=6"]).num_train_epochs is None
    assert load_config(None, ["steps=6", "num_train_epochs=3"]).num_train_epochs == 3


def epochs(order, task: AbstractTask, rewards: Sequence[dict[int, float]], at_once: int) -> list[list[int]]:
    """The items of several epochs, asked for and answered so many at a time; `rewards` by epoch and item."""
    assert task.size is not None
    state, seen = order.init(task), []
    for position in range(0, task.size * len(rewards), at_once):
        indices = indices_from(order, state, task, position, at_once)
        seen += indices
        by_item = rewards[position // task.size]
        state = order.start(state, task, position + at_once - 1)
        state = order.update(state, indices, np.array([by_item[index] for index in indices]))
    return [seen[first : first + task.size] for first in range(0, task.size * len(rewards), task.size)]


@pytest.mark.parametrize("at_once", [1, 4])
def test_easiest_first(at_once):
    task = Arithmetic(size=20)
    ease = {index: index / 20 for index in range(20)}
    first, second, third = epochs(EasiestFirst(), task, [ease, {i: 1 - r for i, r in ease.items()}, ease], at_once)
    assert first == epochs(Shuffled(), task, [ease], at_once)[0]
    assert second == sorted(range(20), reverse=True) and third == sorted(range(20))


def test_every_order_has_each_item_once_an_epoch():
    task = Arithmetic(size=20)
    rewards = [{index: float(index % 3 == 0) for index in range(20)}] * 3
    for order in (Shuffled(), EasiestFirst()):
        found = epochs(order, task, rewards, 3)  # batches that reach into the next epoch
        assert all(sorted(epoch) == list(range(20)) for epoch in found)
        assert found[1] != found[2], "equally hard ones are shuffled anew"


def test_what_is_not_known_counts_as_the_mean():
    order, task = EasiestFirst(), Arithmetic(size=4)
    state = order.update(order.init(task), [0, 1, 2], np.array([1.0, 0.0, math.nan]))
    state = order.start(state, task, 4)
    assert state.order[0] == 0 and state.order[-1] == 1
    with pytest.raises(ValueError, match="call `start`"):
        order.index(state, task, 0)
    with pytest.raises(UserError, match="no end: give it a size"):
        order.init(Arithmetic())
