"""Tasks from files of several kinds, from folders that `datasets` has saved, and from what a script hands over."""

import csv
import json
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from eqx_specgrpo.errors import UserError
from eqx_specgrpo.tasks import Arithmetic, Example, MixtureTask, TableTask, given_task, load_task

ROWS = [{"question": f"{number} + 1 =", "result": str(number + 1), "level": str(number % 2)} for number in range(5)]
COLUMNS = {"question": "prompt", "result": "answer"}
MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1 ="}]


def write_rows(path, rows=ROWS) -> str:
    """The same rows in the format that the suffix says."""
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case ".csv":
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case "":
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


EVERY_KIND = ["p.jsonl", "p.json", "p.csv", "p.parquet", "folder"]


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", EVERY_KIND)
def test_every_kind_gives_the_same_items(tmp_path, name):
    place = write_rows(tmp_path / name)
    task = load_task(place, 1, {"columns": COLUMNS})
    assert isinstance(task, TableTask) and task.size == 5
    expected = [Example(row["question"], {"answer": row["result"], "level": row["level"]}) for row in ROWS]
    assert [task.example(number) for number in range(5)] == expected
    # Of the first three, with the prompt made of columns, as a user's message.
    options = {"prompt_template": "Level {level}: {question} {{level}}", "chat": True, "limit": 3}
    task = load_task(place, 1, options)
    assert task.size == 3 and sorted(task.at(position).columns["result"] for position in range(3)) == ["1", "2", "3"]
    assert task.example(1).prompt == [{"role": "user", "content": "Level 1: 1 + 1 = {level}"}]
    with pytest.raises(IndexError):
        task.example(3)
    with pytest.raises(IndexError):
        task.example(-1)
    assert task.fingerprint() == load_task(place, 2, options).fingerprint()


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_changed_row_changes_the_fingerprint(tmp_path, name):
    one = load_task(write_rows(tmp_path / name), 0, {"columns": COLUMNS})
    (tmp_path / "changed").mkdir()
    changed = [*ROWS[:4], ROWS[4] | {"level": "2"}]
    other = load_task(write_rows(tmp_path / "changed" / name, changed), 0, {"columns": COLUMNS})
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet", "folder"])
def test_messages(tmp_path, name):
    """What another row's messages have does not become part of these."""
    named = [{"role": "user", "content": "2 + 2 =", "name": "Ann"}]
    task = load_task(write_rows(tmp_path / name, [{"prompt": MESSAGES}, {"prompt": named}]), 0, {"chat": True})
    assert task.example(0).prompt == MESSAGES and task.example(1).prompt == named


def test_json_lines_under_the_name_that_datasets_gives_them(tmp_path):
    path = tmp_path / "p.json"
    datasets.Dataset.from_list(ROWS).to_json(str(path))
    assert load_task(str(path), 0, {"columns": COLUMNS}).example(4).columns["answer"] == "5"


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize(
    "options, words",
    [
        ({}, ["no `prompt`", "'question', 'result', 'level'", "task.columns = {question", "task.prompt_template"]),
        ({"columns": {"qestion": "prompt"}}, ["'qestion'", "'question', 'result'", "Did you mean 'question'?"]),
        ({"columns": {"question": "prompt", "result": "level"}}, ["two columns called 'level'"]),
        ({"columns": COLUMNS | {"level": "completions"}}, ["'completions'", "Rename"]),
        ({"prompt_template": "{questions}?"}, ["{questions}", "'question'", "doubled: {{questions}}"]),
        ({"columns": COLUMNS, "limit": 0}, ["limit"]),
        ({"columns": ["question"]}, ["columns", 'a table, such as {old = "new"}']),
        ({"colums": COLUMNS}, ["no option 'colums'", "Did you mean 'columns'?"]),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, name, options, words):
    with pytest.raises(UserError) as caught:
        load_task(write_rows(tmp_path / name), 0, options)
    for word in words:
        assert word in str(caught.value)


BAD_FILES = [
    ("p.json", b"", "p.json is empty"),
    ("p.json", b"[]", "p.json is empty"),
    ("p.json", b'[{"prompt": "a"}, 3]', "p.json, item 1: a number, but each must be an object"),
    ("p.json", b'"text"', "text, but it must be a list of objects"),
    ("p.json", b"[1,\n 2", "not JSON .* in line 2"),
    ("p.json", b'["\xff"]', "not UTF-8"),
    ("p.csv", b"", "p.csv is empty"),
    ("p.csv", b"prompt,answer\n", "p.csv is empty"),
    ("p.csv", b"prompt,answer\na\n", "p.csv, line 2: 1 values for 2 columns .prompt, answer."),
    ("p.csv", b'prompt\n"a" b\n', "p.csv, line 2: not comma-separated values"),
    ("p.csv", b"prompt,prompt\na,b\n", "names the column 'prompt' 2 times"),
    ("p.csv", b"prompt,\na,b\n", "has a column without a name"),
    ("p.csv", b"prompt\n\xff\n", "not UTF-8"),
    ("p.parquet", b"", "p.parquet is no parquet file"),
    ("p.parquet", b"version https://git-lfs.github.com/spec/v1\n", "p.parquet is no parquet file .* only a pointer"),
]


@pytest.mark.parametrize("name, content, pattern", BAD_FILES)
def test_files_that_cannot_be_read(tmp_path, name, content, pattern):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=pattern):
        load_task(str(tmp_path / name), 0, {})


