import asyncio
import math
import signal
import subprocess
import sys
import textwrap
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
from made_rollouts import make_rollouts

from eqx_specgrpo._types import ScoredRollouts
from eqx_specgrpo.errors import Stopped, UserError
from eqx_specgrpo.files._import_spec import import_callable, import_spec_of
from eqx_specgrpo.tasks import (
    Arithmetic,
    Example,
    OutOfTime,
    RewardError,
    RewardLog,
    Rewards,
    TrainerState,
    _math_reward as math_module,
    arithmetic_reward,
    find_numbers,
    last_number,
    limited,
    load_rewards,
    load_task,
    running_totals_reward,
    soft_overlong,
    think_format_reward,
)
from eqx_specgrpo.train._step_records import completion_records

EXAMPLE = Path(__file__).parent.parent / "examples" / "custom_reward.py"


@pytest.mark.parametrize(
    "text, value",
    [
        ("The answer is 27.", 27),
        ("27", 27),
        ("12 + 15 = 27\n", 27),
        ("12-3", 3),
        ("12 - 3", 3),
        ("5 -3", 3),
        ("(2)-3", 3),
        ("= -3", -3),
        ("= - 3", -3),
        ("12-15=-3", -3),
        ("-3", -3),
        ("5 - -3", -3),
        ("2 * -3", -3),
        ("answer:-3", -3),
        ("\u22123", -3),
        ("step-3", 3),
        ("- 3 apples", 3),
        ("$-5", -5),
        ("1,234", 1234),
        ("-1,234,567.0", -1234567),
        ("1,23", 23),
        ("1, 2, 3", 3),
        ("100,200,30", 30),
        ("27.0", 27),
        ("27.000", 27),
        ("27.5", Decimal("27.5")),
        (".5", Decimal("0.5")),
        ("...15", 15),
        ("2.7e1", 27),
        ("-" + "1234567890" * 4, -int("1234567890" * 4)),
        ("**27**", 27),
        ("\\boxed{27}", 27),
        ("27th", 27),
        ("1.2.3", None),
        ("4 then 1.2.3", None),
        ("1e99999999999999999999", None),
        ("no number", None),
        ("", None),
        ("\u0663", None),  # another script's digit
    ],
)
def test_last_number(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize(
    "text, results",
    [
        ("12 + 15 = 27", [27]),
        ("12 - 15 = -3", [-3]),
        ("12-15=-3", [-3]),
        ("1 + 2 = 3 + 4 = 7", [3, 7]),
        ("it is 7 - good", [7]),
        ("3\n- 4 = 5", [3, 5]),
        ("12 plus 15 is 27", [12, 15, 27]),
        ("2 * 3 = **6**", [6]),
        ("1 2 3, 4,5\n6", [1]),
        ("2 \u00d7 3 \u00f7 6 = 1", [1]),
        ("2 + -3", []),
    ],
)
def test_operands_and_lists_are_no_results(text, results):
    assert [number.value for number in find_numbers(text) if number.is_result] == results


@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        ("10 + 17 = 27", "27", 1.0),
        ("it is 27.0", "27", 1.0),
        ("it is 1,234", 1234, 1.0),
        ("12 - 15 = -3", "-3", 1.0),
        ("12-3", "-3", 0.0),
        ("18 - 15 = 3", "-3", 0.0),
        ("127", "27", 0.0),
        ("27.5", "5", 0.0),
        ("2.27", "27", 0.0),
        ("27 or 28", "27", 0.0),
        ("2 7", "27", 0.0),
        ("", "27", 0.0),
        ("twenty-seven", "27", 0.0),
        ("27", None, None),
        ([{"role": "assistant", "content": "So 27."}], "27", 1.0),
    ],
)
def test_arithmetic_reward(completion, answer, reward):
    assert arithmetic_reward(completions=[completion], answer=[answer], prompts=["?"]) == [reward]


def test_arithmetic_reward_needs_a_number_to_compare_with():
    with pytest.raises(ValueError, match="'#### 27', which isn't a number"):
        arithmetic_reward(completions=["27"], answer=["#### 27"])


