"""From logits to a distribution, and from a distribution to a token."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch
from helpers import quick_compilation
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from eqx_specgrpo.decoding import Categorical, GreedySampling, Sampling, make_sampling
from eqx_specgrpo.sampling import sample_weights

GREATEST_UNIFORM = np.float32(1 - 2**-24)


@eqx.filter_jit
def _logits(sampling, logits):
    return sampling.distribution(logits).logits


@jax.jit
def _draw(weights, uniforms):
    """One draw for each uniform number, all from the same weights."""
    return sample_weights(jnp.broadcast_to(weights, (uniforms.shape[0], weights.shape[0])), uniforms)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


#
# Drawing
#


@pytest.mark.parametrize("vocab", [1, 5, 127, 128, 129, 300])
def test_draws_are_proportional_to_the_weights(vocab):
    """Without chance: a fine grid of uniform numbers must fall into the tokens' shares, each to within a grid step."""
    rng = np.random.default_rng(vocab)
    weights = rng.exponential(size=vocab).astype(np.float32)
    weights[rng.random(vocab) < 0.3] = 0
    weights[-1] += 0.1
    grid = 50_000
    drawn = np.asarray(_draw(weights, ((np.arange(grid) + 0.5) / grid).astype(np.float32)))
    assert (np.diff(drawn) >= 0).all()
    counts = np.bincount(drawn, minlength=vocab)
    assert counts[weights == 0].sum() == 0
    expected = grid * weights.astype(np.float64) / weights.astype(np.float64).sum()
    assert np.abs(counts - expected).max() < 1.5


@pytest.mark.parametrize("vocab", [5, 128, 257])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_extreme_uniforms_draw_the_first_and_last_positive_weight(vocab, scale):
    weights = np.zeros(vocab, np.float32)
    weights[[1, vocab // 2, vocab - 2]] = scale
    drawn = _draw(weights, np.array([0, GREATEST_UNIFORM], np.float32))
    np.testing.assert_array_equal(drawn, [1, vocab - 2])


def test_a_zero_weight_is_never_drawn():
    """Not even where a parallel cumulative sum rounds a zero block's end up: exactly there are the uniforms aimed.

    With more blocks than a tile of XLA's scan has, the sums before and after a block of zeros may differ in their last
    bit.
    """
    vocab = 128 * 384
    rng = np.random.default_rng(0)
    for _ in range(10):
        weights = np.zeros((384, 128), np.float32)
        weights[rng.random(384) < 0.3, 5] = 1
        weights *= rng.random(weights.shape).astype(np.float32) ** 3
        ends = np.asarray(jnp.cumsum(weights.sum(-1)))
        exact = (ends / ends[-1]).astype(np.float32)
        uniforms = np.concatenate([exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(1))])
        uniforms = np.minimum(uniforms, GREATEST_UNIFORM)
        drawn = np.concatenate([_draw(weights.reshape(vocab), part) for part in np.split(uniforms, 9)])
        assert (weights.reshape(vocab)[drawn] > 0).all()


def test_each_position_is_drawn_from_its_own_distribution(getkey):
    logits = jr.normal(getkey(), (2, 3, 7))
    uniforms = jr.uniform(getkey(), (2, 3))

    @jax.jit
    def draw(logits, uniforms):
        distribution = Categorical.from_logits(logits)
        return distribution.sample(uniforms), distribution.probs()

    drawn, probs = draw(logits, uniforms)
    cumulative = np.cumsum(np.asarray(probs, np.float64), axis=-1)
    np.testing.assert_array_equal(drawn, (cumulative < np.asarray(uniforms)[..., None]).sum(-1))


def test_categorical_is_a_distribution(getkey):
    logits = np.asarray(5 * jr.normal(getkey(), (4, 9))).copy()
    logits[1, [2, 5]] = -np.inf
    distribution = Categorical.from_logits(jnp.asarray(logits))
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    np.testing.assert_allclose(distribution.probs(), np.exp(expected), atol=1e-6)
    tokens = np.array([3, 2, 0, 8])
    np.testing.assert_allclose(distribution.logprob(jnp.asarray(tokens)), expected[np.arange(4), tokens], rtol=1e-5)
    np.testing.assert_array_equal(distribution[2].probs(), distribution.probs()[2])


#
# Temperature and truncation
#


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1.0, None, None), (0.3, None, None), (1.0, 1, None), (1.7, 5, None), (1.0, 50, None), (0.8, None, 0.9)]
    + [(1.0, None, 0.05), (1.0, None, 1.0), (1.3, 12, 0.6)],
)
def test_truncation_is_that_of_transformers(temperature, top_k, top_p):
    logits = 2 * np.random.default_rng(0).standard_normal((16, 40)).astype(np.float32)
    expected = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits, dtype=torch.float64))
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:  # transformers has no warper for keeping everything
        expected = TopPLogitsWarper(top_p)(None, expected)
    expected -= expected.amax(-1, keepdim=True)  # ours are less the largest, which changes no probability
    np.testing.assert_allclose(_logits(Sampling(temperature, top_k, top_p), logits), expected.numpy(), rtol=1e-6)


