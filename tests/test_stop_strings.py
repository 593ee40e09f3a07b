"""Stop strings: a row ends at the first token whose text completes one, however it was decoded."""

import jax.random as jr
import numpy as np
import pytest
from tiny_run import tiny_model, tiny_tokenizer

from eqx_specgrpo._types import Rollouts, StopReason
from eqx_specgrpo.decoding import Coupled, FixedLength, FixedRounds, NoStop, StopStrings, decode, make_stop
from eqx_specgrpo.drafts import MedusaHeads, NoDraft
from eqx_specgrpo.errors import UserError

TOKENIZER = tiny_tokenizer()


def test_the_first_token_that_completes_one():
    def end(text: str, *strings: str) -> int | None:
        return StopStrings(TOKENIZER, strings).end(TOKENIZER.encode(text))

    assert end("abcabc", "bc") == 3
    assert end("abcabc", "bca", "cab") == 4  # whichever is complete first
    assert end("abc", "x") is None and end("", "x") is None
    # A character of several tokens counts when it is whole; one byte is one token here.
    assert end("aéb", "é") == 3 and end("aéb", "éb") == 4
    assert StopStrings(TOKENIZER, ["bc"]).end(TOKENIZER.encode("ab<|end|>c")) == 4  # special tokens have no text


def test_none_and_empty_ones():
    assert isinstance(make_stop([], TOKENIZER), NoStop) and NoStop().end([1, 2]) is None
    for strings in ([], [""], ["a", ""], "ab"):
        with pytest.raises(UserError, match="at least one, and none without a text"):
            StopStrings(TOKENIZER, strings)


MODEL = tiny_model()
PROMPTS = [TOKENIZER.encode("1 + 2 ="), TOKENIZER.encode("30 + 4 =")]


def sampled(draft=None, **options) -> Rollouts:
    return decode(
        MODEL,
        PROMPTS,
        draft=draft,
        verifier=Coupled(),  # the same tokens whatever the draft
        length=FixedLength(3 if draft is not None else 0),
        key=jr.key(3),
        max_new_tokens=24,
        samples=4,
        **options,
    )


@pytest.fixture(scope="module")
def whole() -> Rollouts:
    """Without stop strings."""
    return sampled()


@pytest.fixture(scope="module")
def stop(whole) -> StopStrings:
    """Texts of two tokens that occur in some of these rows: in the middle, early, and just before the end."""

    rows = list(range(8))

    def first(places: range) -> str:
        """Of two characters, which a row that has not been taken says there for the first time."""
        for row in rows:
            for at in places:
                text = TOKENIZER.decode(whole.tokens[row, at : at + 2].tolist())
                before = TOKENIZER.decode(whole.tokens[row, : at + 1].tolist())
                if text.isascii() and text not in before:
                    rows.remove(row)
                    return text
        raise AssertionError(f"no row has such a text at {places}")

    return StopStrings(TOKENIZER, [first(range(20, 23)), first(range(4)), first(range(6, 12))])


def check(whole: Rollouts, stopped: Rollouts, stop: StopStrings) -> None:
    """`stopped` is `whole`, cut where it has to be."""
    num_cut = 0
    for row in range(len(whole.lengths)):
        tokens = whole.completion(row)
        end = next(
            (n for n in range(1, len(tokens) + 1) if any(s in TOKENIZER.decode(tokens[:n]) for s in stop.strings)), None
        )
        assert stopped.completion(row) == (tokens if end is None else tokens[:end])
        assert stopped.stop_reasons[row] == (whole.stop_reasons[row] if end is None else StopReason.STOP)
        assert not stopped.tokens[row, stopped.lengths[row] :].any()
        np.testing.assert_allclose(
            stopped.logprobs[row, : stopped.lengths[row]], whole.logprobs[row, : stopped.lengths[row]], atol=2e-4
        )
        num_cut += end is not None
    assert 3 <= num_cut < len(whole.lengths)
    assert (stopped.statistics.emitted == stopped.lengths - 1).all()
    assert (stopped.statistics.target_forwards <= stopped.statistics.emitted).all(), "no pass of what is cut counts"


def test_speculative_and_plain_agree(whole, stop):
    check(whole, sampled(stop=stop), stop)
    check(whole, sampled(MedusaHeads.fresh(MODEL.hidden_size, 3), stop=stop), stop)


def test_rows_that_wait_and_a_host_that_looks_late(whole, stop):
    check(whole, sampled(NoDraft(), stop=stop, max_rows=3), stop)
    check(whole, sampled(NoDraft(), stop=stop, loop=FixedRounds(4, ahead=1)), stop)


def test_the_first_token_can_be_the_end(whole):
    every = [TOKENIZER.decode([token]) for token in whole.tokens[:, 0].tolist()]
    stop = StopStrings(TOKENIZER, [text for text in every if text])
    stopped = sampled(stop=stop)
    assert (stopped.lengths[[bool(text) for text in every]] == 1).all()
    assert stopped.statistics.target_forwards.sum() < whole.statistics.target_forwards.sum()


def test_no_more_rounds_than_asked_for(whole, stop):
    """The host looks often enough: what is decoded in vain is bounded."""
    seen = []
    few = StopStrings(TOKENIZER, stop.strings, most_rounds=5)
    check(whole, sampled(stop=few, on_segment=lambda observation, _: seen.append(observation.rounds)), few)
    assert max(seen) <= 5
