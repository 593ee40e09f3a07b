import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_specgrpo.distill import (
    CrossEntropyTV,
    EndToEndTV,
    ForwardKL,
    LKHybrid,
    ReverseKL,
    TotalVariation,
    expected_acceptance,
    forward_kl,
    lk_hybrid,
    log_acceptance,
    reverse_kl,
    total_variation,
)

LOSSES = [ForwardKL(), ReverseKL(), TotalVariation(), LKHybrid(), LKHybrid(eta=3.0), EndToEndTV(), CrossEntropyTV()]

# By hand: p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2), which overlap in 3/4.
TARGET = jnp.log(jnp.array([0.5, 0.25, 0.25])) + 3.0  # logits are free up to a constant
DRAFT = jnp.log(jnp.array([0.25, 0.25, 0.5])) - 2.0


def sums_and_gradient(loss, target, draft, mask, alpha):
    def total(draft):
        losses, acceptances = loss(target, draft, mask, alpha)
        return losses.sum(), (losses, acceptances)

    (_, sums), gradient = jax.value_and_grad(total, has_aux=True)(draft)
    return *sums, gradient


def test_values_by_hand():
    kl = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert forward_kl(TARGET, DRAFT) == pytest.approx(kl, abs=1e-6)
    assert reverse_kl(TARGET, DRAFT) == pytest.approx(kl, abs=1e-6)  # symmetric in this example
    assert total_variation(TARGET, DRAFT) == pytest.approx(0.25, abs=1e-6)
    assert expected_acceptance(TARGET, DRAFT) == pytest.approx(0.75, abs=1e-6)
    assert log_acceptance(TARGET, DRAFT) == pytest.approx(-math.log(0.75), abs=1e-6)
    weight = math.exp(-2 * 0.5)
    hybrid = lk_hybrid(TARGET[None], DRAFT[None], jnp.array([0.5]), 2.0)
    assert hybrid[0] == pytest.approx(weight * kl + (1 - weight) * 0.25, abs=1e-6)
    one, everything = (jnp.broadcast_to(x, (1, 1, 3)) for x in (TARGET, DRAFT)), jnp.ones((1, 1), bool)
    mixed, acceptance = CrossEntropyTV()(*one, everything, jnp.zeros(1))
    assert mixed[0] == pytest.approx(0.1 * kl + 0.9 * 0.25, abs=1e-6) and acceptance[0] == pytest.approx(0.75)


def test_asymmetric_kl_by_hand():
    target, draft = jnp.log(jnp.array([0.9, 0.1])), jnp.log(jnp.array([0.5, 0.5]))
    assert forward_kl(target, draft) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6)
    assert reverse_kl(target, draft) == pytest.approx(-0.5 * math.log(1.8) - 0.5 * math.log(0.2), abs=1e-6)


def test_gradients_have_their_closed_forms(getkey):
    target = jr.normal(getkey(), (4, 3, 11)) * 2
    draft = jr.normal(getkey(), (4, 3, 11)) * 2
    alphas = jnp.array([0.1, 0.5, 0.9])
    losses = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "total_variation": total_variation,
        "expected_acceptance": expected_acceptance,
        "log_acceptance": log_acceptance,
        "lk_hybrid": lambda t, d: lk_hybrid(t, d, alphas, 3.0),
        "ce_tv": lambda t, d: CrossEntropyTV().position_losses(t, d, jnp.ones((4, 3), bool), alphas),
    }

    @jax.jit
    def gradients(target, draft):
        return {
            name: jax.grad(lambda t, d, f=f: f(t, d).sum(), argnums=(0, 1))(target, draft) for name, f in losses.items()
        }

    def softmax(x):
        x = np.exp(np.asarray(x, np.float64))
        return x / x.sum(-1, keepdims=True)

    p, q = softmax(target), softmax(draft)
    sign = np.sign(q - p)
    tv = q * (sign - (q * sign).sum(-1, keepdims=True)) / 2
    log_ratio = np.log(q / p)
    weight = np.exp(-3.0 * np.array([0.1, 0.5, 0.9]))[None, :, None]
    closed_forms = {
        "forward_kl": q - p,
        "reverse_kl": q * (log_ratio - (q * log_ratio).sum(-1, keepdims=True)),
        "total_variation": tv,
        "expected_acceptance": -tv,
        "log_acceptance": tv / np.minimum(p, q).sum(-1, keepdims=True),
        "lk_hybrid": weight * (q - p) + (1 - weight) * tv,
        "ce_tv": 0.1 * (q - p) + 0.9 * tv,
    }
    for name, (to_target, to_draft) in gradients(target, draft).items():
        np.testing.assert_allclose(to_draft, closed_forms[name], atol=2e-6, err_msg=name)
        np.testing.assert_array_equal(to_target, 0.0, err_msg=name)
        assert np.abs(closed_forms[name]).max() > 0.01


