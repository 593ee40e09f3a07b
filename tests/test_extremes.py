"""Numbers at their ends: temperatures that float32 can hardly hold, and logits that are no numbers.

Whatever comes in, a token is one of the vocabulary; and what cannot be drawn from is said, in a sentence.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import TabularDraft, quick_compilation, tabular_model

from eqx_specgrpo.decoding import (
    Block,
    Coupled,
    FixedLength,
    GreedyMatch,
    GreedySampling,
    Rejection,
    Sampling,
    decode,
)
from eqx_specgrpo.drafts import Proposal
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.grpo import chunked_logprobs
from eqx_specgrpo.sampling import Categorical, exponential_noise, sample_weights

VOCAB = 131  # of the blocks of 128 that are searched, the second is nearly all padding
TEMPERATURES = (1e-45, 1e-38, 1e-30, 1e-20, 1e-9, 1e-3, 1.0, 1e20, 1e38, 1e300)
NAN, INF = float("nan"), float("inf")
BROKEN = {"one NaN": [0.0, NAN], "all NaN": [NAN] * 2, "+inf": [0.0, INF], "all -inf": [-INF] * 2}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def _logits(seed: int, *shape: int) -> np.ndarray:
    """Near ties and an exact one between the largest; some tokens are ruled out."""
    logits = 10 * np.random.default_rng(seed).standard_normal((*shape, VOCAB)).astype(np.float32)
    logits[..., 5::7] = -np.inf
    best = logits.max(-1)
    logits[..., 0] = logits[..., 128] = best
    logits[..., 129] = np.nextafter(best, np.float32(0))
    return logits


@eqx.filter_jit
def _distribution(sampling: Sampling, logits, scale):
    # As some models' unembeddings end: an operation that a compiler computes anew wherever it is used.
    return sampling.distribution(logits * scale)


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}], ids=["all", "top-k", "top-p"])
def test_the_law_at_any_temperature(options):
    logits, scale = _logits(0, 6), np.float32(0.1)
    exact = (logits * scale).astype(np.float64)
    for temperature in TEMPERATURES:
        distribution = _distribution(Sampling(temperature, **options), logits, scale)
        probs = np.asarray(distribution.probs())
        assert np.isfinite(distribution.log_normalizer).all() and np.isfinite(probs).all()
        assert (probs[np.isneginf(logits)] == 0).all()
        np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
        if not options:
            with np.errstate(over="ignore"):
                weights = np.exp((exact - exact.max(-1, keepdims=True)) / np.clip(temperature, 1e-30, 1e30))
            # One unit in the last place of a logit, over the temperature, is what rounding may do to a near tie.
            atol = 1e-6 if temperature > 1e-3 else 1.0
            far = exact < exact.max(-1, keepdims=True) - 1e-3
            expected = weights / weights.sum(-1, keepdims=True)
            np.testing.assert_allclose(probs, expected, atol=atol)
            np.testing.assert_allclose(probs[far], expected[far], atol=1e-5)


@jax.jit
def _logprobs(hidden, tokens, temperature):
    return chunked_logprobs(hidden, tokens, lambda h: h * np.float32(0.1), temperature, 4)


def test_what_the_loss_recomputes_is_what_was_sampled():
    """At any temperature: else a run at a low one would train on infinities."""
    logits = _logits(1, 8)[:, :128]
    tokens = logits.argmax(-1)
    for temperature in TEMPERATURES:
        sampling = Sampling(temperature)
        expected = _distribution(sampling, logits, np.float32(0.1)).logprob(jnp.asarray(tokens))
        logprobs, entropies = _logprobs(logits, tokens, sampling.temperature)
        assert np.isfinite(logprobs).all() and np.isfinite(entropies).all()
        np.testing.assert_allclose(logprobs, expected, atol=1e-4 if temperature > 1e-3 else 1.0)


def _round(verifier, sampling, target_logits, draft_logits, keys):
    """Drafts and verifies one block a row; both tables of logits are of positions."""
    rows, length = draft_logits.shape[:2]
    places = jnp.zeros(rows, jnp.int32)
    proposal = Proposal(*verifier.sampler(sampling, keys, places).chain(draft_logits))
    target = sampling.distribution(target_logits)
    verdict = jax.vmap(verifier.verify)(target, proposal, keys, places)
    kept = jnp.arange(length)[None] < verdict.num_accepted[:, None]
    tokens = jnp.where(kept, proposal.tokens, -1)
    next_logprob = jax.vmap(lambda t, n, token: t[n].logprob(token))(target, verdict.num_accepted, verdict.next_token)
    kept_logprobs = target[:, :length].logprob(jnp.maximum(tokens, 0))
    return proposal.tokens, verdict, jnp.where(kept, kept_logprobs, 0.0), next_logprob


RULES = {
    "rejection": (Rejection(), Sampling()),
    "block": (Block(), Sampling()),
    "coupled": (Coupled(), Sampling()),
    "greedy": (GreedyMatch(), GreedySampling()),
    "coupled, greedy": (Coupled(), GreedySampling()),
}


@pytest.mark.parametrize("name", RULES)
def test_every_verifier_stays_in_the_vocabulary(name):
    """At the ends of temperature, and with logits that no token can be drawn from, of the target or of the draft."""
    verifier, sampling = RULES[name]
    run = eqx.filter_jit(_round)
    target, draft, keys = _logits(2, 32, 3), _logits(3, 32, 2), jr.split(jr.key(0), 32)
    draft[::2] = target[::2, :2]  # half of the rows agree, so that whole chains are kept
    for temperature in TEMPERATURES if isinstance(sampling, Sampling) else (1.0,):
        drawn_by = Sampling(temperature) if isinstance(sampling, Sampling) else sampling
        drafted, verdict, kept, following = run(verifier, drawn_by, target, draft, keys)
        for tokens in (drafted, verdict.next_token):
            assert (np.asarray(tokens) >= 0).all() and (np.asarray(tokens) < VOCAB).all()
        # Nothing is said that had no probability.
        assert np.isfinite(kept).all() and np.isfinite(following).all()
        if temperature < 1e-6:
            rows, at = np.arange(32), np.asarray(verdict.num_accepted)
            assert (target[rows, at, verdict.next_token] >= target[rows, at, 129]).all(), "greedy, but for near ties"
    for values in BROKEN.values():
        # Alternating, so that what they meet is in the last block as well.
        broken = np.tile(np.array(values, np.float32), VOCAB)[:VOCAB]
        for which in ("target", "draft", "both"):
            there = target.copy(), draft.copy()
            for logits in there[:1] if which == "target" else there[1:] if which == "draft" else there:
                logits[:, 1] = broken
            drafted, verdict, _, _ = run(verifier, sampling, *there, keys)
            for tokens in (drafted, verdict.next_token):
                assert (np.asarray(tokens) >= 0).all() and (np.asarray(tokens) < VOCAB).all(), (which, values)


def test_draws_from_nothing_stay_in_range():
    for weights in (np.zeros(VOCAB), np.full(VOCAB, NAN)):
        weights = jnp.asarray(np.tile(weights, (2, 1)), jnp.float32)
        assert (np.asarray(sample_weights(weights, jnp.array([0.0, 0.999]))) < VOCAB).all()


@pytest.mark.parametrize("values", BROKEN.values(), ids=BROKEN)
def test_what_is_no_distribution_has_no_finite_normalizer(values):
    for options in ({}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.5}):
        logits = np.zeros(VOCAB, np.float32)
        logits[:] = np.tile(np.array(values, np.float32), VOCAB)[:VOCAB]
        distribution = Sampling(0.7, **options).distribution(jnp.asarray(logits))
        assert not np.isfinite(distribution.log_normalizer)
    greedy = GreedySampling()
    found = greedy.distribution(jnp.asarray(logits))
    assert not np.isfinite(greedy.logprobs(jnp.asarray(logits), found, jnp.argmax(logits)))


def test_the_only_possible_token_wins_with_the_worst_noise(monkeypatch):
    """One random word in 2^25 rounds to 1: a clock that never rings."""

    def largest_words(key_high, key_low, counter_high, counter_low):
        del key_high, key_low, counter_high
        return jnp.full_like(counter_low, 2**32 - 1), counter_low

    monkeypatch.setattr("eqx_specgrpo.sampling._noise.threefry_2x32", largest_words)
    assert np.isfinite(exponential_noise(jr.key(0), jnp.arange(3))).all()
    certain = Categorical.from_logits(jnp.array([-jnp.inf, -jnp.inf, 0.0]))
    assert int(certain.race(jr.key(0))) == 2


#
# The decoder says so
#


def _decode(target, draft, new: int = 6, **options: Any):
    return decode(
        target,
        [[1, 2], [3]],
        draft=draft,
        length=FixedLength(2 if draft is not None else 0),
        key=jr.key(0),
        max_new_tokens=new,
        samples=2,
        smallest_bucket=4,
        **options,
    )


CHAIN = tabular_model(seed=0, vocab=5, scale=1.0)
NEXT = np.eye(5, dtype=np.float32)[[1, 2, 3, 4, 0]] * 60  # always the next number


def _chain(last: int, values: list[float]):
    """A model that counts, until it stands at `last`: there its logits are broken."""
    table = np.tile(NEXT, (6, 1, 1))
    table[:, last, : len(values)] = values
    return eqx.tree_at(lambda model: model.table, CHAIN, jnp.asarray(table))


@pytest.mark.parametrize("values", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("sampling", [GreedySampling(), Sampling(0.5)], ids=["greedy", "sampled"])
def test_broken_logits_of_the_model_are_an_error(values, sampling):
    """Row by row and from the very first token on; what comes before is decoded."""
    values = values if values[0] != -INF else [-INF] * 5
    target = _chain(0, values)
    # From 2 the tokens are 3, 4, 0, and at 0 the fourth can't be drawn; from 3 the third.
    message = r"logits for token 3 of completion 0 of prompt 0 .* not finite numbers.*checkpoint damaged.*float32"
    for draft in (None, TabularDraft(jnp.asarray(NEXT), 2)):
        with pytest.raises(UserError, match=message):
            _decode(target, draft, sampling=sampling)
    with pytest.raises(UserError, match="token 0 of completion 0 of prompt 1"):
        _decode(_chain(3, values), None, sampling=sampling)


def test_broken_logits_of_a_draft_are_an_error():
    """Its guesses would be refused or, worse, taken by a rule that compares with what is not a number."""
    table = NEXT.copy()
    table[4] = NAN
    with pytest.raises(UserError, match="draft's logits in completion 0 of prompt 0 .*Is the saved draft damaged"):
        _decode(_chain(0, [60.0]), TabularDraft(jnp.asarray(table), 2), sampling=Sampling())


def test_rows_that_wait_are_looked_at_too():
    with pytest.raises(UserError, match="token 0 of completion 0 of prompt 1"):
        _decode(_chain(3, [NAN]), None, new=1, sampling=Sampling(), max_rows=2)