@pytest.mark.parametrize(
    "completion, expression, reward",
    [
        ("1 + 2 = 3, 3 + 4 = 7, 7 + 5 = 12", "1 + 2 + 4 + 5", 1.0),
        ("First 3. Adding 4 gives 7. Adding 5 gives 12. The answer is 12.", "1 + 2 + 4 + 5", 1.0),
        ("12", "1 + 2 + 4 + 5", 1 / 3),
        ("1 + 2 = 3, 3 + 4 = 7, 7 + 5 = 13", "1 + 2 + 4 + 5", 2 / 3),
        ("1 + 2 = 4, 4 + 4 = 8, 8 + 5 = 13", "1 + 2 + 4 + 5", 0.0),
        ("1 + 2 = 3 + 4 = 7 + 5 = 12", "1 + 2 + 4 + 5", 1.0),
        ("3 + 4 = 7; 1 + 2 = 3; so 12", "1 + 2 + 4 + 5", 2 / 3),  # out of order
        ("1 2 3 4 5 6 7 8 9 10 11 12", "1 + 2 + 4 + 5", 1 / 3),  # counting earns no steps
        ("1 + 2 + 3 + 7 = 12", "1 + 2 + 4 + 5", 1 / 3),
        ("2 * 3 = 6 and 10 - 6 = 4", "10 - 2 * 3", 1.0),
        ("3 - 10 = -7, -7 + 2 = -5", "3 - 10 + 2", 1.0),
        ("27", "12 + 15", 1.0),
        ("28", "12 + 15", 0.0),
        ("", "12 + 15", 0.0),
        ("27", None, None),
        ([{"role": "assistant", "content": "27"}], "12 + 15", 1.0),
    ],
)
def test_running_totals_reward(completion, expression, reward):
    (value,) = running_totals_reward(completions=[completion], expression=[expression])
    assert value == (None if reward is None else pytest.approx(reward))


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("<think>so</think>27", 1.0),
        ("\n<think>\nso\n</think>\n\n27\n", 1.0),
        ([{"role": "assistant", "content": "<think>so</think>27"}], 1.0),
        ("<think>so</think>", 0.0),
        ("<think> </think>27", 0.0),
        ("<think>so 27", 0.0),
        ("so</think>27", 0.0),
        ("well <think>so</think>27", 0.0),
        ("<think>a<think>b</think>c", 0.0),
        ("<think>a</think>b</think>c", 0.0),
        ("<think>a</think><think>b</think>c", 0.0),
        ("27", 0.0),
        ("", 0.0),
    ],
)
def test_think_format_reward(completion, reward):
    assert think_format_reward(completions=[completion]) == [reward]


def test_soft_overlong():
    lengths = [0, 80, 81, 90, 100, 101, 1000]
    rewards = soft_overlong(100, 20)(completions=["?"] * 7, completion_ids=[[5] * length for length in lengths])
    assert rewards == pytest.approx([0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0])


def score(functions, weights=None, rows=3, chat=False, columns=None, step=None, timeout=math.inf, **context):
    names = tuple(f"f{i}" for i in range(len(functions)))
    rewards = Rewards(names, tuple(functions), tuple(weights or [1.0] * len(functions)), timeout)
    prompts = [[{"role": "user", "content": f"prompt {i}"}] if chat else f"prompt {i}" for i in range(rows)]
    completions = [f"completion {i}" for i in range(rows)]
    ids = [list(range(i)) for i in range(rows)]
    return rewards(prompts, completions, ids, columns or {}, step, **context)


def test_weighted_sum_skips_what_does_not_apply():
    functions = [lambda **kw: [1.0, None, None], lambda **kw: [True, np.float32(3.0), None]]
    with pytest.warns(UserWarning, match="no reward function applies to some of the completions"):
        per_function, total = score(functions, weights=[2.0, 0.5])
    np.testing.assert_array_equal(per_function, [[1.0, 1.0], [np.nan, 3.0], [np.nan, np.nan]])
    np.testing.assert_array_equal(total, [2.5, 1.5, np.nan])
    assert per_function.dtype == total.dtype == np.float64


def test_numbers_of_any_kind():
    kinds = ([True, 1, 1.5], (Decimal(1), Fraction(1, 2), np.int8(3)), np.arange(3), jnp.arange(3.0), range(3))
    for kind in (*kinds, (float(i) for i in range(3))):
        assert score([lambda **kw: kind])[1].shape == (3,)  # noqa: B023


class Obstinate:
    """A number that none can be made of."""

    def __float__(self):
        raise OSError("not now")

    def __repr__(self):
        return "x" * 10_000


def interrupted_values():
    yield 1.0
    raise LookupError("no more")