def test_equal_distributions():
    for loss in (forward_kl, reverse_kl, total_variation, log_acceptance):
        value, gradient = jax.value_and_grad(loss, argnums=1)(TARGET, TARGET + 1.0)
        assert value == pytest.approx(0.0, abs=1e-6)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_ruled_out_tokens():
    """Truncation writes -inf into the logits of both; neither value nor gradient may be NaN."""
    target = TARGET.at[1].set(-jnp.inf)
    draft = DRAFT.at[1].set(-jnp.inf)
    short_target, short_draft = TARGET[jnp.array([0, 2])], DRAFT[jnp.array([0, 2])]
    for loss in (forward_kl, reverse_kl, total_variation, log_acceptance, expected_acceptance):
        value, gradient = jax.value_and_grad(loss, argnums=1)(target, draft)
        short_value, short_gradient = jax.value_and_grad(loss, argnums=1)(short_target, short_draft)
        assert value == pytest.approx(float(short_value), abs=1e-6)
        np.testing.assert_allclose(gradient[jnp.array([0, 2])], short_gradient, atol=1e-6)
        assert gradient[1] == 0
    # The draft may propose what the target rules out: forward KL, TV and acceptance stay finite.
    for loss in (forward_kl, total_variation, log_acceptance):
        value, gradient = jax.value_and_grad(loss, argnums=1)(target, DRAFT)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    assert jnp.isposinf(reverse_kl(target, DRAFT))
    assert jnp.isposinf(forward_kl(TARGET, draft))


def test_log_acceptance_is_finite_where_the_overlap_underflows():
    target, draft = jnp.array([200.0, 0.0]), jnp.array([0.0, 200.0])
    value, gradient = jax.value_and_grad(log_acceptance, argnums=1)(target, draft)
    assert expected_acceptance(target, draft) == 0
    assert value == pytest.approx(200 - math.log(2), rel=1e-5)
    assert jnp.isfinite(gradient).all() and gradient[0] < -0.4  # the target's token is pushed up


