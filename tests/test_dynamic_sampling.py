"""Which groups a step is made of, and how they are put together; what it does without teaches the draft."""

from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from tiny_run import tiny_config, tiny_folder as tiny_folder, tiny_model, tiny_tokenizer

from eqx_specgrpo._types import DecodeStatistics, Prompts, Rollouts, Support
from eqx_specgrpo.config import make_draft, make_parts
from eqx_specgrpo.drafts import AbstractDraft
from eqx_specgrpo.train import RunState, _sample as sample_module
from eqx_specgrpo.train._groups import join_groups, rows_of_groups
from eqx_specgrpo.train._sample import choose_groups, learn_left_out


def flags(*batches: str) -> list[np.ndarray]:
    """`x` teaches, `.` does not."""
    return [np.array([letter == "x" for letter in batch]) for batch in batches]


@pytest.mark.parametrize(
    "teaches, chosen, used",
    [
        (["xxx"], [(0, 0), (0, 1), (0, 2)], 3),
        (["x.x", "xxx"], [(0, 0), (0, 2), (1, 0)], 4),  # two of the second batch come again in the next step
        (["...", "x.x", ".x."], [(1, 0), (1, 2), (2, 1)], 8),
        (["..x", ".x."], [(0, 0), (0, 2), (1, 1)], 6),  # the limit: filled up with the first of the others
        (["..."], [(0, 0), (0, 1), (0, 2)], 3),
    ],
)
def test_which_groups_a_step_has(teaches, chosen, used):
    assert choose_groups(flags(*teaches), 3) == (chosen, used)


def test_every_item_is_done_with_once():
    """Whatever teaches: steps take the stream's groups in order, none twice, and none is passed over that teaches."""
    generator = np.random.default_rng(0)
    stream = generator.random(400) < 0.4
    position, seen = 0, []
    while position + 12 <= len(stream):
        batches = [stream[position : position + 4]]
        while len(batches) < 3 and sum(batch.sum() for batch in batches) < 4:
            start = position + 4 * len(batches)
            batches.append(stream[start : start + 4])
        chosen, used = choose_groups(batches, 4)
        assert len(chosen) == 4
        seen += sorted(position + 4 * batch + group for batch, group in chosen if batches[batch][group])
        position += used
    assert seen == np.flatnonzero(stream[:position]).tolist()


def made(prompts: list[list[int]], samples: int, offset: int = 0) -> Rollouts:
    """Rollouts whose every number tells its row."""
    rows = len(prompts) * samples
    numbers = np.arange(rows, dtype=np.int32) + offset
    return Rollouts(
        prompts=Prompts.from_lists(prompts, multiple_of=4),
        group=np.repeat(np.arange(len(prompts), dtype=np.int32), samples),
        tokens=np.repeat(numbers[:, None] + 1, 16, axis=1),
        lengths=np.full(rows, 16, np.int32) - numbers % 3,
        logprobs=np.repeat(-numbers[:, None].astype(np.float32), 16, axis=1),
        stop_reasons=numbers % 2 + 1,
        statistics=DecodeStatistics(numbers, np.stack([numbers, numbers], 1), np.stack([numbers, numbers], 1), numbers),
        support=Support(np.repeat(numbers[:, None, None], 16, axis=1), np.repeat(numbers[:, None], 16, axis=1)),
    )


def test_groups_of_several_batches_are_joined():
    first, second = made([[1], [2, 2], [3]], 2), made([[4] * 6, [5]], 2, offset=10)
    joined = join_groups([(first, [2]), (second, []), (second, [1, 0])])
    assert joined.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert joined.prompts.lengths.tolist() == [1, 1, 6] and joined.prompts.tokens.shape == (3, 8)
    assert joined.prompts.tokens[:, 0].tolist() == [3, 5, 4]
    rows = [4, 5, 12, 13, 10, 11]
    assert joined.tokens[:, 0].tolist() == [row + 1 for row in rows]
    assert joined.logprobs[:, 3].tolist() == [-row for row in rows]
    assert joined.lengths.tolist() == [16 - row % 3 for row in rows]
    assert joined.stop_reasons.tolist() == [row % 2 + 1 for row in rows]
    assert joined.support is not None and joined.support.counts[:, 5].tolist() == rows
    assert joined.support.ids[:, 0, 0].tolist() == rows
    found = joined.statistics
    for counts in (found.target_forwards, found.emitted, found.drafted[:, 1], found.accepted[:, 0]):
        assert counts.tolist() == rows
    assert rows_of_groups(first.group, [2, 0]).tolist() == [4, 5, 0, 1]


def arrays(draft: AbstractDraft) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(draft, eqx.is_inexact_array))]


def test_what_a_step_does_without_teaches_the_draft(tiny_folder: Path, tmp_path, monkeypatch):
    """Rows of the groups that were left out, and of no others; always as many."""
    config = tiny_config(tiny_folder, tmp_path / "run")
    policy = tiny_model()
    draft = make_draft(config.draft, policy, 0, tiny_tokenizer())
    parts = make_parts(config, tiny_tokenizer(), draft)
    state = RunState.fresh(policy, draft, parts.policy_optimizer, parts.draft_optimizer)
    first, second = made([[1, 2], [3]], 4), made([[1, 2], [3]], 4, offset=100)
    lessons, features_of = [], sample_module.features_of

    def watched(target, lesson, layers, mesh):
        lessons.append(lesson)
        return features_of(target, lesson, layers, mesh)

    monkeypatch.setattr(sample_module, "features_of", watched)
    unchanged, number = learn_left_out(parts, state, policy, [(first, []), (second, [])], 0)
    assert unchanged is state and number == 0 and not lessons
    before = arrays(state.draft)
    taught, number = learn_left_out(parts, state, policy, [(first, [1]), (second, [0, 1])], 0)
    assert number == 2
    assert any(not np.array_equal(*pair) for pair in zip(before, arrays(taught.draft), strict=True))
    numbers = [sorted(int(token) - 1 for token in lesson.completion_tokens[:, 0]) for lesson in lessons]
    assert numbers[0] == [4, 5, 6, 7] and len(numbers[1]) == 4 and set(numbers[1]) <= set(range(100, 108))
    assert taught.policy is policy