@pytest.mark.parametrize("chat", [False, True])
def test_what_a_function_is_given(chat):
    seen = {}

    def function(**kwargs):
        seen.update(kwargs)
        return np.zeros(3)

    score([function], chat=chat, columns={"answer": ["a", "b", "c"]}, step=4)
    assert set(seen) == {"prompts", "completions", "completion_ids", "answer", "log_extra", "log_metric"}
    text = "completion 1"
    assert seen["completions"][1] == ([{"role": "assistant", "content": text}] if chat else text)
    assert seen["completion_ids"] == [[], [0], [0, 1]]
    assert seen["answer"] == ["a", "b", "c"]


def test_a_function_gets_only_what_it_names():
    def without(completions, step, unused=None):
        assert step == 4 and unused is None
        return [float(len(text)) for text in completions]

    def with_column(answer, *args, step=None, **kwargs):
        assert step == 4 and not args and "completions" in kwargs
        return answer

    per_function, _ = score([without, with_column], columns={"answer": [1, 2, 3]}, step=4)
    np.testing.assert_array_equal(per_function, [[12, 1], [12, 2], [12, 3]])


def test_a_column_called_step_comes_first():
    per_function, _ = score([lambda step: step], columns={"step": [7, 8, 9]}, step=4)
    assert per_function[:, 0].tolist() == [7, 8, 9]


def logging_reward(completions, trainer_state, log_extra, log_metric, **kwargs):
    """With TRL's whole signature."""
    lengths = [len(text) for text in completions]
    log_extra("characters", lengths)
    log_extra("who", [np.float32(0.5), "é", {1, 2}])
    log_metric("left", trainer_state.max_steps - trainer_state.global_step)
    return [float(trainer_state.epoch or 0.0)] * len(lengths)


def test_trl_s_whole_signature():
    log, where = RewardLog(3), TrainerState(global_step=4, max_steps=10, epoch=0.25)
    functions = [logging_reward, lambda completions, log_metric: log_metric("left", 8.0) or [0.0] * 3]
    per_function, _ = score(functions, step=5, trainer_state=where, log=log)
    assert per_function[:, 0].tolist() == [0.25] * 3
    assert log.extra == {"characters": [12, 12, 12], "who": [0.5, "é", "{1, 2}"]}
    assert log.metrics == {"left": (6 + 8) / 2}, "the mean of what was logged"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda log_extra, log_metric: log_extra("a", [1, 2]),
            r"log_extra\('a'\) was given 2 values for 3 completions",
        ),
        (lambda log_extra, log_metric: log_metric("a", math.nan), r"log_metric\('a'\) was given nan"),
    ],
)
def test_what_cannot_be_written_down(write, message):
    def function(completions, log_extra, log_metric):
        write(log_extra, log_metric)
        return [0.0] * 3

    with pytest.raises(RewardError, match=message):
        score([function])


def test_calls_that_look_for_the_row_write_nothing_down():
    def function(completions, log_extra, **kwargs):
        log_extra("rows", completions)
        raise ValueError

    log = RewardLog(3)
    with pytest.raises(RewardError, match="item 0 of 3"):
        score([function], log=log)
    assert log.extra == {"rows": ["completion 0", "completion 1", "completion 2"]}


def test_columns_are_checked_before_anything_is_decoded():
    rewards = Rewards(("f",), (lambda completions, answer, trainer_state, step=None: [0.0],), (1.0,))
    rewards.check_columns({"answer": "a"})
    with pytest.raises(RewardError, match="needs 'answer', which the task has no column for; there are 'prompts'"):
        rewards.check_columns({"solution": "a"})


def test_a_function_that_changes_its_arguments_changes_no_other():
    def spoil(completions, **kwargs):
        completions.clear()
        return [0.0] * 3

    _, total = score([spoil, lambda completions: [1.0] * len(completions)])
    assert total.tolist() == [1.0] * 3


async def slow_reward(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(text[-1]) for text in completions]


def test_async_function():
    assert score([slow_reward])[1].tolist() == [0.0, 1.0, 2.0]


def test_async_function_inside_a_running_loop():
    async def notebook_cell():
        return score([slow_reward])[1].tolist()

    assert asyncio.run(notebook_cell()) == [0.0, 1.0, 2.0]