@pytest.mark.parametrize("name", EVERY_KIND[:-1])
def test_files_that_are_not_there(tmp_path, name):
    with pytest.raises(UserError, match=r"can't be read: No such file"):
        load_task(str(tmp_path / name), 0, {})


def test_an_empty_column_in_a_template(tmp_path):
    place = write_rows(tmp_path / "p.parquet", [{"question": "a"}, {"question": None}])
    with pytest.raises(UserError, match="p.parquet, row 1: the column 'question'.* is empty there"):
        load_task(place, 0, {"prompt_template": "{question}"})


def test_splits_of_a_folder(tmp_path):
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    )
    splits.save_to_disk(str(tmp_path / "both"))
    place = str(tmp_path / "both")
    assert load_task(place, 0, {"columns": COLUMNS, "split": "test"}).size == 2
    with pytest.raises(UserError, match="has the splits train, test: say which with task.split"):
        load_task(place, 0, {"columns": COLUMNS})
    with pytest.raises(UserError, match="there is no 'tets'. Did you mean 'test'?"):
        load_task(place, 0, {"columns": COLUMNS, "split": "tets"})
    single = write_rows(tmp_path / "single")
    with pytest.raises(UserError, match="task.split = 'train', but the dataset .*single has no splits"):
        load_task(single, 0, {"columns": COLUMNS, "split": "train"})
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"empty (is empty: it needs|has no rows, or a split of it has none)"):
        load_task(str(tmp_path / "empty"), 0, {})
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="other holds no dataset: name one that Dataset.save_to_disk has written"):
        load_task(str(tmp_path / "other"), 0, {})
    with pytest.raises(UserError, match="nowhere is no folder"):
        load_task(f"{tmp_path / 'nowhere'}/", 0, {})


def test_a_dataset_by_its_name(monkeypatch):
    """The library downloads, with these arguments."""
    asked = {}

    def load_dataset(path, **options):
        asked.update(options, path=path)
        if path == "org/none":
            raise ConnectionError("no route to the hub\nmore")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"columns": COLUMNS, "split": "train[:5]", "subset": "main", "revision": "v2", "limit": 4}
    assert load_task("org/sums", 0, options).size == 4
    assert asked == {"path": "org/sums", "name": "main", "split": "train[:5]", "revision": "v2"}
    with pytest.raises(UserError, match="no folder 'org/none' here, and loading .* failed: no route to the hub. Check"):
        load_task("org/none", 0, {})


def test_libraries_that_are_not_installed(tmp_path, monkeypatch):
    place, folder = write_rows(tmp_path / "p.parquet"), write_rows(tmp_path / "folder")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'eqx_specgrpo\[data\]'"):
        load_task(place, 0, {})
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in (folder, "org/name"):
        with pytest.raises(UserError, match=r"pip install 'eqx_specgrpo\[datasets\]'"):
            load_task(name, 0, {})


def test_rows_of_a_script():
    """A list, a dataset, and whatever else gives rows by number."""
    as_numbers = [{"question": row["question"], "result": np.int64(5)} for row in ROWS]
    every = [ROWS, tuple(ROWS), datasets.Dataset.from_list(ROWS), as_numbers]
    for rows in every:
        task = given_task(rows, 3, {"columns": COLUMNS, "limit": 4}, "python:x")
        assert task.size == 4 and task.seed == 3 and task.example(3).prompt == "3 + 1 ="
    as_list, as_dataset = (given_task(rows, 0, {"columns": COLUMNS}, "x") for rows in (ROWS, every[2]))
    assert [as_list.example(n) for n in range(5)] == [as_dataset.example(n) for n in range(5)]
    changed = given_task([*ROWS[:4], ROWS[4] | {"level": 3}], 0, {"columns": COLUMNS}, "x")
    assert as_list.fingerprint() != changed.fingerprint()
    assert given_task([{"prompt": "a", "table": {1: 2, "b": 3}}], 0, {}, "x").fingerprint()
    arithmetic = Arithmetic(seed=4)
    assert given_task(arithmetic, 0, {}, "x") is arithmetic


