"""How far a draft is from the target: pure functions of two arrays of logits.

The target `p` and the draft `q` are the softmax of logits to which the sampling transform (temperature, and truncation
if any) has already been applied, the same for both. The target is a constant in every function here. A logit of `-inf`
rules a token out.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float


def forward_kl(
    target_logits: Float[Array, "*shape vocab"], draft_logits: Float[Array, "*shape vocab"]
) -> Float[Array, "*shape"]:
    """`sum p log(p/q)`. Gradient with respect to the draft's logits: `q - p`, the same as soft cross-entropy's.

    Infinite where the draft rules out what the target does not.
    """
    return _kl(_target_logprobs(target_logits), _draft_logprobs(draft_logits))


def sayable(
    target_logits: Float[Array, "*shape vocab"], draft_logits: Float[Array, "*shape vocab"]
) -> Float[Array, "*shape vocab"]:
    """The target's logits without the tokens that the draft rules out, so that a KL to it is finite: the target's
    distribution given that the draft could have said the token."""
    return jnp.where(lax.stop_gradient(draft_logits) > -jnp.inf, target_logits, -jnp.inf)


def reverse_kl(
    target_logits: Float[Array, "*shape vocab"], draft_logits: Float[Array, "*shape vocab"]
) -> Float[Array, "*shape"]:
    """`sum q log(q/p)`. Gradient with respect to the draft's logits: `q (log(q/p) - reverse_kl)`.

    Infinite where the target rules out what the draft does not.
    """
    return _kl(_draft_logprobs(draft_logits), _target_logprobs(target_logits))


def total_variation(
    target_logits: Float[Array, "*shape vocab"], draft_logits: Float[Array, "*shape vocab"]
) -> Float[Array, "*shape"]:
    """`1 - sum min(p, q)`: the probability that a drafted token is rejected.

    With `s = sign(q - p)`, its gradient with respect to the draft's logits is `q (s - E_q s) / 2`: nearly zero as
    long as the two hardly overlap, so it trains only a draft that is already aligned.

    ??? cite

        Leviathan et al., [arXiv:2211.17192](https://arxiv.org/abs/2211.17192).
    """
    target_probs = jnp.exp(_target_logprobs(target_logits))
    draft_probs = jnp.exp(_draft_logprobs(draft_logits))
    # Half the sum of differences rather than 1 minus the overlap: exact to rounding also where the two nearly agree.
    return jnp.sum(jnp.abs(target_probs - draft_probs), axis=-1) / 2


def expected_acceptance(
    target_logits: Float[Array, "*shape vocab"], draft_logits: Float[Array, "*shape vocab"]
) -> Float[Array, "*shape"]:
    """`sum min(p, q)`: the probability that rejection sampling accepts a token that the draft has sampled."""
    return jnp.sum(
        jnp.exp(jnp.minimum(_target_logprobs(target_logits), _draft_logprobs(draft_logits))),
        axis=-1,
    )


def confidence_loss(
    confidence_logits: Float[Array, "*shape"], acceptance: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Binary cross-entropy of a draft's confidence with the acceptance that is expected, which is a constant. It is
    least where the confidence is the acceptance.

    **Arguments:**

    - `confidence_logits`: see `AbstractDraft.train_confidence`.
    - `acceptance`: see [`eqx_specgrpo.distill.expected_acceptance`][].
    """
    logits = confidence_logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - lax.stop_gradient(acceptance) * logits


def log_acceptance(
    target_logits: Float[Array, "*shape vocab"], draft_logits: Float[Array, "*shape vocab"]
) -> Float[Array, "*shape"]:
    """`-log sum min(p, q)` ("LK-alpha"): its gradient is the total variation's over the acceptance.

    So it is not weak where the two hardly overlap, and trains a draft from scratch.
    """
    return -jax.nn.logsumexp(jnp.minimum(_target_logprobs(target_logits), _draft_logprobs(draft_logits)), axis=-1)


def lk_hybrid(
    target_logits: Float[Array, "*batch draft vocab"],
    draft_logits: Float[Array, "*batch draft vocab"],
    alpha: Float[Array, " draft"],
    eta: Float[ArrayLike, ""] = 10.0,
) -> Float[Array, "*batch draft"]:
    """`lam KL + (1 - lam) TV` with `lam = exp(-eta alpha)` ("LK-lambda").

    From the forward KL where the draft is poor, to the rejection probability itself where it is good; each draft
    position goes at its own pace. The KL is that of what the draft can say, see [`eqx_specgrpo.distill.sayable`][]; the
    variation is that of all.

    **Arguments:**

    - `target_logits`, `draft_logits`: see above.
    - `alpha`: mean acceptance of each draft position over the batch; a constant.
    - `eta`: how soon the total variation takes over.
    """
    weight = jnp.exp(-jnp.asarray(eta, jnp.float32) * lax.stop_gradient(alpha.astype(jnp.float32)))
    divergence = forward_kl(sayable(target_logits, draft_logits), draft_logits)
    weight = jnp.broadcast_to(weight, divergence.shape)
    return weight * divergence + (1 - weight) * total_variation(target_logits, draft_logits)


def _target_logprobs(logits: Float[Array, "*shape vocab"]) -> Float[Array, "*shape vocab"]:
    return jax.nn.log_softmax(lax.stop_gradient(logits).astype(jnp.float32), axis=-1)


def _draft_logprobs(logits: Float[Array, "*shape vocab"]) -> Float[Array, "*shape vocab"]:
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _kl(logprobs: Float[Array, "*shape vocab"], other_logprobs: Float[Array, "*shape vocab"]) -> Float[Array, "*shape"]:
    # What has no probability contributes 0. It is taken out before the product: 0 times infinity would be NaN.
    possible = logprobs > -jnp.inf
    difference = jnp.where(possible, logprobs, 0.0) - jnp.where(possible, other_logprobs, 0.0)
    return jnp.sum(jnp.exp(logprobs) * difference, axis=-1)