def test_async_functions_run_at_the_same_time():
    """Each waits for the other: one after the other they would wait for ever."""
    here, there = asyncio.Event(), asyncio.Event()

    async def first(completions):
        here.set()
        await there.wait()
        return [1.0] * 3

    async def second(completions):
        there.set()
        await here.wait()
        return [2.0] * 3

    assert score([first, lambda completions: [4.0] * 3, second], timeout=5.0)[1].tolist() == [7.0] * 3


def test_an_async_function_that_fails_is_told_with_its_item():
    async def fails(completions):
        await asyncio.sleep(0)
        return [1 / (text[-1] != "2") for text in completions]

    with pytest.raises(RewardError, match="'f1' raised ZeroDivisionError.* on item 2 of 3, the prompt 'prompt 2'"):
        score([slow_reward, fails, slow_reward])

    async def exits(completions):
        sys.exit(3)

    with pytest.raises(RewardError, match="'f0' raised SystemExit: 3"):
        score([exits])


def test_what_is_not_awaited_is_closed(recwarn):
    with pytest.raises(RewardError, match="'f1'"):
        score([slow_reward, lambda completions: [][0]])
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


def hangs_on_the_second(completions):
    for text in completions:
        try:
            while text[-1] == "1":
                time.sleep(0.01)
        except Exception:  # as broad as users write it
            pass
    return [0.0] * len(completions)


async def waits_on_the_second(completions):
    await asyncio.sleep(60.0 * any(text[-1] == "1" for text in completions))
    return [0.0] * len(completions)


@pytest.mark.parametrize("function", [hangs_on_the_second, waits_on_the_second])
def test_a_function_that_takes_too_long(function):
    began = time.monotonic()
    message = (
        r"'f0' took more than the 0.2 s that it has \(reward.timeout\); alone .* on item 1 of 3, the prompt 'prompt 1'"
    )
    with pytest.raises(RewardError, match=message):
        score([function], timeout=0.2)
    assert time.monotonic() - began < 10


def test_no_item_alone_takes_too_long():
    def slow(completions):
        time.sleep(0.1 * len(completions))
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="took more than the 0.25 s .* on a batch of 3, though not on one item alone"):
        score([slow], timeout=0.25)
    assert score([slow], timeout=20.0)[1].tolist() == [0.0] * 3


def test_limits_may_be_nested():
    """The inner one ends its block; the outer one still rings, at its own time."""
    began = time.monotonic()
    with pytest.raises(OutOfTime), limited(0.3):
        with pytest.raises(OutOfTime), limited(0.05):
            time.sleep(10)
        assert time.monotonic() - began < 0.25
        time.sleep(10)
    assert 0.25 < time.monotonic() - began < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with limited(0.01):
        pass
    time.sleep(0.05)  # nothing rings any more


MATH = [
    ("So it is $\\boxed{\\frac{1}{2}}$.", "0.5", 1.0),
    ("The answer is 1/2", "\\frac{1}{2}", 1.0),
    ("$x = 3$", "3", 1.0),
    ("First 4, and then $\\boxed{3}$, of 12.", 3, 1.0),
    ("\\boxed{3}, or \\boxed{4}", 3, 0.0),
    ("\\boxed{4}", "3", 0.0),
    ("no answer", "3", 0.0),
    ("", "3", 0.0),
    ("$\\boxed{(x+1)^2}$", "x^2 + 2x + 1", 1.0),
    ("$\\boxed{\\{1, 2\\}}$", "\\{2, 1\\}", 1.0),
    ("\\boxed{3}", None, None),
    ([{"role": "assistant", "content": "\\boxed{3}"}], "3", 1.0),
]


def test_math_reward():
    completions, answers, expected = zip(*MATH, strict=True)
    rewards = load_rewards(["math"], None, Arithmetic())
    (function,) = rewards.functions
    assert function(completions=list(completions), answer=list(answers)) == list(expected)


def test_an_expression_that_takes_for_ever_is_wrong(monkeypatch):
    """Whoever compares: here a package that hangs on the second completion."""

    def verify(gold, answer, timeout_seconds):
        assert timeout_seconds is None
        while answer == ["hard"]:
            pass
        return gold == answer

    library = ModuleType("math_verify")
    monkeypatch.setattr(
        library, "parse", lambda text, parsing_timeout: [text.strip("$")] if text else [], raising=False
    )
    monkeypatch.setattr(library, "verify", verify, raising=False)
    monkeypatch.setitem(sys.modules, "math_verify", library)
    monkeypatch.setattr(math_module, "_SECONDS", 0.1)
    assert math_module.math_reward(completions=["a", "hard", "a"], answer=["a", "a", "b"]) == [1.0, 0.0, 0.0]


