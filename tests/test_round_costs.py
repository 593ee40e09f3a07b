"""The prior of a round's cost by its positions."""

import math

import pytest

from eqx_specgrpo.decoding._round_costs import guessed_log_seconds


def guess(seconds, rows, length):
    logs = {kind: math.log(value) for kind, value in seconds.items()}
    return math.exp(guessed_log_seconds(logs, rows, [length])[length])


def test_as_many_positions_cost_as_much():
    """Four rows with three guesses are sixteen positions."""
    seconds = {(1, 0): 0.02, (4, 0): 0.04, (16, 0): 0.08}
    assert guess(seconds, 4, 3) == pytest.approx(0.08)
    assert guess(seconds, 2, 1) == pytest.approx(0.04)
    assert guess(seconds, 8, 0) == pytest.approx(0.04 + 0.04 * 4 / 12)


def test_beyond_what_was_measured_it_goes_on_straight():
    assert guess({(4, 0): 0.04, (16, 0): 0.08}, 16, 2) == pytest.approx(0.08 + 32 * 0.04 / 12)
    # Two that lie close together tell no slope.
    assert guess({(8, 0): 0.05, (15, 0): 0.3, (16, 0): 0.3}, 16, 1) == pytest.approx(0.3 + 16 * 0.25 / 8)


def test_what_is_peculiar_to_as_many_rows_stays():
    """One row takes longer than the curve says: its context is long."""
    seconds = {(1, 0): 0.05, (2, 0): 0.03, (4, 0): 0.04, (8, 0): 0.06}
    assert guess(seconds, 1, 3) == pytest.approx(0.05, rel=0.01), "as the curve through 1 and 2 to 4 is flat at 0.04"
    assert guess(seconds, 1, 7) == pytest.approx(0.05 + 0.02, rel=0.01)


def test_it_never_falls_with_the_positions():
    seconds = {(1, 0): 0.05, (2, 0): 0.03, (4, 0): 0.06, (8, 0): 0.055, (16, 0): 0.2}
    found = [guess({k: v for k, v in seconds.items()}, 3, length) for length in range(9)]
    assert found == sorted(found)


def test_one_measurement_is_enough_for_a_guess():
    assert 0.08 < guess({(16, 0): 0.08}, 16, 1) < 0.16
    assert 0.04 < guess({(16, 0): 0.08}, 8, 0) < 0.08
    assert guess({(16, 0): 0.08}, 8, 1) == pytest.approx(0.08)
