"""What a run says that speculation saved, on a simulated machine."""

import jax.numpy as jnp
import numpy as np
import pytest

from eqx_specgrpo.decoding import AdaptiveLength, FixedLength, SegmentObservation, SegmentPlan
from eqx_specgrpo.train import SegmentLog


def cost(rows, length):
    return 0.02 + 0.0008 * rows * (1 + length)


def segment(rows, length, rounds, pace=1.0, compiling=0.0, context=0.0, more=0.0):
    """`more`: seconds of a round that a token of context takes."""
    seconds = rounds * (cost(rows, length) + more * context) * pace
    accepted = (round(0.8 * rows * rounds), round(0.64 * rows * rounds))[:length]
    return SegmentObservation(
        rows=rows,
        plan=SegmentPlan(length, rounds),
        rounds=rounds,
        seconds=seconds if compiling == 0 else None,
        accepted=accepted,
        active_rounds=rows * rounds,
        tokens=rows * rounds + sum(accepted),
        compile_seconds=compiling,
        elapsed=seconds + compiling,
        context=context,
    )


class Log(SegmentLog):
    """Sees segments as a decoding tells them."""

    def __init__(self, controller):
        super().__init__(controller)
        self.controller, self.state = controller, controller.init(2)

    def see(self, *segments):
        for one in segments:
            self.state = self.controller.update(self.state, one)
            self(one, self.state)


def learned():
    """A log whose controller has measured all kinds of rounds."""
    log = Log(AdaptiveLength(2))
    log.see(*(segment(rows, length, 20) for rows in (8, 4) for length in (0, 1, 2) for _ in range(3)))
    log.metrics()
    return log


@pytest.mark.parametrize("pace", [0.85, 1.0, 1.2])
def test_it_is_what_plain_rounds_would_have_taken_longer(pace):
    """Eight rows of 61 tokens and four of 121, in rounds of two guesses that emit 2.5 tokens on average: the machine
    has just changed its pace, and no plain round was run since."""
    log = learned()
    log.decoded(np.array([61] * 4 + [121] * 4), 1, None)
    log.see(
        segment(8, 2, 10, pace, compiling=3.0), *(segment(8, 2, 7, pace) for _ in range(2)), segment(4, 2, 24, pace)
    )
    plain = 60 * cost(8, 0) + 60 * cost(4, 0)
    saved = pace * (plain - 24 * cost(8, 2) - 24 * cost(4, 2))
    assert log.metrics()["draft/seconds_saved"] == pytest.approx(saved, rel=0.15)


def test_it_counts_what_contexts_take_in_plain_rounds_too():
    """Eight rows of 1,001 tokens, in segments of 20 rounds of two guesses, 2.5 tokens each. A plain round at the end
    takes four times as long as one at the beginning, a round with two guesses twice as long."""
    log, more = learned(), 8e-5
    for number in range(3):
        segments = [segment(8, 2, 20, context=50.0 * i + 25, more=more) for i in range(20)]
        if number < 2:  # and, as a run does, some plain rounds
            segments[6] = segment(8, 0, 50, context=325.0, more=more)
        log.decoded(np.array([1001] * 8), 1, None)
        log.see(*segments)
        said = log.metrics()["draft/seconds_saved"]
    plain = 1000 * (cost(8, 0) + more * 501)
    assert said == pytest.approx(plain - 400 * (cost(8, 2) + more * 500), rel=0.05)


@pytest.mark.parametrize("pace", [0.5, 2.0])
def test_a_few_guesses_among_plain_rounds_save_little(pace):
    """On a machine that is half or twice as fast as when its costs were measured no more seems to be saved, or lost."""
    log = learned()
    log.decoded(np.array([101] * 8), 1, None)
    log.see(segment(8, 0, 90, pace), segment(8, 1, 5, pace))
    saved = pace * (10 * cost(8, 0) - 5 * cost(8, 1))
    assert log.metrics()["draft/seconds_saved"] == pytest.approx(saved, rel=0.1)


def test_plain_decoding_saves_nothing_whatever_its_pace():
    log = learned()
    log.decoded(np.array([101] * 8), 1, None)
    log.see(segment(8, 0, 103, 1.5))
    assert log.metrics()["draft/seconds_saved"] == 0.0


def test_a_fixed_length_knows_it_where_plain_rounds_were_seen():
    log = Log(FixedLength(2))
    log.decoded(np.array([61] * 8), 1, None)
    log.see(segment(8, 2, 24))
    assert "draft/seconds_saved" not in log.metrics()
    log.see(segment(8, 0, 5))
    log.metrics()
    log.decoded(np.array([61] * 8), 1, None)
    log.see(segment(8, 2, 24))
    saved = 60 * cost(8, 0) - 24 * cost(8, 2)
    assert log.metrics()["draft/seconds_saved"] == pytest.approx(saved, rel=1e-6)


def test_what_a_lesson_found_is_told_once():
    """And a run's start tells what the checkpoint has."""
    heard = []

    class Hears(FixedLength):
        def after_training(self, state, expected_acceptance):
            heard.append(expected_acceptance)
            return state

    log = SegmentLog(Hears(2))
    log.after_training(2, jnp.array([0.5, 0.25]), 0, 4)
    log.after_training(2, jnp.array([0.5, 0.25]), 1, 3)
    log.learned([0.75, 0.5])
    log.after_training(2, jnp.array([0.8, 0.6]), 2, 2)
    log.learned([])
    log.after_training(2, jnp.array([0.8, 0.6]), 3, 1)
    assert heard == [[0.5, 0.25], None, [0.75, 0.5], None]
