"""Coupled verification: shared noise, so that the tokens are plain decoding's whatever drafts."""

import functools as ft
import itertools as it

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import NoiseOfTheRound, PointMassDraft, TabularDraft, quick_compilation, randomise, tiny_transformer
from scipy import stats

from eqx_specgrpo.decoding import Categorical, Coupled, FixedLength, GreedySampling, Rejection, Sampling, decode
from eqx_specgrpo.drafts import HydraHeads, IndependentSampler, MedusaHeads, Proposal
from eqx_specgrpo.sampling._noise import exponential_noise, threefry_2x32


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def test_threefry_is_jaxs():
    key = jr.key_data(jr.key(5))
    counters = jnp.arange(10, dtype=jnp.uint32) * 77
    expected = jax.extend.random.threefry_2x32(key, counters)
    high, low = (jnp.broadcast_to(word, (5,)) for word in key)
    found = threefry_2x32(high, low, counters[:5], counters[5:])
    np.testing.assert_array_equal(jnp.concatenate(found), expected)


def test_noise_is_exponential_and_a_function_of_key_and_token():
    keys = jr.split(jr.key(0), 64)
    noise = np.asarray(exponential_noise(keys, jnp.broadcast_to(jnp.arange(4096), (64, 4096))))
    assert stats.kstest(noise.ravel(), stats.expon.cdf).pvalue > 1e-3
    assert noise.min() > 0 and np.isfinite(noise).all()
    # Neighbours, of tokens and of positions, know nothing of each other.
    for a, b in ((noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01
    some = jnp.array([4095, 3, 77, 0])
    np.testing.assert_array_equal(exponential_noise(keys, jnp.broadcast_to(some, (64, 4))), noise[:, np.asarray(some)])


def _distribution(probs) -> Categorical:
    with np.errstate(divide="ignore"):
        return Categorical.from_logits(jnp.log(jnp.asarray(probs, jnp.float32)))


def test_a_race_is_won_with_the_tokens_probability():
    probs = np.array([0.5, 0.0, 0.3, 0.15, 0.05])
    draws = 20000
    tokens = np.asarray(jax.vmap(_distribution(probs).race)(jr.split(jr.key(1), draws)))
    counts = np.bincount(tokens, minlength=5)
    assert counts[1] == 0
    assert stats.chisquare(counts[probs > 0], draws * probs[probs > 0]).pvalue > 1e-3


def test_a_race_over_a_support_agrees_with_one_over_the_vocabulary():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(2 * rng.standard_normal(300), jnp.float32)
    support = jnp.asarray(rng.permutation(300)[:40], jnp.int32)
    few = Categorical(logits[support], jax.nn.logsumexp(logits[support]), support)
    inside = jnp.zeros(300, bool).at[support].set(True)
    whole = Categorical.from_logits(jnp.where(inside, logits, -jnp.inf))
    keys = jr.split(jr.key(2), 200)
    np.testing.assert_array_equal(jax.vmap(few.race)(keys), jax.vmap(whole.race)(keys))
    np.testing.assert_allclose(few.probs(300), whole.probs(), atol=1e-7)
    for token in (int(support[3]), int(np.argmin(inside))):
        np.testing.assert_allclose(few.logprob(jnp.array(token)), whole.logprob(jnp.array(token)), atol=1e-6)
    with pytest.raises(ValueError, match="size of the whole vocabulary"):
        few.probs()


def test_acceptance_is_within_the_bounds_of_a_coupling():
    target, draft, draws = _distribution([0.5, 0.3, 0.15, 0.05]), _distribution([0.3, 0.5, 0.05, 0.15]), 4000
    keys = jr.split(jr.key(3), draws)
    agree = np.mean(np.asarray(jax.vmap(target.race)(keys)) == np.asarray(jax.vmap(draft.race)(keys)))
    variation = 0.5 * np.abs(np.asarray(target.probs()) - np.asarray(draft.probs())).sum()
    assert (1 - variation) / (1 + variation) - 0.03 < agree < 1 - variation + 0.03
    independent = np.asarray(target.probs()) @ np.asarray(draft.probs())
    assert agree > independent + 0.2


def test_it_keeps_what_agrees_and_no_less():
    """`check_verifier` proves that every chain leads to plain decoding's tokens; here, that no guess is wasted."""
    vocab, length, rng = 3, 3, np.random.default_rng(4)
    logits = jnp.asarray(2 * rng.standard_normal((length + 1, vocab)), jnp.float32)  # whatever the tokens before

    @jax.jit
    def verify(chain, key):
        return Coupled().verify(Categorical.from_logits(logits), Proposal(chain, None), key, jnp.int32(7))

    for seed in range(5):
        key = jr.key(seed)
        keys = jax.vmap(jr.fold_in, in_axes=(None, 0))(key, 7 + jnp.arange(length + 1))
        expected = Categorical.from_logits(logits).race(keys).tolist()
        for chain in it.product(range(vocab), repeat=length):
            verdict = verify(jnp.array(chain, jnp.int32), key)
            agree = next((i for i in range(length) if chain[i] != expected[i]), length)
            assert (int(verdict.num_accepted), int(verdict.next_token)) == (agree, expected[agree])


TARGET = tiny_transformer()
DRAFTS = {
    "medusa": randomise(MedusaHeads.fresh(16, 3), 0, 0.3),
    "hydra": randomise(eqx.filter_eval_shape(HydraHeads, 16, 3, key=jr.key(0)), 1, 0.3),
    "table": TabularDraft(3 * jr.normal(jr.key(2), (13, 13)), 3),
    "point masses": PointMassDraft(jnp.arange(13, dtype=jnp.int32)[::-1], 3),
}
SAMPLINGS = {
    "whole": Sampling(1.0),
    "top-k": Sampling(1.4, top_k=6),
    "top-p": Sampling(0.9, top_p=0.8),
    "greedy": GreedySampling(),
}
VERIFIERS = {"coupled": Coupled(), "noise of the round": NoiseOfTheRound(), "rejection": Rejection()}
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


@ft.cache
def _decode(verifier: str, kind: str, length: int, sampling: str):
    return decode(
        TARGET,
        PROMPTS,
        draft=DRAFTS[kind] if kind != "none" else None,
        verifier=VERIFIERS[verifier],
        length=FixedLength(length),
        sampling=SAMPLINGS[sampling],
        key=jr.key(9),
        max_new_tokens=20,
        eos_ids=[12],
        samples=4,
        smallest_bucket=12,  # no shrinking: fewer programs
    )


@pytest.mark.parametrize(
    ("kind", "length", "sampling"),
    [
        ("medusa", 1, "whole"),
        ("medusa", 3, "whole"),
        ("medusa", 3, "top-k"),
        ("medusa", 3, "top-p"),
        ("medusa", 3, "greedy"),
        ("hydra", 2, "whole"),
        ("table", 2, "whole"),
        ("point masses", 2, "whole"),
    ],
)
def test_the_tokens_are_those_of_plain_decoding(kind, length, sampling):
    plain, found = _decode("coupled", "none", 0, sampling), _decode("coupled", kind, length, sampling)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_array_equal(found.stop_reasons, plain.stop_reasons)
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-4)
    assert found.statistics.accepted.sum() > 0
    if sampling == "whole":  # each row has noise of its own
        assert len({tuple(row) for row in plain.tokens.tolist()}) == len(plain.tokens)


@pytest.mark.parametrize("verifier", ["noise of the round", "rejection"])
def test_token_identity_catches_noise_that_is_not_shared(verifier):
    plain, found = _decode(verifier, "none", 0, "whole"), _decode(verifier, "medusa", 3, "whole")
    assert (found.tokens != plain.tokens).any()


def test_independent_samplers_know_nothing_of_the_position():
    """Their keys are a round's already; only the offset within the draft tells two draws apart."""
    keys = jr.split(jr.key(0), 6)
    sampler = IndependentSampler(Sampling(1.0), keys)
    logits = jnp.zeros((6, 2, 1000))
    chain, _ = sampler.chain(logits)
    single, _ = sampler(logits[:, 1], 1)
    np.testing.assert_array_equal(chain[:, 1], single)
    assert (np.asarray(chain[:, 0]) != np.asarray(chain[:, 1])).all()