def test_math_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"the reward math needs a package .* pip install 'eqx_specgrpo\[math\]'"):
        load_rewards(["math"], None, Arithmetic())


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda completions: [1 / (text[-1] != "1") for text in completions],
         ["'f0'", "ZeroDivisionError", "item 1 of 3", "'prompt 1'", "test_rewards.py, line"]),
        (lambda completions: [1 / (len(completions) < 3)] * len(completions), ["ZeroDivisionError", "no item alone"]),
        (lambda **kw: [1.0, 2.0], ["'f0'", "2 rewards", "expected 3"]),
        (lambda **kw: [1.0] * 4, ["4 rewards", "expected 3"]),
        (lambda **kw: [1.0, math.nan, 2.0], ["nan", "item 1 of 3"]),
        (lambda **kw: [1.0, 2.0, -math.inf], ["-inf", "item 2 of 3"]),
        (lambda **kw: ["1.0", 2.0, 3.0], ["'1.0'", "item 0 of 3"]),
        (lambda **kw: [1.0, [2.0], 3.0], ["[2.0]", "item 1 of 3"]),
        (lambda **kw: [1.0, 10**400, 3.0], ["item 1 of 3"]),
        (lambda **kw: [Obstinate()] * 3, ["x...x", "x for item 0 of 3"]),
        (lambda **kw: [1j, 2.0, 3.0], ["1j", "item 0 of 3"]),
        (lambda **kw: np.zeros((3, 2)), ["item 0 of 3"]),
        (lambda **kw: np.zeros(()), ["ndarray", "a list of 3"]),
        (lambda **kw: interrupted_values(), ["'f0'", "LookupError: no more", "while its rewards were read"]),
        (lambda **kw: None, ["NoneType", "a list of 3"]),
        (lambda **kw: 1.0, ["float", "a list of 3"]),
        (lambda **kw: np.float32(1.0), ["float32", "a list of 3"]),
        (lambda **kw: "abc", ["str", "a list of 3"]),
        (lambda **kw: {0: 1.0, 1: 1.0, 2: 1.0}, ["dict", "a list of 3"]),
        (lambda completions: sys.exit(0), ["'f0'", "SystemExit: 0", "item 0 of 3", "test_rewards.py, line"]),
        (lambda answer, **kw: answer, ["'f0'", "'answer'", "no column", "'completions'"]),
        (lambda completions, /: [1.0] * 3, ["'completions'", "by position only"]),
    ],
)  # fmt: skip
def test_bad_functions(function, words):
    with pytest.raises(RewardError) as caught:
        score([function])
    for word in words:
        assert word in str(caught.value)


def test_long_prompts_are_shortened():
    rewards = Rewards(("bad",), (lambda completions: [][0],), (1.0,))
    for prompt in ["x" * 1000, [{"role": "system", "content": "?"}, {"role": "user", "content": "x" * 1000}]]:
        with pytest.raises(RewardError) as caught:
            rewards([prompt], ["a"], [[1]], {})
        assert "xxx..." in str(caught.value) and len(str(caught.value)) < 400


def test_interrupting_is_no_reward_error():
    def interrupted(**kwargs):
        raise KeyboardInterrupt

    def stopped(**kwargs):
        raise Stopped(signal.SIGTERM, at_once=True)

    with pytest.raises(KeyboardInterrupt) as info:
        score([interrupted])
    assert "in the reward 'f0'" in info.value.__notes__
    with pytest.raises(Stopped):
        score([stopped])


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_a_column_may_not_take_our_place(name):
    with pytest.raises(UserError, match=f"the task has a column '{name}'.*rename it"):
        score([lambda **kw: [0.0] * 3], columns={name: [1, 2, 3]})


def test_a_reward_may_be_called_anything():
    """In the record of a completion it is beside our own keys; a step that is a reward would spoil the next resume."""
    names = ("step", "reward", "length", "a/b.py:f", "größe 1")
    rollouts = make_rollouts([[1, 2]], [0, 0], [[3, 4], [5]])
    values = np.arange(10.0).reshape(2, 5)
    scored = ScoredRollouts(rollouts, values, values.sum(1), np.zeros(2))
    first, second = completion_records(7, [Example("a")], scored, ["b", "c"], names, {})
    assert (first["step"], first["reward"], second["length"]) == (7, 10.0, 1)
    assert [first[f"rewards/{name}"] for name in names[:3]] == [0.0, 1.0, 2.0]
    assert (second["a/b.py:f"], second["größe 1"]) == (8.0, 9.0)


