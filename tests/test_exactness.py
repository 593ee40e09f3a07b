"""Losslessness, first tier: the law of the output, by enumeration of everything that can happen in a round.

One round of a verifier is: a chain is drafted, some of it is kept, one more token is drawn. Here the target and the
draft are trees of arbitrary distributions, one a prefix. All chains, all numbers of kept tokens and all next tokens are
enumerated with their probabilities, and where the round emitted less than the horizon, the target's own law continues.
If the joint law of the tokens up to the horizon is the target's, a round is lossless; and so is decoding, by induction,
since a round starts from what is committed and nothing else.
"""

import functools as ft
import itertools as it

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import BROKEN, GREEDY, LOSSLESS, CutOff, quick_compilation, verifier_name
from scipy import stats

from eqx_specgrpo.decoding import AbstractSampling, AbstractVerifier, Categorical, GreedySampling, Rejection, Sampling
from eqx_specgrpo.drafts import Proposal

Tree = list[np.ndarray]  # at depth d: [cases, vocab, ..., vocab], the logits of a token given d tokens before it

NEVER = -np.inf


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def _random_tree(rng: np.random.Generator, cases: int, vocab: int, depth: int, scale: float) -> Tree:
    return [scale * rng.standard_normal((cases, *[vocab] * (d + 1))).astype(np.float32) for d in range(depth)]


