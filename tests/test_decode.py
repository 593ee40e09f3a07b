"""Losslessness, second tier: greedy decoding says the same tokens whatever the draft; and the decoder's bookkeeping.

Everything runs on one batch of unequal prompts against one context length that cuts some of the rows short, always with
two end-of-sequence ids, so that the tests share their compiled programs.
"""

import itertools as it
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    OracleDraft,
    oracle_draft,
    quick_compilation,
    randomise,
    tiny_transformer,
    wrong_draft,
)

from eqx_specgrpo._types import Prompts, Rollouts, StopReason
from eqx_specgrpo.decoding import (
    AbstractLengthController,
    DecodeProgress,
    FixedLength,
    FixedRounds,
    GreedyMatch,
    GreedySampling,
    Sampling,
    SegmentObservation,
    SegmentPlan,
    UntilRowsFinish,
    _decode as decode_module,
    decode,
    teacher_forced_logprobs,
)
from eqx_specgrpo.decoding._state import fits
from eqx_specgrpo.drafts import DraftError, MedusaHeads
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.models import cast_weights
from eqx_specgrpo.runtime._compile import count_compilations

VOCAB, CONTEXT, NEW = 13, 24, 17
NO_EOS = [98, 99]  # outside the vocabulary
GREEDY = GreedySampling()
PROMPT_LENGTHS = [1, 3, 15, 7, 12, 8]
# Rows stop where the context ends: the third after 9 tokens, although 17 were asked for.
LIMITS = np.minimum(NEW, CONTEXT - np.array(PROMPT_LENGTHS))


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def target():
    return tiny_transformer(num_layers=1, vocab_size=VOCAB, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def heads():
    return randomise(MedusaHeads.fresh(16, 4), 1, 0.1)


def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length).tolist() for length in PROMPT_LENGTHS]


def _decode(target, prompts=None, **options: Any) -> Rollouts:
    # All-default: no shrinking, since every bucket is another compilation.
    defaults = dict(key=jr.key(2), max_new_tokens=NEW, eos_ids=NO_EOS, smallest_bucket=8)
    prompts = Prompts.from_lists(_prompts() if prompts is None else prompts)
    rollouts = decode(target, prompts, **(defaults | options))
    _check_consistent(rollouts, (defaults | options)["eos_ids"], target.max_length)
    return rollouts


def _check_consistent(rollouts: Rollouts, eos_ids, max_length) -> None:
    """What must be true of any rollouts; every test's go through it."""
    lengths, statistics = rollouts.lengths, rollouts.statistics
    limits = np.minimum(rollouts.tokens.shape[1], max_length - rollouts.prompts.lengths[rollouts.group])
    for row, length in enumerate(lengths):
        ends = np.isin(rollouts.tokens[row, :length], eos_ids)
        assert not ends[:-1].any()
        if rollouts.stop_reasons[row] == StopReason.EOS:
            assert ends[-1]
        else:
            assert rollouts.stop_reasons[row] == StopReason.LENGTH
            assert not ends[-1] and length == limits[row]
    beyond = np.arange(rollouts.tokens.shape[1])[None] >= lengths[:, None]
    assert (rollouts.tokens[beyond] == 0).all() and (rollouts.logprobs[beyond] == 0).all()
    assert (rollouts.logprobs[~beyond] <= 0).all()

    forwards, accepted = statistics.target_forwards, statistics.accepted
    np.testing.assert_array_equal(statistics.emitted + 1, lengths)
    # Each pass emits what was accepted and one token more, except where the row's end cuts its last block short.
    assert (statistics.emitted <= accepted.sum(1) + forwards).all()
    assert (statistics.emitted >= accepted.sum(1) + forwards - 1).all()
    assert (statistics.drafted <= forwards[:, None]).all() and (accepted <= statistics.drafted).all()
    assert (np.diff(accepted, axis=1) <= 0).all()


def _assert_same_completions(found: Rollouts, expected: Rollouts, rows=slice(None)) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens[rows])
    np.testing.assert_array_equal(found.lengths, expected.lengths[rows])
    np.testing.assert_array_equal(found.stop_reasons, expected.stop_reasons[rows])
    np.testing.assert_allclose(found.logprobs, expected.logprobs[rows], atol=1e-5)


#
# Greedy decoding: token for token
#