def test_columns_must_fit_the_rows():
    with pytest.raises(ValueError, match="3 completions but 2 values of 'answer'"):
        score([lambda **kw: [0.0] * 3], columns={"answer": [1, 2]})


def test_built_in_rewards_by_name():
    rewards = load_rewards(["think_format", "arithmetic", "running_totals", "soft_overlong(4, 2)"], None, Arithmetic())
    assert rewards.names == ("think_format", "arithmetic", "running_totals", "soft_overlong")
    prompts = [[{"role": "user", "content": "?"}]] * 2
    columns = {"answer": ["6", "6"], "expression": ["1 + 2 + 3"] * 2}
    per_function, total = rewards(prompts, ["<think>1 + 2 = 3</think>6", "6 7"], [[1] * 3, [1] * 9], columns)
    np.testing.assert_array_equal(per_function, [[1, 1, 1, -0.5], [0, 0, 0, -1]])
    np.testing.assert_array_equal(total, [2.5, -1])


def test_the_tasks_own_reward_is_the_default(tmp_path):
    rewards = load_rewards([], [3.0], Arithmetic())
    assert (rewards.names, rewards.weights) == (("arithmetic",), (3.0,))
    assert rewards(["?"], ["2"], [[1]], {"answer": ["2"]})[1].tolist() == [3.0]
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}')
    with pytest.raises(UserError, match="the task has no reward of its own: give one as --reward"):
        load_rewards([], None, load_task(str(path), 0, {}))


