"""Losslessness, first tier: what `check_verifier` proves of our verifiers, and that it sees through the broken ones."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    BROKEN,
    GREEDY,
    LOSSLESS,
    CutOff,
    NoFallback,
    NoiseOfTheRound,
    NoiseOfTheRow,
    Opaque,
    quick_compilation,
)

from eqx_specgrpo.decoding import Block, Coupled, Rejection
from eqx_specgrpo.drafts import Proposal
from eqx_specgrpo.sampling import Categorical
from eqx_specgrpo.testing import ConformanceError, OneOf, check_verifier, verifier_name
from eqx_specgrpo.testing._enumerate import enumerate_rounds
from eqx_specgrpo.testing._situations import joint_law, situations, softmax
from eqx_specgrpo.testing._statistics import chi_square_p_value, law_p_value, uniform_p_value

# One program for all.
RULES = (*LOSSLESS, *GREEDY[1:], *BROKEN, NoFallback())


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def _one(rule) -> OneOf:
    return OneOf(RULES, next(i for i, other in enumerate(RULES) if type(other) is type(rule) and other == rule))


@pytest.mark.parametrize("rule", LOSSLESS, ids=verifier_name)
def test_our_rules_keep_the_law(rule):
    report = check_verifier(_one(rule))
    assert report.name == type(rule).__name__ and not report.draft_invariant
    assert 0 < report.law_error < 1e-6 and report.num_laws > 600
    if isinstance(rule, Rejection | Block):  # as often as any rule can
        assert report.acceptance == pytest.approx(report.optimal_acceptance, abs=1e-6)
    else:
        assert 0.1 < report.acceptance < report.optimal_acceptance - 0.01


@pytest.mark.parametrize("rule", GREEDY, ids=verifier_name)
def test_a_greedy_targets_law_is_one_sequence(rule):
    report = check_verifier(_one(rule), greedy_only=True)
    assert report.law_error < 1e-6 and report.draft_invariant and report.p_value > 0.1


def test_greedy_match_is_for_greedy_targets_alone():
    with pytest.raises(ConformanceError, match="GreedyMatch, .* the law of the output is off by"):
        check_verifier(_one(GREEDY[1]))


@pytest.mark.parametrize("rule", BROKEN, ids=verifier_name)
def test_enumeration_catches_broken_rules(rule):
    with pytest.raises(ConformanceError, match=f"{verifier_name(rule)}, .* drafted: the law of the output is off by"):
        check_verifier(_one(rule), lengths=(2,))


def test_sums_over_the_drafts_tokens_are_those_over_the_vocabulary():
    """Drafts of a few hundred tokens, against the same distributions spread out; far from the target and next to it."""
    rng, vocab, size, length = np.random.default_rng(5), 3000, 200, 4
    ids = jnp.asarray([rng.permutation(vocab)[:size] for _ in range(length)], jnp.int32)
    logits = rng.normal(0, 1, (length + 1, vocab))
    logits[np.arange(length)[:, None], ids] += 4
    target = Categorical.from_logits(jnp.asarray(logits, jnp.float32))
    for noise in (1.0, 1e-4):
        of_draft = np.take_along_axis(logits[:length], np.asarray(ids), 1) + noise * rng.normal(0, 1, ids.shape)
        draft = Categorical.from_logits(jnp.asarray(of_draft, jnp.float32))
        draft = Categorical(draft.logits, draft.log_normalizer, ids)
        tokens = draft.sample(jnp.asarray(rng.random(length), jnp.float32)).astype(jnp.int32)
        few, all_of_them = Proposal(tokens, draft), Proposal(tokens, draft.dense(vocab))
        survival = Block().survival(target, few)
        np.testing.assert_allclose(survival, Block().survival(target, all_of_them), atol=1e-6)
        assert 0.01 < float(survival[-1]) < 0.99


def test_a_report_without_chains_of_one_token_has_acceptances_too():
    report = check_verifier(_one(Rejection()), lengths=(2,))
    assert 0 < report.acceptance <= report.optimal_acceptance + 0.02


def test_enumeration_catches_an_all_zero_residual():
    """Where target and draft are equal to the last bit a rejection has no probability; after rounding it may."""
    with pytest.raises(ConformanceError, match="no next token can be drawn .* fall back to the target"):
        check_verifier(_one(NoFallback()), lengths=(2,))


@pytest.mark.parametrize("rule", BROKEN, ids=verifier_name)
def test_draws_alone_catch_them_too(rule):
    with pytest.raises(ConformanceError, match="Opaque, .* do not have the target's law"):
        check_verifier(Opaque(_one(rule)), lengths=(2,))


def test_draws_alone_let_a_right_rule_pass():
    report = check_verifier(Opaque(_one(Rejection())), lengths=(2,))
    assert report.law_error is None and not report.draft_invariant
    assert report.acceptance == pytest.approx(report.optimal_acceptance, abs=0.02)


def test_coupled_is_draft_invariant_and_has_the_law():
    report = check_verifier(Coupled(), draft_invariant=True)
    assert report.draft_invariant and report.law_error is None
    assert str(report).startswith("Coupled passed every check: it keeps the target's distribution.\n")
    assert 0.4 < report.acceptance < report.optimal_acceptance


def test_couplings_that_are_none_are_caught():
    with pytest.raises(ConformanceError, match="said to be draft-invariant, but is not.*plain decoding says"):
        check_verifier(NoiseOfTheRound(), draft_invariant=True)
    assert not check_verifier(NoiseOfTheRound(), lengths=(2,)).draft_invariant  # lossless, not a coupling
    with pytest.raises(ConformanceError, match="do not have the target's law"):
        check_verifier(NoiseOfTheRow(), lengths=(2,))


def test_broken_rules_and_point_masses():
    """A point mass has no distribution whose drawn token a cut-off could look at; the others stay broken."""
    length, cases = 2, situations(2)
    caught = {}
    for rule in BROKEN:
        outcome = enumerate_rounds(_one(rule), cases.target, None, length, cases.names)
        caught[verifier_name(rule)] = outcome.errors.max() > 1e-3
    assert caught == {name: name != "CutOff" for name in caught}


def test_the_situations_are_what_they_are_called():
    cases = situations(2)
    target, draft = (
        dict(zip(cases.names, map(softmax, tree[0][:, None]), strict=True)) for tree in (cases.target, cases.draft)
    )
    for name in cases.names:
        np.testing.assert_allclose(target[name].sum(), 1.0)
    assert (target["top-k target, top-k draft"] > 0).sum() == 2
    assert (target["disjoint supports"] * draft["disjoint supports"]).sum() == 0
    np.testing.assert_array_equal(target["equal target and draft"], draft["equal target and draft"])
    assert set(np.unique(joint_law(cases.target, 3)[cases.names.index("greedy target, whole draft")])) == {0.0, 1.0}


def test_the_cut_offs_do_cut():
    """Both the lossless and the broken one: else they would prove nothing."""
    root = softmax(situations(2).draft[0])
    for rule in (*LOSSLESS, *BROKEN):
        if isinstance(rule, CutOff):
            looked_at = root if rule.look_at_token else root.max(-1)
            assert 0.1 < np.mean(looked_at > rule.threshold) < 0.95


def test_the_statistics_themselves():
    rng, law = np.random.default_rng(0), np.array([[0.4, 0.1], [0.2, 0.3]])
    draws = rng.choice(4, 4000, p=law.ravel())
    tokens = np.stack([draws // 2, draws % 2], axis=1)
    assert law_p_value(tokens, law) > 1e-3
    assert law_p_value(tokens, law.T) < 1e-9
    assert law_p_value(tokens, np.array([[0.4, 0.0], [0.2, 0.4]])) == 0.0
    # By hand: (60 - 50)^2 / 50 + (40 - 50)^2 / 50 = 4, and P(chi^2_1 > 4) = 0.0455.
    assert chi_square_p_value(np.array([60.0, 40.0]), np.array([50.0, 50.0])) == pytest.approx(0.0455, abs=1e-4)
    points = rng.uniform(size=(4000, 2))
    assert uniform_p_value(points, 4) > 1e-3
    assert uniform_p_value(np.stack([points[:, 0], points[:, 0]], axis=1), 4) < 1e-9


def test_bad_lengths_get_a_sentence():
    with pytest.raises(ValueError, match="not 4: longer chains take too long"):
        check_verifier(Rejection(), lengths=(4,))
    assert jnp.asarray(OneOf((Rejection(),), 0).index) == 0