@pytest.fixture(scope="module")
def plain(target):
    """Greedy decoding without a draft, the reference."""
    return _decode(target, sampling=GREEDY)


def test_plain_decoding_is_the_argmax_of_full_forwards(target, plain):
    """The reference itself, against forwards over whole sequences, one token at a time."""

    @eqx.filter_jit
    def next_token(tokens, length):
        positions = jnp.arange(tokens.shape[0])[None]
        features, _ = target.hidden(tokens[None], positions, target.no_cache())
        return jnp.argmax(target.unembed(features.last[0, length - 1]))

    for row, prompt in enumerate(_prompts()):
        sequence = np.zeros(CONTEXT, np.int32)
        sequence[: len(prompt)] = prompt
        for position in range(len(prompt), len(prompt) + LIMITS[row]):
            sequence[position] = next_token(sequence, jnp.int32(position))
        assert plain.completion(row) == sequence[len(prompt) : len(prompt) + LIMITS[row]].tolist()
    assert len(np.unique(plain.tokens)) > 6, "the model repeats itself: equality of tokens would prove little"


def test_the_cache_is_used_to_the_last_position(plain):
    np.testing.assert_array_equal(plain.lengths, LIMITS)
    assert plain.lengths[2] + PROMPT_LENGTHS[2] == CONTEXT
    assert plain.statistics.acceptance_length == 1.0
    assert plain.statistics.drafted.shape == (6, 0)


@pytest.mark.parametrize("length", [0, 1, 2, 4])  # and 3 with every other draft
def test_heads_say_the_same_greedily(target, heads, plain, length):
    rollouts = _decode(target, sampling=GREEDY, draft=heads, length=FixedLength(length))
    _assert_same_completions(rollouts, plain)
    statistics = rollouts.statistics
    assert (statistics.drafted[:, :length] == statistics.target_forwards[:, None]).all()
    assert (statistics.drafted[:, length:] == 0).all()
    # Some but not all is accepted, so that rewinding is at work.
    assert 0 < statistics.acceptance_rate < 1 or length == 0
    assert len(statistics.acceptance_rate_by_position) == 4


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_acceptance_length_is_what_the_draft_deserves(target, plain, num_right):
    """Zero acceptance, full acceptance, and the two between: exact counts."""
    rollouts = _decode(target, sampling=GREEDY, draft=OracleDraft(3, jnp.int32(num_right)))
    _assert_same_completions(rollouts, plain)
    statistics = rollouts.statistics
    blocks = (LIMITS - 1) / (num_right + 1)
    np.testing.assert_array_equal(statistics.target_forwards, np.ceil(blocks))
    # Where no limit cuts the last block, the acceptance is exact.
    whole = blocks == np.floor(blocks)
    assert whole.any() and (num_right == 0 or not whole.all())
    np.testing.assert_array_equal(statistics.emitted[whole], (num_right + 1) * statistics.target_forwards[whole])
    np.testing.assert_array_equal(statistics.accepted[whole].sum(1), num_right * statistics.target_forwards[whole])
    if num_right == 0:
        assert statistics.acceptance_length == 1.0 and statistics.acceptance_rate == 0.0


def test_drafts_of_finished_rows_go_on_by_one_token_a_round(target, monkeypatch):
    """However much the draft would get right: a cache is read as far as the row that has come farthest."""
    states, take = [], decode_module.Output.take

    def seen(output, row_ids, state):
        states.append(state)
        take(output, row_ids, state)

    monkeypatch.setattr(decode_module.Output, "take", seen)
    statistics = _decode(target, sampling=GREEDY, draft=oracle_draft(3)).statistics
    rounds, own = statistics.target_forwards.max(), statistics.target_forwards
    assert own.min() < rounds
    committed = np.asarray(states[-1].draft.lengths) - PROMPT_LENGTHS
    np.testing.assert_array_equal(committed, 4 * own + (rounds - own))


def test_an_end_of_sequence_at_every_offset_of_a_block(target, plain):
    """Each token of the vocabulary serves as the end of sequence in turn, against cutting the plain completion."""
    offsets, stops = set(), set()
    for eos in range(VOCAB):
        for draft in (oracle_draft(3), wrong_draft(3)):
            rollouts = _decode(target, sampling=GREEDY, draft=draft, eos_ids=[eos, 99])
            for row in range(6):
                full = plain.completion(row)
                expected = full[: full.index(eos) + 1] if eos in full else full
                assert rollouts.completion(row) == expected
                if expected[-1] == eos:
                    offsets.add((len(expected) - 2) % 4 if len(expected) > 1 else "first token")
                stops.add(int(rollouts.stop_reasons[row]))
    assert offsets == {0, 1, 2, 3, "first token"}
    assert stops == {StopReason.EOS, StopReason.LENGTH}