class Broken:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise KeyError(index)


@pytest.mark.parametrize(
    "rows, options, pattern",
    [
        ([], {}, "task has no rows"),
        ([{"question": "a"}], {}, "row 0 of task: no `prompt`, only 'question'"),
        ([{"prompt": "a"}, "b"], {}, "row 1 of task: text, but each must be an object"),
        ({"train": ROWS}, {}, r"a dict with 'train': of several splits hand over one, as in task=dataset\['train'\]"),
        (iter(ROWS), {}, r"of type list_iterator: hand over .* task=list\(stream.take"),
        (3, {}, "of type int"),
        (Broken(), {}, r"row 0 of python:x could not be read: KeyError: 0. .* frame.to_dict\('records'\)"),
        (datasets.Dataset.from_list([]), {}, "python:x is empty"),
        (Arithmetic(), {"limit": 3}, "task.limit is an option, but python:x is a task already"),
        (ROWS, {"split": "train"}, "no option 'split'"),
    ],
)
def test_what_is_no_task(rows, options, pattern):
    with pytest.raises(UserError, match=pattern):
        given_task(rows, 0, options, "python:x")


def mixture(seed: int, *entries) -> MixtureTask:
    task = load_task("mixture", seed, {"tasks": list(entries)})
    assert isinstance(task, MixtureTask)
    return task


def test_several_tasks_with_weights(tmp_path):
    place = write_rows(tmp_path / "p.parquet")
    file = {"name": place, "weight": 3, "columns": COLUMNS}
    task = mixture(1, file, {"name": "arithmetic", "high": 12})
    found = [task.at(position) for position in range(2000)]
    of_file = [example for example in found if example.columns["task"] == place]
    assert len(of_file) == 1500
    assert {example.columns["answer"] for example in of_file[:5]} == {"1", "2", "3", "4", "5"}  # all before any again
    own = load_task(place, 1, {"columns": COLUMNS})
    for positions in (range(40), range(745, 785)):  # also across the end of a stretch
        assert [of_file[position].prompt for position in positions] == [
            own.at(position).prompt for position in positions
        ]
    other = next(example for example in found if example.columns["task"] == "arithmetic")
    assert other.columns.keys() == of_file[0].columns.keys() == {"answer", "level", "expression", "task"}
    assert other.columns["level"] is None and of_file[0].columns["expression"] is None
    # A function of the seed and the position: another start sees the same, another seed another order.
    again = mixture(1, file, {"name": "arithmetic", "high": 12})
    assert [again.at(position) for position in (7, 1003)] == [found[7], found[1003]]
    turns = [example.columns["task"] for example in found[:50]]
    assert turns != [mixture(2, file, {"name": "arithmetic"}).at(n).columns["task"] for n in range(50)]
    assert task.fingerprint() != mixture(1, file | {"limit": 4}, {"name": "arithmetic", "high": 13}).fingerprint()


def test_rewards_of_a_mixture_apply_to_their_own_items():
    task = mixture(0, {"name": "arithmetic"}, {"name": "arithmetic", "operations": "-"})
    assert task.names == ("arithmetic #0", "arithmetic #1")
    (reward,) = task.default_rewards().values()
    assert set(task.default_rewards()) == {"arithmetic"}
    rewards = reward(completions=["3", "3", "4"], task=["arithmetic #0", "another", "arithmetic #1"], answer=["3"] * 3)
    assert rewards == [1.0, None, 0.0]


@pytest.mark.parametrize(
    "entries, pattern",
    [
        ([], "task.tasks is empty"),
        ([{"weight": 1}], r"task.tasks\[0\] is .*: give it a name"),
        ([{"name": "mixture", "tasks": []}], "give it a name, that of a task"),
        ([{"name": "arithmetic", "weight": 0}], r"task.tasks\[0\] has a weight of 0"),
        ([{"name": "arithmetic", "weight": "2"}], "has a weight of '2'"),
        ([{"name": "arithmetic"}, {"name": "arithmetics"}], r"task.tasks\[1\]: there is no task 'arithmetics'"),
        ([{"name": "arithmetic", "hihg": 3}], r"task.tasks\[0\]: the task 'arithmetic' has no option 'hihg'"),
    ],
)
def test_bad_mixtures(entries, pattern):
    with pytest.raises(UserError, match=pattern):
        load_task("mixture", 0, {"tasks": entries})
    with pytest.raises(UserError, match="needs its option 'tasks'"):
        load_task("mixture", 0, {})
