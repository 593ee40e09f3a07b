"""The fingerprint of a draft, and what a run says when the draft is not the one that learned last."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, randomise, tiny_transformer
from made_rollouts import make_rollouts

from eqx_specgrpo.decoding import FixedLength, decode
from eqx_specgrpo.drafts import FallbackDraft, HydraHeads, MedusaHeads, NGramDraft, draft_digest, fresh_draft
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.train._draft_guard import FINGERPRINT, DraftGuard


def heads(seed):
    return randomise(MedusaHeads.fresh(16, 2), seed, 0.3)


def test_a_digest_tells_any_change_and_nothing_else():
    draft = heads(0)
    digest = draft_digest(draft)
    assert digest == draft_digest(jax.tree.map(jnp.array, draft)) and 0 <= digest < 2**52
    assert digest == int(float(digest)), "JSON's numbers hold it"
    for place in [(0, 0, 0), (1, 3, 5), (0, 15, 15)]:
        changed = eqx.tree_at(lambda d: d.weight, draft, draft.weight.at[place].multiply(1 + 1e-6))
        assert draft_digest(changed) != digest, "the last bits of one number"
    swapped = eqx.tree_at(lambda d: d.weight, draft, draft.weight[:, ::-1])
    assert draft_digest(swapped) != digest, "the same numbers in other places"
    negative = eqx.tree_at(lambda d: d.bias, draft, -draft.bias)
    assert draft_digest(negative) != digest


def test_digests_of_many_drafts_differ():
    draft = HydraHeads(16, 2, key=jr.key(0))
    found = {draft_digest(randomise(draft, seed, 0.1)) for seed in range(40)}
    assert len(found) == 40


def test_what_only_remembers_is_told_by_its_memory():
    draft = NGramDraft(2, memory_size=4, memory_length=8)
    assert draft_digest(draft) != draft_digest(draft.remember(make_rollouts([[1, 2]], [0], [[3, 4, 5]])))


def test_a_draft_that_learns_in_every_step_is_followed():
    guard = DraftGuard()
    for step in range(1, 5):
        guard.begin(heads(step - 1), step)
        metrics = guard.end(heads(step), step, 1, can_change=True)
        assert metrics == {FINGERPRINT: draft_digest(heads(step))}
    guard.begin(heads(4), 5)
    assert guard.end(heads(4), 5, 0, can_change=True)[FINGERPRINT] == draft_digest(heads(4)), "a step without a lesson"


def test_lessons_that_change_nothing_are_an_error():
    guard = DraftGuard()
    guard.begin(heads(0), 1)
    with pytest.raises(UserError, match="step 1: 2 lessons changed nothing of the draft"):
        guard.end(heads(0), 1, 2, can_change=True)
    guard.end(heads(0), 1, 1, can_change=False)  # a gradient of 0: nothing to learn from


def test_an_older_draft_after_its_lessons_is_an_error():
    guard = DraftGuard()
    for step in (1, 2, 3):
        guard.begin(heads(step - 1), step)
        guard.end(heads(step), step, 1, can_change=True)
    guard.begin(heads(3), 4)
    with pytest.raises(UserError, match="after its lessons the draft is that of step 1 again"):
        guard.end(heads(1), 4, 1, can_change=True)


def test_a_draft_that_changes_without_lessons_is_an_error():
    guard = DraftGuard()
    guard.begin(heads(0), 1)
    with pytest.raises(UserError, match="has changed, though it had no lesson"):
        guard.end(heads(1), 1, 0, can_change=True)
    guard.end(heads(0), 1, 1, can_change=False)
    with pytest.raises(UserError, match=r"step 2 would guess with another draft than step 1 left \(\d+ instead of"):
        guard.begin(heads(2), 2)


def test_after_a_resume_the_draft_is_compared_with_the_records():
    records = [{"step": step, FINGERPRINT: draft_digest(heads(step))} for step in (1, 2, 3)]
    DraftGuard(records).begin(heads(3), 4)
    with pytest.raises(UserError, match="step 4 would guess with .*, but that of step 2"):
        DraftGuard(records).begin(heads(2), 4)
    DraftGuard([{"step": 3}]).begin(heads(2), 4)  # of an earlier version, which wrote none


def test_states_of_rows_of_drafts_survive_smaller_batches():
    """What each row gets accepted does not depend on how the batch shrinks."""
    target = tiny_transformer(seed=3)
    eagle = randomise(fresh_draft("eagle", target, 2, options={}, tokenizer=None, key=jr.key(0)), 1, 0.3)
    lookup = NGramDraft(2, min_ngram=1, max_ngram=3, memory_size=4, memory_length=8)
    for draft in (eagle, FallbackDraft(lookup, heads(2))):
        with quick_compilation():
            found = [
                decode(
                    target,
                    [[1, 2, 3]],
                    draft=draft,
                    length=FixedLength(2),
                    key=jr.key(1),
                    max_new_tokens=32,
                    eos_ids=[2, 4, 9],
                    samples=4,
                    smallest_bucket=smallest,
                )
                for smallest in (2, 4)
            ]
        assert len(set(found[0].lengths.tolist())) > 1, "rows have to end at different times"
        np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
        for field in dataclasses.fields(found[0].statistics):
            np.testing.assert_array_equal(*(getattr(one.statistics, field.name) for one in found))