@pytest.mark.parametrize(
    "num_valid, room, expected",
    [
        (1, 9, (1, StopReason.RUNNING)),
        (2, 9, (2, StopReason.EOS)),  # the first of two ends
        (4, 9, (2, StopReason.EOS)),
        (4, 2, (2, StopReason.EOS)),  # an end where the room ends is an end
        (4, 1, (1, StopReason.LENGTH)),
        (1, 1, (1, StopReason.LENGTH)),
    ],
)
def test_what_of_a_block_is_committed(num_valid, room, expected):
    """By hand; the second and third token are ends, and what lies beyond `num_valid` is anything."""
    block, eos_ids = jnp.array([[3, 7, 5, 2]]), jnp.array([5, 7])
    count, stop = fits(block, eos_ids, jnp.array([num_valid]), jnp.array([room]))
    assert (int(count[0]), int(stop[0])) == expected


def test_any_of_several_end_of_sequence_ids_ends_a_row(target, heads, plain):
    def cut(eos_ids):
        ends = [min((full.index(eos) for eos in eos_ids if eos in full), default=NEW) for full in completions]
        return [full[: end + 1] for full, end in zip(completions, ends, strict=True)]

    completions = [plain.completion(row) for row in range(6)]
    both_end_rows = [
        eos_ids for eos_ids in it.permutations(range(VOCAB), 2) if set(eos_ids) <= {row[-1] for row in cut(eos_ids)}
    ]
    for eos_ids in both_end_rows[:5] + both_end_rows[-5:]:
        rollouts = _decode(target, sampling=GREEDY, draft=heads, eos_ids=[*eos_ids, eos_ids[0]])
        assert [rollouts.completion(row) for row in range(6)] == cut(eos_ids)
    assert both_end_rows


class CyclingLength(AbstractLengthController[tuple[int, ...]]):
    """0, 1, 2, 4 in turn, one segment each, whatever was seen; `observations` collects that."""

    observations: list = eqx.field(static=True)

    def init(self, max_length):
        return (0,)

    def choose(self, state, rows, context):
        return SegmentPlan([0, 1, 2, 4][len(self.observations) % 4], max_rounds=1)

    def update(self, state, observation):
        self.observations.append(observation)
        return state

    def after_training(self, state, expected_acceptance):
        return state

    def with_future(self, state, left):
        return state

    def round_seconds(self, state, rows, length, context):
        return None

    def metrics(self, state):
        return {}


def test_the_draft_length_may_change_from_segment_to_segment(target, heads, plain):
    observations: list[SegmentObservation] = []
    rollouts = _decode(target, sampling=GREEDY, draft=heads, length=CyclingLength(observations))
    _assert_same_completions(rollouts, plain)
    assert len(observations) > 6
    for index, seen in enumerate(observations):
        assert seen.rows == 6 and seen.rounds == 1
        assert seen.plan.length == [0, 1, 2, 4][index % 4] == len(seen.accepted)
        assert 1 <= seen.active_rounds <= 6
        assert all(0 <= accepted <= seen.active_rounds for accepted in seen.accepted)
        assert seen.active_rounds <= seen.tokens <= seen.active_rounds + sum(seen.accepted)
        # A segment that compiled a program has no time.
        assert seen.seconds is None or seen.seconds > 0
    assert all(seen.seconds is not None for seen in observations[4:])
    contexts = [seen.context for seen in observations]
    assert contexts == sorted(contexts) and 1 <= contexts[0] <= 1.5 and rollouts.lengths.max() >= contexts[-1] > 4
    assert sum(seen.tokens for seen in observations) + 6 == rollouts.lengths.sum()


#
# Sampling: log-probabilities, keys, rows
#