def test_end_to_end_by_hand():
    target = jnp.broadcast_to(TARGET, (1, 3, 3))
    draft = jnp.stack([DRAFT, TARGET, DRAFT])[None]  # acceptances 3/4, 1, 3/4
    losses, acceptances = EndToEndTV()(target, draft, jnp.ones((1, 3), bool), jnp.zeros(3))
    np.testing.assert_allclose(losses, [0.25, 0.25, 1 - 9 / 16], atol=1e-6)
    np.testing.assert_allclose(acceptances, [0.75, 1, 0.75], atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_objects(loss, getkey):
    positions, draft_length, vocab = 5, 3, 7
    target = jr.normal(getkey(), (positions, draft_length, vocab))
    draft = jr.normal(getkey(), (positions, draft_length, vocab))
    alpha = jnp.array([0.3, 0.2, 0.1])
    # As at the end of completions: later draft positions run out first.
    mask = jnp.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)

    @jax.jit
    def run(draft, target, mask):
        return sums_and_gradient(loss, target, draft, mask, alpha)

    losses, acceptances, gradient = run(draft, target, mask)
    # Sums over chunks are the sum over all.
    first, second = run(draft[:2], target[:2], mask[:2]), run(draft[2:], target[2:], mask[2:])
    np.testing.assert_allclose(losses, first[0] + second[0], rtol=1e-5)
    np.testing.assert_allclose(acceptances, first[1] + second[1], rtol=1e-5)
    np.testing.assert_allclose(gradient, jnp.concatenate([first[2], second[2]]), atol=1e-6)
    expected = jnp.where(mask, expected_acceptance(target, draft), 0).sum(0)
    np.testing.assert_allclose(acceptances, expected, rtol=1e-5)
    # What does not count may hold anything, and gets no gradient.
    for garbage in (jnp.nan, jnp.inf, -jnp.inf, 1e30):
        spoiled = run(jnp.where(mask[..., None], draft, garbage), jnp.where(mask[..., None], target, garbage), mask)
        for clean, dirty in zip((losses, acceptances, gradient), spoiled, strict=True):
            np.testing.assert_array_equal(clean, dirty)
    assert (jnp.where(mask[..., None], 0, gradient) == 0).all()
    assert jnp.abs(gradient[0]).min() > 0
    # An empty mask is zero, not NaN.
    for x in run(draft, target, jnp.zeros_like(mask)):
        np.testing.assert_array_equal(x, 0)


def test_objects_are_the_functions(getkey):
    target, draft = jr.normal(getkey(), (4, 2, 9)), jr.normal(getkey(), (4, 2, 9))
    mask, alpha = jnp.ones((4, 2), bool), jnp.array([0.4, 0.2])
    pairs = [
        (ForwardKL(), forward_kl(target, draft)),
        (ReverseKL(), reverse_kl(target, draft)),
        (TotalVariation(), total_variation(target, draft)),
        (LKHybrid(), lk_hybrid(target, draft, alpha, 10.0)),
        (LKHybrid(eta=0.0), forward_kl(target, draft)),
        (LKHybrid(eta=1e4), total_variation(target, draft)),
    ]
    for loss, expected in pairs:
        np.testing.assert_allclose(loss(target, draft, mask, alpha)[0], expected.sum(0), rtol=1e-5)


def test_bfloat16_logits_are_computed_in_float32(getkey):
    target = jr.normal(getkey(), (4, 2, 300)).astype(jnp.bfloat16)
    draft = jr.normal(getkey(), (4, 2, 300)).astype(jnp.bfloat16)
    args = jnp.ones((4, 2), bool), jnp.zeros(2)
    for loss in LOSSES:
        sums = loss(target, draft, *args)
        exact = loss(target.astype(jnp.float32), draft.astype(jnp.float32), *args)
        for got, expected in zip(sums, exact, strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("loss", [ForwardKL(), TotalVariation(), LKHybrid(eta=3.0)], ids=["kl", "tv", "hybrid"])
def test_descent_raises_acceptance(loss, getkey):
    """The sign of each gradient is right: 100 steps downhill bring the draft to the target."""
    target = jr.normal(getkey(), (6, 2, 5))
    mask = jnp.ones((6, 2), bool)

    @jax.jit
    def step(draft, alpha):
        _, acceptances, gradient = sums_and_gradient(loss, target, draft, mask, alpha)
        return draft - 0.5 * gradient, acceptances / 6

    draft, alpha = jr.normal(getkey(), (6, 2, 5)), jnp.zeros(2)
    draft, first = step(draft, alpha)
    alpha = first
    for _ in range(100):
        draft, alpha = step(draft, alpha)
    assert (alpha > first + 0.1).all() and (alpha > 0.9).all()


def test_negative_eta_is_refused():
    with pytest.raises(ValueError, match="eta is -1.0"):
        LKHybrid(eta=-1.0)
