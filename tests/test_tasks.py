import json
import sys
import types
from dataclasses import dataclass

import pytest

from eqx_specgrpo.errors import UserError
from eqx_specgrpo.tasks import (
    Arithmetic,
    Example,
    ReasoningGymTask,
    RewardError,
    TableTask,
    collate,
    example_index,
    load_rewards,
    load_task,
    running_totals,
)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_epoch_is_a_permutation(size, seed):
    for epoch in range(3):
        epoch_indices = [example_index(epoch * size + offset, size, seed) for offset in range(size)]
        assert sorted(epoch_indices) == list(range(size))


def test_epochs_and_seeds_shuffle_differently():
    def order(epoch, seed):
        return [example_index(epoch * 100 + offset, 100, seed) for offset in range(100)]

    orders = [order(0, 0), order(1, 0), order(0, 1), list(range(100))]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    # Resuming relies on the order staying as it is from version to version.
    assert [example_index(position, 5, 0) for position in range(10)] == [1, 2, 4, 3, 0, 0, 2, 1, 4, 3]


def test_shuffle_spreads_each_item_over_the_positions():
    counts = [0] * 10
    for epoch in range(2000):
        counts[example_index(epoch * 10, 10, 3)] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts) < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_unbounded_order_and_bad_positions():
    assert [example_index(position, None, 5) for position in range(4)] == [0, 1, 2, 3]
    for position, size in [(-1, None), (-1, 5), (0, 0)]:
        with pytest.raises(ValueError):
            example_index(position, size, 0)


def test_arithmetic_item_depends_on_seed_and_index_alone():
    options = dict(terms=(2, 4), operations="+-*")
    forwards = [Arithmetic(3, **options).example(i) for i in range(20)]
    backwards = [Arithmetic(3, **options, size=20).example(i) for i in reversed(range(20))][::-1]
    assert forwards == backwards
    assert forwards != [Arithmetic(4, **options).example(i) for i in range(20)]
    assert Arithmetic(0).example(0).columns == {"answer": "71", "expression": "24 + 47"}


def test_arithmetic_answers_and_ranges():
    task = Arithmetic(1, terms=[2, 5], low=0, high=12, operations="+-*")
    lengths, operands, operations = set(), set(), set()
    for i in range(400):
        columns = task.example(i).columns
        assert int(columns["answer"]) == eval(columns["expression"])
        parts = columns["expression"].split()
        lengths.add(len(parts) // 2 + 1)
        operands.update(int(part) for part in parts[::2])
        operations.update(parts[1::2])
    assert lengths == {2, 3, 4, 5}
    assert operands == set(range(13))
    assert operations == set("+-*")


def test_arithmetic_prompt():
    task = Arithmetic(prompt="Work out {expression} in {braces}.")
    example = task.example(2)
    expected = f"Work out {example.columns['expression']} in {{braces}}."
    assert example.prompt == [{"role": "user", "content": expected}]
    assert Arithmetic(prompt=task.prompt, chat=False).example(2).prompt == expected


@pytest.mark.parametrize(
    "expression, totals",
    [
        ("2 + 3 * 4 - 5", [12, 14, 9]),
        ("7", [7]),
        ("1+2+3", [3, 6]),
        ("3 - 10 + 2", [-7, -5]),
        ("2 * 3 * 4", [6, 24]),
        ("10 - 2 * 3 * 4 - 1", [6, 24, -14, -15]),
    ],
)
def test_running_totals(expression, totals):
    assert running_totals(expression) == totals


@pytest.mark.parametrize("expression", ["", "2 +", "2 / 3", "2 ** 3", "x + 1", "2 3", "-2 + 3"])
def test_running_totals_refuses_other_expressions(expression):
    with pytest.raises(ValueError, match="whole numbers"):
        running_totals(expression)


def test_size_bounds_the_items():
    task = Arithmetic(size=3)
    assert {task.at(position).columns["expression"] for position in range(6)} == {
        task.example(i).columns["expression"] for i in range(3)
    }
    for index in (-1, 3):
        with pytest.raises(IndexError, match="items 0 to 2"):
            task.example(index)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(terms=1), ["terms", "at least 2"]),
        (dict(terms=[3, 2]), ["terms", "[3, 2]"]),
        (dict(terms=[2, 3, 4]), ["terms", "two ends"]),
        (dict(terms="2"), ["terms", "'2'"]),
        (dict(terms=True), ["terms", "True"]),
        (dict(low=5, high=4), ["low", "high"]),
        (dict(low=-1), ["low", "0 <= low"]),
        (dict(low=1.5), ["low", "1.5", "a whole number"]),
        (dict(operations="+/"), ["operations", "'+/'"]),
        (dict(operations=""), ["operations"]),
        (dict(size=0), ["size", "at least 1"]),
        (dict(prompt="What is it?"), ["prompt", "{expression}"]),
        (dict(hihg=50), ["'hihg'", "Did you mean 'high'?"]),
        (dict(nonsense=50), ["'nonsense'", "The choices are: chat, high"]),
        (dict(seed=1), ["'seed'", "beside the options"]),
    ],
)
def test_bad_arithmetic_options(options, words):
    with pytest.raises(UserError) as caught:
        load_task("arithmetic", 0, options)
    for word in words:
        assert word in str(caught.value)