@pytest.fixture(scope="module")
def sampled(target, heads):
    return _decode(target, draft=heads)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7), Sampling(2.0, top_k=5, top_p=1.0), Sampling(1.2, top_k=5, top_p=0.4), GREEDY],
    ids=["temperature", "top-k", "top-k and top-p", "greedy"],
)
def test_logprobs_are_those_of_the_distribution_sampled_from(target, heads, sampling):
    rollouts = _decode(target, sampling=sampling, draft=heads)
    counts = np.arange(NEW)[None] < rollouts.lengths[:, None]
    expected = teacher_forced_logprobs(target, sampling, rollouts)
    assert np.isfinite(expected[counts]).all(), "a token was emitted that truncation forbids"
    np.testing.assert_allclose(rollouts.logprobs[counts], expected[counts], atol=1e-5)
    assert 0 < rollouts.statistics.acceptance_rate < 1
    assert rollouts.logprobs.min() < -0.1


def test_temperatures_share_a_program(target, heads, sampled):
    del sampled  # which compiled
    with count_compilations() as compiled:
        colder = _decode(target, draft=heads, sampling=Sampling(0.3))
        warmer = _decode(target, draft=heads, sampling=Sampling(3.0))
    assert compiled.seconds == 0
    assert colder.logprobs.sum() / colder.lengths.sum() > warmer.logprobs.sum() / warmer.lengths.sum()


def test_the_same_key_gives_the_same_rollouts(target, heads, sampled):
    again = _decode(target, draft=heads)
    assert eqx.tree_equal(again, sampled)
    other = _decode(target, draft=heads, key=jr.key(3))
    assert (other.tokens[:, :8] != sampled.tokens[:, :8]).any(1).all()


def test_a_row_does_not_depend_on_shrinking(target, heads, sampled):
    progress: list[DecodeProgress] = []
    shrunk = _decode(target, draft=heads, smallest_bucket=1, on_progress=progress.append)
    _assert_same_completions(shrunk, sampled)
    np.testing.assert_array_equal(shrunk.statistics.emitted, sampled.statistics.emitted)
    np.testing.assert_array_equal(shrunk.statistics.accepted, sampled.statistics.accepted)
    assert len(progress) >= 4, "the batch did not shrink through 4, 2 and 1"
    assert all(report.rows == 6 for report in progress)
    assert [report.active for report in progress] == sorted((report.active for report in progress), reverse=True)
    assert progress[-1].active == 0 and progress[-1].tokens == sampled.lengths.sum()


@pytest.mark.parametrize("hidden, dtype, smallest", [(288, "float32", 1), (288, "bfloat16", 2), (16, "float32", 2)])
def test_a_batch_shrinks_to_one_row_where_that_is_cheaper(hidden, dtype, smallest):
    model = tiny_transformer(num_layers=1, hidden_size=hidden, max_position_embeddings=12)
    model = cast_weights(model, jnp.dtype(dtype))
    segments: list[SegmentObservation] = []
    decode(
        model,
        [[1, 2], [3, 4, 5, 6]],  # where the context ends, the first has made two tokens more
        key=jr.key(0),
        max_new_tokens=11,
        length=FixedLength(0),
        on_segment=lambda observation, _: segments.append(observation),
    )
    assert segments[0].rows == 2 and segments[-1].rows == smallest


def test_a_row_does_not_depend_on_the_others(target, heads, sampled):
    """Nor on their number: a batch of one row."""
    _assert_same_completions(_decode(target, _prompts()[:1], draft=heads), sampled, slice(1))


def test_samples_are_rows_that_share_a_prompt(target, heads):
    prompts = _prompts()[2:4]
    grouped = _decode(target, prompts, draft=heads, samples=3)
    np.testing.assert_array_equal(grouped.group, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(grouped.prompts.lengths, [15, 7])
    _assert_same_completions(grouped, _decode(target, [p for p in prompts for _ in range(3)], draft=heads))
    # Rows of one prompt have random numbers of their own.
    assert len({tuple(grouped.completion(row)) for row in range(6)}) == 6


def test_what_pads_a_prompt_does_not_matter(target, heads, sampled):
    prompts = Prompts.from_lists(_prompts())
    padding = np.arange(prompts.tokens.shape[1])[None] >= prompts.lengths[:, None]
    padded = Prompts(np.where(padding, 7, prompts.tokens).astype(np.int32), prompts.lengths)
    rollouts = decode(target, padded, draft=heads, key=jr.key(2), max_new_tokens=NEW, eos_ids=NO_EOS, smallest_bucket=8)
    _assert_same_completions(rollouts, sampled)


def test_prompts_come_in_parts_of_one_width():
    prompts = Prompts.from_lists([[1], [2, 3], [4], [5, 6, 7], [8]], multiple_of=4)
    parts = prompts.parts(2)
    assert [len(part.lengths) for part in parts] == [2, 2, 1] and all(part.tokens.shape[1] == 4 for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), prompts.tokens)
    np.testing.assert_array_equal(np.concatenate([part.lengths for part in parts]), prompts.lengths)


