"""Which rows start first under `grpo.max_rows`, and what a run knows of the lengths of its prompts' completions."""

import json
import math

import numpy as np

from eqx_specgrpo.decoding._order import StartOrder, expected_lengths
from eqx_specgrpo.tasks import Example
from eqx_specgrpo.train._prompt_lengths import PromptLengths

NAN = math.nan
NONE_ENDED = np.zeros(8, np.int32), np.zeros(8, bool)


def test_what_is_known_comes_first_then_siblings_then_the_others():
    lengths = np.array([3, 5, 70, 0, 9, 0, 0, 0])
    ended = np.array([True, True, True, False, False, False, False, False])
    found = expected_lengths(np.array([100.0, NAN, NAN, 20.0]), lengths, ended)
    # What has not ended yet says nothing: the fifth row has 9 tokens so far, and goes on.
    np.testing.assert_array_equal(found, [100, 70, (100 + 70 + 20) / 3, 20])
    np.testing.assert_array_equal(expected_lengths(np.full(4, NAN), *NONE_ENDED), np.zeros(4))


def test_rows_start_longest_first_and_follow_what_their_siblings_say():
    order = StartOrder([NAN, 40.0, NAN, 10.0], 4, 2)
    # Nothing is known of the first and the third: they count as 25.
    np.testing.assert_array_equal(order.take(5, *NONE_ENDED), [2, 3, 0, 1, 4])
    lengths, ended = np.zeros(8, np.int32), np.zeros(8, bool)
    lengths[4], ended[4] = 6, True
    np.testing.assert_array_equal(order.take(1, lengths, ended), [6])
    np.testing.assert_array_equal(order.take(2, lengths, ended), [7, 5])
    assert len(order) == 0


def test_without_expectations_rows_start_in_their_own_order():
    order = StartOrder(None, 2, 4)
    np.testing.assert_array_equal(order.take(3, *NONE_ENDED), [0, 1, 2])
    np.testing.assert_array_equal(order.take(5, np.arange(8), np.ones(8, bool)), [3, 4, 5, 6, 7])


def record(step: int, prompt, length: int) -> dict:
    return {"step": step, "prompt": prompt, "length": length}


def test_the_newest_completions_of_a_prompt_count(tmp_path):
    messages = [{"role": "user", "content": "half a character: \ud83d"}]
    records = [
        record(0, "one", 4), record(0, "one", 8), record(0, messages, 30), record(2, "one", 50), record(2, "one", 60)
    ]  # fmt: skip
    lengths = PromptLengths()
    lengths.add(records[:3])
    examples = [Example("one"), Example("two"), Example(messages)]  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(lengths.expected(examples), [6, NAN, 30])
    lengths.add(records[3:])
    np.testing.assert_array_equal(lengths.expected(examples), [55, NAN, 30])
    # A resumed run knows what its file says, and the same.
    path = tmp_path / "completions.jsonl"
    np.testing.assert_array_equal(PromptLengths.of_run(path).expected(examples), [NAN, NAN, NAN])
    path.write_bytes("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode("utf-8", "replace"))
    np.testing.assert_array_equal(PromptLengths.of_run(path).expected(examples), lengths.expected(examples))