@pytest.fixture
def reward_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper_of_rewards.py").write_text("VALUE = 2.0\n")
    (tmp_path / "my_rewards.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass

            from helper_of_rewards import VALUE

            @dataclass
            class Constant:
                value: "float"

                def __call__(self, completions):
                    return [self.value] * len(completions)

            def two(completions, **kwargs):
                return [VALUE] * len(completions)

            three = Constant(3.0)
            number = 4
            """
        )
    )
    (tmp_path / "random.py").write_text("def two(completions, **kwargs):\n    return [20.0] * len(completions)\n")
    (tmp_path / "broken_rewards.py").write_text("def two(:\n")
    package = tmp_path / "package_of_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("async def five(completions, **kwargs):\n    return [5.0] * len(completions)\n")
    return tmp_path


def test_rewards_from_files_and_modules(reward_files):
    specs = ["my_rewards.py:two", f"{reward_files}/my_rewards.py:three", "package_of_rewards.inner:five"]
    rewards = load_rewards(specs, [1.0, 10.0, 100.0], Arithmetic())
    assert rewards.names == ("two", "three", "five")
    assert rewards(["?"], ["!"], [[1]], {})[1].tolist() == [532.0]


def test_equal_function_names_keep_their_files(reward_files):
    rewards = load_rewards(["my_rewards.py:two", "random.py:two"], None, Arithmetic())
    assert rewards.names == ("my_rewards.py:two", "random.py:two")
    assert rewards(["?"], ["!"], [[1]], {})[0].tolist() == [[2.0, 20.0]]


def test_a_file_is_run_once_until_it_changes(tmp_path):
    """Else a draft that is saved and loaded in one process would come back as another class of the same name."""
    path = tmp_path / "mine.py"
    path.write_text("class Draft:\n    length = 2\n")
    first = import_callable(f"{path}:Draft", "draft", "class")
    assert import_callable(f"{path}:Draft", "draft", "class") is first
    path.write_text("import sys\n\nsys.exit(0)\n")
    for _ in range(2):  # nor is what was begun kept
        with pytest.raises(UserError, match="raised on import: SystemExit"):
            import_callable(f"{path}:Draft", "draft", "class")
    path.write_text("class Draft:\n    length = 3\n")
    assert import_callable(f"{path}:Draft", "draft", "class").length == 3 and first.length == 2


WITH_WORKERS = """
import multiprocessing

def one(text):
    import beside_rewards

    return beside_rewards.SCALE * len(text)

def worked(completions, **kwargs):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map_async(one, completions).get(100)
"""


def test_rewards_may_use_worker_processes(tmp_path, monkeypatch):
    """Spawned ones import by name what they call, and a Pool starts new ones for ever if they can't."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "my.own rewards.py").write_text(WITH_WORKERS)
    (tmp_path / "files" / "beside_rewards.py").write_text("SCALE = 2.0\n")
    (tmp_path / "rewards_that_work.py").write_text(WITH_WORKERS)
    for spec in ("files/my.own rewards.py:worked", "rewards_that_work:worked"):
        assert import_callable(spec, "reward", "function")(["a", "bcd"]) == [2.0, 6.0]


def test_a_worker_notices_that_the_file_has_changed(tmp_path, monkeypatch):
    """It would compute with other code than the program that started it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "changing.py"
    path.write_text("def one(text):\n    return 1.0\n")
    name = import_callable(f"{path}:one", "reward", "function").__module__
    code = f"import sys; sys.path = {sys.path!r}; import {name}; print({name}.__file__, {name}.one(''))"

    def worker():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert worker().stdout.split() == [str(path), "1.0"]
    path.write_text("def one(text):\n    return 2.0\n")
    assert "changing.py has changed since" in worker().stderr


def test_only_what_a_file_defines_is_suggested(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from fractions import Fraction\nfrom functools import partial\n\nclass Draft: ...\n\nother = partial(Draft)\n"
    )
    with pytest.raises(UserError, match="Draft.*other") as info:
        import_callable(f"{path}:xyz", "draft", "class")
    assert "Fraction" not in str(info.value)


def test_what_a_package_offers_is_suggested():
    with pytest.raises(UserError, match="Did you mean 'MedusaHeads'"):
        import_callable("eqx_specgrpo.drafts:MedusaHead", "draft", "class")


def test_a_debugger_takes_the_mark_of_how_a_script_was_started(monkeypatch):
    main = ModuleType("__main__")
    del main.__spec__
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert import_callable("fractions:Fraction", "reward", "function") is Fraction
    main.__file__ = "/script.py"
    assert import_spec_of(type("Mine", (), {"__module__": "__main__"})) == "/script.py:Mine"


@pytest.mark.parametrize(
    "specs, weights, words",
    [
        (["arithmetics"], None, ["Did you mean 'arithmetic'?"]),
        (["xyz"], None, ["The choices are:", "think_format", "file.py:function"]),
        (["soft_overlong"], None, ["soft_overlong(max length, cache)"]),
        (["soft_overlong(10, 20)"], None, ["at most all"]),
        (["my_rewards.py"], None, ["my_rewards.py:FUNCTION"]),
        (["nowhere.py:two"], None, ["nowhere.py", "doesn't exist"]),
        (["my_rewards.py:twoo"], None, ["no function 'twoo'", "Did you mean 'two'?"]),
        (["my_rewards.py:"], None, ["no function ''", "Constant"]),
        (["my_rewards.py:number"], None, ["int", "function"]),
        (["broken_rewards.py:two"], None, ["broken_rewards.py", "SyntaxError"]),
        (["no_such_package_of_rewards.inner:five"], None, ["no_such_package_of_rewards", "file.py:function"]),
        (["package_of_rewards.outer:five"], None, ["package_of_rewards.outer"]),
        (["some/path:five"], None, ["some/path", ".py"]),
        (["arithmetic", "arithmetic"], None, ["'arithmetic' is given 2 times"]),
        (["arithmetic"], [1.0, 2.0], ["1 rewards", "2 weights"]),
        (["arithmetic"], [math.nan], ["'arithmetic'", "nan"]),
    ],
)
def test_bad_reward_specs(reward_files, specs, weights, words):
    with pytest.raises(UserError) as caught:
        load_rewards(specs, weights, Arithmetic())
    for word in words:
        assert word in str(caught.value)


def test_example_reward():
    rewards = load_rewards([f"{EXAMPLE}:digits_reward"], None, Arithmetic())
    prompts = ["?", [{"role": "user", "content": "?"}], "?", "?"]
    per_function, total = rewards(prompts, ["ab 12", "12 34", "abc", " "], [[1]] * 4, {})
    np.testing.assert_array_equal(per_function[:, 0], [0.5, 1.0, 0.0, np.nan])
    np.testing.assert_array_equal(total, per_function[:, 0])