#
# Bad input
#


def test_bad_input_gets_a_sentence(target, heads):
    with pytest.raises(UserError, match="prompt 1 has 24 tokens, but the model's context holds 24"):
        _decode(target, [[1], [1] * CONTEXT])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        _decode(target, [[1], []])
    with pytest.raises(ValueError, match="token 2 of prompt 1 is 999, but the model's vocabulary has .* tokens"):
        _decode(target, [[1], [1, 2, 999]])
    with pytest.raises(ValueError, match="no prompts"):
        _decode(target, [])
    with pytest.raises(ValueError, match="max_new_tokens"):
        _decode(target, max_new_tokens=0)
    with pytest.raises(ValueError, match="samples"):
        _decode(target, samples=0)
    with pytest.raises(ValueError, match="GreedyMatch .* not lossless under sampling"):
        _decode(target, draft=heads, verifier=GreedyMatch())
    with pytest.raises(TypeError, match="length is 3, but must be an AbstractLengthController, as in length=FixedLen"):
        decode_module._check_modules(length=(3, AbstractLengthController, "FixedLength(3)"))
    with pytest.raises(DraftError, match="size 8, .* size 16"):
        _decode(target, draft=MedusaHeads.fresh(8, 2))
    with pytest.raises(ValueError, match="lengths are 0 to 8"):
        FixedLength(9)


#
# Refilling
#


@pytest.mark.parametrize("max_rows", [1, 3, 4])
def test_rows_that_waited_are_the_same_rows(target, heads, sampled, max_rows):
    progress: list[DecodeProgress] = []
    rollouts = _decode(target, draft=heads, max_rows=max_rows, on_progress=progress.append)
    _assert_same_completions(rollouts, sampled)
    np.testing.assert_array_equal(rollouts.statistics.emitted, sampled.statistics.emitted)
    assert max(report.active for report in progress) == max_rows
    assert progress[-1].tokens == sampled.lengths.sum()


@pytest.mark.parametrize("max_rows", [None, 3])
@pytest.mark.parametrize("loop", [FixedRounds(3), FixedRounds(2, ahead=0), UntilRowsFinish(ahead=2)], ids=str)
def test_rows_do_not_depend_on_when_the_host_looks(target, heads, sampled, loop, max_rows):
    observations, options = [], dict(max_rows=max_rows, smallest_bucket=1)
    rollouts = _decode(target, draft=heads, loop=loop, on_segment=lambda seen, _: observations.append(seen), **options)
    _assert_same_completions(rollouts, sampled)
    np.testing.assert_array_equal(rollouts.statistics.accepted, sampled.statistics.accepted)
    np.testing.assert_array_equal(rollouts.statistics.target_forwards, sampled.statistics.target_forwards)
    # A row's first token is that of the prompt's pass.
    assert sum(seen.tokens for seen in observations) + 6 == sampled.lengths.sum()
    assert sum(seen.active_rounds for seen in observations) == sampled.statistics.target_forwards.sum()
    if isinstance(loop, FixedRounds):
        assert all(seen.rounds == loop.rounds for seen in observations)


def test_those_expected_to_be_longest_start_first(target, heads, sampled):
    order = []

    def watch(progress):
        order.append(progress.tokens)

    prompts = _prompts()
    rollouts = _decode(
        target, prompts, draft=heads, max_rows=2, expected_lengths=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], on_progress=watch
    )
    _assert_same_completions(rollouts, sampled)
    by_default = []
    _decode(target, prompts, draft=heads, max_rows=2, on_progress=lambda progress: by_default.append(progress.tokens))
    assert order != by_default and order[-1] == by_default[-1]
    with pytest.raises(ValueError, match="expected_lengths has 1 values for 6 prompts"):
        _decode(target, prompts, draft=heads, expected_lengths=[3.0])