def _transform(tree: Tree, sampling: AbstractSampling) -> Tree:
    flat = np.concatenate([logits.reshape(-1, logits.shape[-1]) for logits in tree])
    flat = np.asarray(_logits(sampling, np.pad(flat, ((0, -len(flat) % 512), (0, 0)))))
    sizes = [logits.size // logits.shape[-1] for logits in tree]
    parts = np.split(flat[: sum(sizes)], np.cumsum(sizes)[:-1])
    return [part.reshape(logits.shape) for part, logits in zip(parts, tree, strict=True)]


@eqx.filter_jit
def _logits(sampling, logits):
    return sampling.distribution(logits).logits


def _only(tree: Tree, tokens: list[int]) -> Tree:
    allowed = np.isin(np.arange(tree[0].shape[-1]), tokens)
    return [np.where(allowed, logits, NEVER).astype(np.float32) for logits in tree]


def _probs(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    unnormalized = np.exp(logits - logits.max(-1, keepdims=True))
    return unnormalized / unnormalized.sum(-1, keepdims=True)


def _joint(tree: Tree, depth: int) -> np.ndarray:
    """The law of `depth` tokens, `[cases, vocab, ..., vocab]`."""
    law = np.ones(len(tree[0]))
    for logits in tree[:depth]:
        law = law[..., None] * _probs(logits)
    return law


@eqx.filter_jit
def _enumerate(verifier, target_logits, draft_logits, chains):
    """For all cases and chains: survival, and the next token's weights after every number of accepted tokens.

    The logits are those along a chain; `draft_logits` is `None` for point masses.
    """
    length = chains.shape[-1]

    def one(target_logits, draft_logits, chain):
        draft = None if draft_logits is None else Categorical.from_logits(draft_logits)
        target, proposal = Categorical.from_logits(target_logits), Proposal(chain, draft)
        next_weights = jax.vmap(lambda num: verifier.next_weights(target, proposal, num))(jnp.arange(length + 1))
        return verifier.survival(target, proposal), next_weights

    return jax.vmap(jax.vmap(one), in_axes=(0, 0, None))(target_logits, draft_logits, chains)


def _along(tree: Tree, chains: np.ndarray, depth: int) -> np.ndarray:
    """The distributions that are met along each chain, `[cases, chains, depth, vocab]`."""
    root = np.repeat(tree[0][:, None], len(chains), axis=1)
    return np.stack([root, *(tree[d][(slice(None), *chains[:, :d].T)] for d in range(1, depth))], axis=2)


def _output_law(verifier: AbstractVerifier, target: Tree, draft: Tree | None, length: int) -> np.ndarray:
    """The joint law of the first `length + 1` tokens, `[cases, vocab, ..., vocab]`.

    With point masses (`draft` is `None`) there is one law for each chain, `[chains * cases, ...]`: each chain is a
    draft of its own.
    """
    cases, vocab = target[0].shape
    chains = np.array(list(it.product(range(vocab), repeat=length)), np.int32)
    target_logits = _along(target, chains, length + 1)
    draft_logits = None if draft is None else _along(draft, chains, length)
    survival, weights = _enumerate(verifier, target_logits, draft_logits, chains)
    survival, weights = np.asarray(survival, np.float64), np.asarray(weights, np.float64)

    if draft is None:
        chain_probs = np.ones((cases, len(chains)))
    else:
        chain_probs = _joint(draft, length).reshape(cases, -1)
    law = np.zeros((cases, len(chains), *[vocab] * (length + 1)))
    for case, index in it.product(range(cases), range(len(chains))):
        if chain_probs[case, index] == 0:
            continue  # never drafted: what a verifier makes of it does not matter
        chain = tuple(chains[index])
        at_least = np.concatenate([[1.0], survival[case, index], [0.0]])
        for num in range(length + 1):
            prob = chain_probs[case, index] * (at_least[num] - at_least[num + 1])
            assert prob > -1e-6, "survival increases, by more than rounding"
            if prob <= 0:
                continue
            emitted = prob * weights[case, index, num] / weights[case, index, num].sum()
            for logits in target[num + 1 :]:
                emitted = emitted[..., None] * _probs(logits[(case, *chain[:num])])
            law[(case, index, *chain[:num])] += emitted
    if draft is None:
        return law.reshape(-1, *law.shape[2:])
    return law.sum(1)


def _error(verifier: AbstractVerifier, target: Tree, draft: Tree | None, length: int) -> float:
    """The largest difference between the law of the output and the target's."""
    law, expected = _output_law(verifier, target, draft, length), _joint(target, length + 1)
    if draft is None:
        expected = np.repeat(expected, expected.shape[-1] ** length, axis=0)
    return np.abs(law - expected).max()


_VOCAB = {1: 5, 2: 4, 3: 3}


@ft.cache
def _situations(length: int) -> tuple[Tree, Tree]:
    """Targets and drafts of every kind, stacked into one batch of cases."""
    rng, vocab = np.random.default_rng(length), _VOCAB[length]

    def tree(scale):
        return _random_tree(rng, 1, vocab, length + 1, scale)

    diffuse, sharp = tree(0.7), tree(6.0)
    slightly_off = [logits + 1e-4 * rng.standard_normal(logits.shape).astype(np.float32) for logits in diffuse]
    some, others = list(range(vocab // 2)), list(range(vocab // 2, vocab))
    top_k, top_p, greedy = Sampling(0.8, top_k=2), Sampling(1.3, top_p=0.7), GreedySampling()
    pairs = {
        "diffuse, diffuse": (diffuse, tree(0.7)),
        "sharp, diffuse": (sharp, diffuse),
        "diffuse, sharp": (diffuse, sharp),
        "sharp, sharp": (sharp, tree(6.0)),
        "top-k, whole": (_transform(diffuse, top_k), tree(1.0)),
        "top-p, whole": (_transform(diffuse, top_p), tree(1.0)),
        "whole, top-k": (tree(1.0), _transform(tree(1.0), top_k)),
        "top-k, top-k": (_transform(diffuse, top_k), _transform(tree(1.0), top_k)),
        "top-p, top-p": (_transform(diffuse, top_p), _transform(tree(1.0), top_p)),
        "top-p, greedy": (_transform(diffuse, top_p), _transform(tree(1.0), greedy)),
        "greedy, whole": (_transform(diffuse, greedy), tree(1.0)),
        "equal": (diffuse, diffuse),
        "equal, with zeros": (_transform(diffuse, top_k), _transform(diffuse, top_k)),
        "nearly equal": (diffuse, slightly_off),
        "disjoint supports": (_only(diffuse, some), _only(diffuse, others)),
    }
    target, draft = (
        [np.concatenate(x) for x in zip(*trees, strict=True)] for trees in zip(*pairs.values(), strict=True)
    )
    return target, draft


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("verifier", LOSSLESS, ids=verifier_name)
def test_the_output_law_is_the_targets(verifier, length):
    target, draft = _situations(length)
    assert _error(verifier, target, draft, length) < 1e-6


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_output_law_is_the_targets_for_point_masses(length):
    target, _ = _situations(length)
    assert _error(Rejection(), target, None, length) < 1e-6


@pytest.mark.parametrize("point_mass", [False, True])
@pytest.mark.parametrize("verifier", GREEDY, ids=verifier_name)
def test_the_output_law_of_a_greedy_target_is_one_sequence(verifier, point_mass):
    length = 2
    target, draft = _situations(length)
    target, draft = _transform(target, GreedySampling()), None if point_mass else draft
    assert set(np.unique(_joint(target, length + 1))) == {0.0, 1.0}
    assert _error(verifier, target, draft, length) < 1e-6


@pytest.mark.parametrize("verifier", BROKEN, ids=verifier_name)
def test_enumeration_catches_broken_verifiers(verifier):
    length = 2
    target, draft = _situations(length)
    diffuse = [logits[:1] for logits in target]
    assert _error(verifier, diffuse, [logits[:1] for logits in draft], length) > 1e-3


def test_enumeration_catches_broken_verifiers_with_point_masses():
    length = 2
    target, _ = _situations(length)
    caught = {verifier_name(verifier): _error(verifier, target, None, length) > 1e-3 for verifier in BROKEN}
    # A point mass has no distribution whose drawn token a cut-off could look at.
    assert caught == {name: name != verifier_name(CutOff(0.3, True)) for name in caught}


def test_the_cut_offs_do_cut():
    """Both the lossless and the broken one: else they would prove nothing."""
    _, draft = _situations(2)
    root = _probs(draft[0])
    for verifier in (*LOSSLESS, *BROKEN):
        if isinstance(verifier, CutOff):
            looked_at = root if verifier.look_at_token else root.max(-1)
            assert 0.1 < np.mean(looked_at > verifier.threshold) < 0.95


def test_acceptance_is_one_minus_total_variation():
    """The best any rule can do at the first position; a rule that rejects more would be lossless and slow."""
    target, draft = _situations(1)
    chains = np.arange(_VOCAB[1], dtype=np.int32)[:, None]
    survival, _ = _enumerate(Rejection(), _along(target, chains, 2), _along(draft, chains, 1), chains)
    p, q = _probs(target[0]), _probs(draft[0])
    accepted = np.where(q > 0, q * np.asarray(survival[..., 0], np.float64), 0.0).sum(-1)
    np.testing.assert_allclose(accepted, np.minimum(p, q).sum(-1), atol=1e-6)


def test_verify_draws_by_survival_and_next_weights(getkey):
    """The enumeration speaks of the law; this ties what `verify` draws to the law. Chi-square with a fixed key."""
    verifier, draws, length = Rejection(), 20000, 3
    with np.errstate(divide="ignore"):
        target_logits = np.log(np.array([[4, 3, 2, 1], [0, 5, 3, 2], [1, 2, 3, 4], [2, 3, 4, 1]], np.float32))
        draft_logits = np.log(np.array([[6, 2, 1, 1], [2, 1, 5, 2], [2, 1, 1, 6]], np.float32))
    chain = jnp.array([0, 2, 3], jnp.int32)

    @jax.jit
    def run(keys):
        target = Categorical.from_logits(jnp.asarray(target_logits))
        proposal = Proposal(chain, Categorical.from_logits(jnp.asarray(draft_logits)))
        verdict = jax.vmap(lambda key: verifier.verify(target, proposal, key, jnp.int32(0)))(keys)
        weights = jax.vmap(lambda num: verifier.next_weights(target, proposal, num))(jnp.arange(length + 1))
        return verdict, verifier.survival(target, proposal), weights

    verdict, survival, weights = run(jr.split(getkey(), draws))
    at_least = np.concatenate([[1.0], survival, [0.0]])
    weights = np.asarray(weights, np.float64)
    expected = (at_least[:-1] - at_least[1:])[:, None] * weights / weights.sum(-1, keepdims=True)
    assert np.sum(expected > 0.01) >= 8 and np.all(expected.sum(-1) > 0.05)
    counts = np.zeros_like(expected)
    np.add.at(counts, (np.asarray(verdict.num_accepted), np.asarray(verdict.next_token)), 1)
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], draws * expected[expected > 0]
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3