def test_good_arithmetic_options():
    task = load_task("arithmetic", 5, {"terms": [2, 3], "operations": "+-", "size": 10})
    assert isinstance(task, Arithmetic)
    assert (task.seed, task.terms, task.size) == (5, (2, 3), 10)
    assert load_task("arithmetic", 5, {"terms": 3}).terms == (3, 3)


@pytest.mark.parametrize(
    "name, words",
    [
        ("arithmetics", ["Did you mean 'arithmetic'?"]),
        ("sudoku", ["The choices are: arithmetic", ".jsonl", "reasoning_gym:NAME"]),
        ("data.txt", [".jsonl", ".parquet", "org/name"]),
        ("reasoning_gym", ["reasoning_gym:"]),
        ("", ["arithmetic"]),
    ],
)
def test_unknown_task(name, words):
    with pytest.raises(UserError) as caught:
        load_task(name, 0, {})
    for word in words:
        assert word in str(caught.value)


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return str(path)


def test_jsonl_columns_and_prompts(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 2?"}]
    path = write(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps({"prompt": "What is 1 + 1?", "answer": "2"}).encode(),
        "",
        json.dumps({"prompt": messages, "answer": 3, "hint": ["é"]}) + "\r",
        json.dumps({"hint": None, "prompt": "?"}, ensure_ascii=False),
        "",
    )
    task = load_task(path, 1, {})
    assert isinstance(task, TableTask)
    assert task.size == 3
    assert [task.example(i) for i in range(3)] == [
        Example("What is 1 + 1?", {"answer": "2", "hint": None}),
        Example(messages, {"answer": 3, "hint": ["é"]}),
        Example("?", {"answer": None, "hint": None}),
    ]
    with pytest.raises(IndexError):
        task.example(3)


GOOD = '{"prompt": "hello"}'


@pytest.mark.parametrize(
    "lines, words",
    [
        ([GOOD, "{'prompt': 1}"], ["line 2", "not JSON", "column 2"]),
        ([GOOD, "", '{"prompt": "cut'], ["line 3", "not JSON"]),
        ([GOOD, '["prompt"]'], ["line 2", "a list", "object"]),
        (["3"], ["line 1", "a number"]),
        (["null"], ["line 1", "null"]),
        ([GOOD, '{"question": "a", "answer": "b"}'], ["line 2", "no `prompt`", "'question', 'answer'"]),
        (["{}"], ["line 1", "no `prompt`"]),
        (['{"prompt": ""}'], ["line 1", "empty"]),
        (['{"prompt": []}'], ["line 1", "empty"]),
        (['{"prompt": 3}'], ["line 1", "a number", "text or a list"]),
        (['{"prompt": {"role": "user"}}'], ["line 1", "an object", "text or a list"]),
        (['{"prompt": null}'], ["line 1", "null"]),
        (['{"prompt": ["hi"]}'], ["line 1", "message 0", "is text"]),
        (['{"prompt": [{"role": "user", "content": "a"}, {"role": "user"}]}'], ["line 1", "message 1", "'content'"]),
        (['{"prompt": [{"content": "a"}]}'], ["message 0", "'role'"]),
        (['{"prompt": [{"role": "user", "content": [1]}]}'], ["'content' of message 0", "a list"]),
        (['{"prompt": "a", "completions": 1}'], ["line 1", "'completions'", "Rename"]),
        ([GOOD, b'{"prompt": "\xff"}'], ["line 2", "UTF-8"]),
        ([GOOD, '{"prompt": "cut \\ud83d"}'], ["line 2", "`prompt`", "\\ud83d", "character 5"]),
        (['{"prompt": [{"role": "user", "content": "\\ude00"}]}'], ["line 1", "'content' of message 0", "character 1"]),
        ([""], ["empty", "data.jsonl"]),
        (["", "  ", ""], ["empty", "data.jsonl"]),
    ],
)
def test_bad_jsonl(tmp_path, lines, words):
    with pytest.raises(UserError) as caught:
        load_task(write(tmp_path, *lines), 0, {})
    for word in words:
        assert word in str(caught.value)


def test_jsonl_missing_file_and_options(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl can't be read: No such file"):
        load_task(str(tmp_path / "nowhere.jsonl"), 0, {})
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="directory"):
        load_task(str(tmp_path / "folder.jsonl"), 0, {})
    with pytest.raises(UserError, match="no option 'split'"):
        load_task(write(tmp_path, GOOD), 0, {"split": "train"})


def test_collate():
    messages = [{"role": "user", "content": "b"}]
    prompts, columns = collate([Example("a", {"x": 1}), Example(messages, {"x": 2, "y": 3})])
    assert prompts == ["a", messages]
    assert columns == {"x": [1, 2], "y": [None, 3]}


def test_reasoning_gym_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'eqx_specgrpo\[reasoning-gym\]'"):
        load_task("reasoning_gym:chain_sum", 0, {})


@dataclass
class FakeConfig:
    low: int = 0
    seed: int | None = None
    size: int = 500


class FakeDataset:
    def __init__(self, config):
        self.config = config

    def __getitem__(self, index):
        value = self.config.seed + index + self.config.low
        return {"question": f"What is {value}?", "answer": str(value), "metadata": {}}

    def score_answer(self, answer, entry):
        return 1.0 if int(answer) == int(entry["answer"]) else 0.25  # raises on what is no number


@pytest.fixture
def fake_gym(monkeypatch):
    package, factory = types.ModuleType("reasoning_gym"), types.ModuleType("reasoning_gym.factory")
    datasets = {"chain_sum": (FakeDataset, FakeConfig), "chess": (FakeDataset, FakeConfig)}

    def create_dataset(name, **options):
        dataset_class, config_class = datasets[name]
        config = config_class(**options)
        assert config.low >= 0, "low must be positive"
        return dataset_class(config)

    vars(factory)["DATASETS"] = datasets
    vars(package)["create_dataset"] = create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def test_reasoning_gym_task(fake_gym):
    task = load_task("reasoning_gym:chain_sum", 4, {"low": 10, "size": 3})
    assert isinstance(task, ReasoningGymTask)
    assert task.size == 3
    example = task.example(2)
    assert example.prompt[0]["content"].startswith("What is 16?\n\nThink step by step")
    assert example.columns["answer"] == "16"
    with pytest.raises(IndexError):
        task.example(3)

    completions = [
        "<answer>1</answer> no, <answer> 16\n</answer>",
        "<answer>16</answer> no, <answer>17</answer>",
        "16",
        "<answer>16",
        "<answer>sixteen</answer>",
    ]
    prompts, columns = collate([example] * len(completions))
    rewards = load_rewards([], None, task)
    assert rewards.names == ("reasoning_gym",)
    _, total = rewards(prompts, completions, [[]] * len(completions), columns)
    assert total.tolist() == [1.0, 0.25, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("chain_sums", {}, ["'chain_sums'", "Did you mean 'chain_sum'?"]),
        ("zzz", {}, ["The choices are: chain_sum, chess"]),
        ("chain_sum", {"lwo": 3}, ["'lwo'", "Did you mean 'low'?"]),
        ("chain_sum", {"sise": 3}, ["'sise'", "Did you mean 'size'?"]),
        ("chain_sum", {"low": -1}, ["chain_sum", "low must be positive"]),
        ("chain_sum", {"size": "many"}, ["size", "'many'"]),
        ("chain_sum", {"size": 0}, ["size", "at least 1"]),
    ],
)
def test_bad_reasoning_gym(fake_gym, name, options, words):
    with pytest.raises(UserError) as caught:
        load_task(f"reasoning_gym:{name}", 0, options)
    for word in words:
        assert word in str(caught.value)


def test_reward_errors_are_user_errors():
    assert issubclass(RewardError, UserError)
    assert UserError.exit_code == 2
