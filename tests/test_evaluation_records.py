"""What a run's folder keeps of evaluations, whatever ended the run."""

import json

import pytest

from eqx_specgrpo.errors import UserError
from eqx_specgrpo.records import EvaluationRecords, read_records


def test_what_comes_after_is_dropped_and_what_was_cut_off(tmp_path):
    records = EvaluationRecords(tmp_path)
    assert records.read() == [] and records.best() is None
    records.rewind(3)  # of nothing
    for step in (0, 4, 8):
        records.append({"step": step, "eval/reward": step / 8}, [{"completion": f"{step} \udc80", "step": "a column"}])
    # A kill between the two files, and one inside a line.
    (tmp_path / "eval.jsonl").open("a").write('{"step": 12, "ev')
    (tmp_path / "eval_completions.jsonl").open("a").write('{"step": 12, "completion": "a"}\n{"step"')
    records.rewind(100)
    assert [record["step"] for record in records.read()] == [0, 4, 8]
    assert [record["step"] for record in read_records(tmp_path / "eval_completions.jsonl")] == [0, 4, 8]
    before = (tmp_path / "eval.jsonl").read_bytes()
    records.rewind(4)
    assert [record["step"] for record in records.read()] == [0, 4]
    assert [record["step"] for record in read_records(tmp_path / "eval_completions.jsonl")] == [0, 4]
    assert before.startswith((tmp_path / "eval.jsonl").read_bytes())


def test_the_best(tmp_path):
    records = EvaluationRecords(tmp_path)
    records.write_best(8, "eval/pass@1", 0.25)
    assert records.best() == {"step": 8, "metric": "eval/pass@1", "value": 0.25}
    (tmp_path / "best.json").write_text("{")
    assert records.best() is None


def test_a_line_without_a_step_is_told(tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps({"reward": 1}) + "\n")
    with pytest.raises(UserError, match="line 1 of .*eval.jsonl has no step: remove it"):
        EvaluationRecords(tmp_path).rewind(0)
