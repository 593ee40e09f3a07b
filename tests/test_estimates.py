"""What an evaluation says of a policy: by hand, by enumeration, and by simulation."""

import itertools
import math

import numpy as np
import pytest

from eqx_specgrpo.config import pass_ks
from eqx_specgrpo.evaluation import bootstrap_intervals, majority_value, pass_at_k
from eqx_specgrpo.evaluation._metrics import completion_metrics, reward_metrics

NAN = math.nan


def at(correct: int, samples: int, k: int) -> float:
    return float(pass_at_k(np.array([correct]), samples, k)[0])


def test_pass_at_k_by_hand():
    """8 completions of which 2 are right: 1 - C(6, k) / C(8, k)."""
    assert at(2, 8, 1) == pytest.approx(0.25)
    assert at(2, 8, 4) == pytest.approx(0.7857, abs=5e-5)
    assert at(2, 8, 7) == 1.0 and at(0, 8, 8) == 0.0 and at(8, 8, 1) == 1.0


@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        is_right = [index < correct for index in range(samples)]
        subsets = list(itertools.combinations(is_right, k))
        assert at(correct, samples, k) == pytest.approx(sum(map(any, subsets)) / len(subsets)), (correct, k)


def test_pass_at_k_of_many_samples():
    """C(10000, 5000) is beyond float64."""
    exact = 1 - math.comb(9000, 50) / math.comb(10000, 50)
    assert at(1000, 10000, 50) == pytest.approx(exact, rel=1e-12)
    assert at(1, 10000, 5000) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="pass@3 can't be known from 2 samples"):
        at(1, 2, 3)
    with pytest.raises(ValueError, match="of 2 samples"):
        at(3, 2, 1)


@pytest.mark.parametrize("samples, ks", [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_ks_that_samples_allow(samples, ks):
    assert pass_ks(samples) == ks


@pytest.mark.parametrize(
    "answers, values, expected",
    [
        ("aab", [1, 1, 0], 1.0),
        ("abb", [1, 0, 0], 0.0),
        ("aabb", [1, 1, 0, 0], 0.5),  # a tie: either one
        (["a", None, None], [1, 0, 0], 1.0),  # no answer, no vote
        ([None, None], [0, 0], 0.0),
        ("aab", [1, 0, 0], 0.5),  # the same answer, judged differently
        ("ab", [NAN, NAN], NAN),
        ("aab", [NAN, 1, 0], 1.0),
    ],
)
def test_majority(answers, values, expected):
    found = majority_value(list(answers), np.array(values, float))
    assert found == pytest.approx(expected, nan_ok=True)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    """Of 400 draws of 60 prompts, the 90 % interval holds the true mean in about 90 %."""
    draws = np.random.default_rng(0).binomial(1, 0.3, (400, 60)).astype(float)
    low, high = bootstrap_intervals(draws.T, seed=1, level=0.9)
    covered = np.mean((low <= 0.3) & (0.3 <= high))
    assert 0.84 < covered < 0.95


def test_bootstrap_is_of_prompts_and_repeatable():
    values = np.array([[0.0, 1.0], [1.0, 1.0], [0.5, 1.0], [NAN, 1.0]])
    low, high = bootstrap_intervals(values, seed=3)
    again = bootstrap_intervals(values, seed=3)
    np.testing.assert_array_equal(np.stack([low, high]), np.stack(again))
    assert low[1] == high[1] == 1.0  # all prompts alike
    assert 0 <= low[0] < 0.5 < high[0] <= 1
    assert np.isnan(bootstrap_intervals(np.full((3, 1), NAN), seed=0)[0]).all()


def test_metrics_of_rewards():
    rewards = np.array([[1.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0], [NAN] * 4])
    answers = [["7", "8", "7", "9"], ["1", "1", "2", "3"], [None] * 4]
    metrics = reward_metrics(rewards, rewards >= 1, answers, pass_ks(4), seed=0)
    by_name = {name.removeprefix("eval/"): value for name, value in metrics.items() if name.count("/") == 1}
    assert by_name == pytest.approx(
        {
            "reward": (0.625 + 0.0) / 2,  # the third prompt has none, and is left out
            "pass@1": (0.5 + 0) / 2,
            "pass@2": (1 - 1 / 6 + 0) / 2,  # of 6 pairs one has no right one
            "pass@4": 0.5,
            "mean@4": 0.3125,
            "best@4": 0.5,
            "maj@4": 0.5,
        }
    )
    for name in by_name:
        assert metrics[f"eval/{name}/low"] <= by_name[name] <= metrics[f"eval/{name}/high"]
    assert "eval/maj@4" not in reward_metrics(rewards, rewards >= 1, None, (1,), seed=0)
    nothing = reward_metrics(rewards[2:], rewards[2:] >= 1, None, (1,), seed=0)
    assert all(math.isnan(value) for value in nothing.values())


def test_metrics_of_completions():
    metrics = completion_metrics(np.array([1, 3]), np.array([1, 2]), [])
    assert metrics["eval/completions/mean_length"] == 2 and metrics["eval/completions/clipped_ratio"] == 0.5