def test_top_p_by_hand():
    logits = np.log(np.array([0.15, 0.5, 0.05, 0.3], np.float32))
    for top_p, kept in [(0.4, [1]), (0.6, [1, 3]), (0.79, [1, 3]), (0.9, [0, 1, 3]), (0.96, [0, 1, 2, 3])]:
        found = np.asarray(_logits(Sampling(top_p=top_p), logits))
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(found)), kept)


def test_ties_at_the_edge_are_all_kept():
    """Which of equals would be dropped is not for the order of ids to decide; it is the same law for all programs."""
    logits = np.array([1.0, 2.0, 1.0, 0.0], np.float32)
    np.testing.assert_array_equal(np.isfinite(_logits(Sampling(top_k=2), logits)), [True, True, True, False])


def test_reported_logprobs(getkey):
    """Of the truncated distribution, renormalised; under greedy decoding those of the whole softmax."""
    logits = jr.normal(getkey(), (5, 11))
    tokens = jnp.argmax(logits, axis=-1)
    sampling = Sampling(0.5, top_k=3)
    distribution = sampling.distribution(logits)
    np.testing.assert_allclose(distribution.probs().sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal((distribution.probs() > 0).sum(-1), 3)
    best_three = np.sort(np.asarray(logits, np.float64), axis=-1)[:, -3:] / 0.5
    expected = best_three[:, -1] - np.log(np.exp(best_three).sum(-1))
    np.testing.assert_allclose(sampling.logprobs(logits, distribution, tokens), expected, rtol=1e-5)

    greedy = GreedySampling()
    np.testing.assert_array_equal(greedy.distribution(logits).probs(), jax.nn.one_hot(tokens, 11))
    np.testing.assert_allclose(
        greedy.logprobs(logits, greedy.distribution(logits), tokens),
        jax.nn.log_softmax(logits).max(-1),
        rtol=1e-6,
    )


def test_temperature_and_top_p_are_traced():
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def probs(sampling, logits):
        return sampling.distribution(logits).probs()

    logits = jnp.arange(5.0)
    settings = [(2.0, 1.0), (1.0, 0.99), (0.5, 0.9)]
    sharpness = [float(probs(Sampling(temperature, top_p=top_p), logits)[-1]) for temperature, top_p in settings]
    assert sharpness == sorted(sharpness) and sharpness[0] < 0.5 < sharpness[-1]


def test_make_sampling():
    assert isinstance(make_sampling(0.0), GreedySampling)
    assert eqx.tree_equal(make_sampling(0.7, 5, 0.9), Sampling(0.7, 5, 0.9))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=0.0), "temperature is 0.0, but must be above 0; for greedy use"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(top_k=0), "top_k is 0, but must be at least 1"),
        (dict(top_p=0.0), "top_p is 0.0, but must be above 0"),
        (dict(top_p=1.5), "top_p is 1.5, but must be above 0 and at most 1"),
    ],
)
def test_settings_out_of_range_get_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
