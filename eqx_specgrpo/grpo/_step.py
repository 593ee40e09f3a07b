"""One optimizer step of the policy, in pieces that the loop puts together."""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PyTree

from ..errors import UserError
from ..models import (
    AbstractLanguageModel,
    AdaptedTransformer,
    Adapters,
    Features,
    Transformer,
    cast_weights,
    with_low_rank_gradients,
)
from ..sampling import as_temperature
from ._batch import UpdateBatch
from ._forward import training_features
from ._kl import KLEstimator
from ._logprobs import chunked_logprobs
from ._metrics import PolicyLossMetrics
from ._policy_loss import policy_loss
from .losses import DAPO, AbstractPolicyLoss, Level, LossNormalizer


class NonFiniteError(UserError):
    """A loss or gradient that is not a finite number. The weights have not been touched."""


Module = TypeVar("Module")


def _array(x: ArrayLike) -> Array:
    return jnp.asarray(x, jnp.float32)


def _optional_array(x: ArrayLike | None) -> Array | None:
    return None if x is None else _array(x)


class LossSettings(eqx.Module):
    """How the loss is computed. Numbers are arrays, so that schedules do not recompile; names and sizes are static.

    **Arguments:** see [`eqx_specgrpo.grpo.policy_loss`][] and [`eqx_specgrpo.grpo.chunked_logprobs`][]; besides,

    - `entropy_bonus`: whether the loss has one, however small `entropy_coef` may be at the moment.
    - `layers`: the target's layers whose outputs the draft will want to learn from.
    - `gradient_checkpointing`: see [`eqx_specgrpo.grpo.training_features`][].
    """

    temperature: Float[Array, ""] = eqx.field(converter=as_temperature, default=1.0)
    loss: AbstractPolicyLoss = eqx.field(default_factory=DAPO)
    beta: Float[Array, ""] = eqx.field(converter=_array, default=0.0)
    off_policy_mask_threshold: Float[Array, ""] | None = eqx.field(converter=_optional_array, default=None)
    entropy_coef: Float[Array, ""] = eqx.field(converter=_array, default=0.0)
    importance_sampling_level: Level = eqx.field(static=True, default="token")
    kl_estimator: KLEstimator = eqx.field(static=True, default="k3")
    use_bias_correction_kl: bool = eqx.field(static=True, default=True)
    entropy_bonus: bool = eqx.field(static=True, default=False)
    chunk: int = eqx.field(static=True, default=512)
    layers: tuple[int, ...] = eqx.field(static=True, default=())
    gradient_checkpointing: bool = eqx.field(static=True, default=False)


class PolicyGradients(eqx.Module):
    """What one or several micro-batches contribute to a step; add them up.

    **Arguments:**

    - `gradients`: float32, shaped like the policy; `None` where they were not computed, because they are 0.
    - `loss`: the share of the step's loss.
    - `metrics`: sums.
    - `entropy_sum`: of the sampling distribution over the counted tokens, nats.
    """

    gradients: PyTree | None
    loss: Float[Array, ""]
    metrics: PolicyLossMetrics
    entropy_sum: Float[Array, ""]

    @eqx.filter_jit(donate="all")
    def __add__(self, other: "PolicyGradients") -> "PolicyGradients":
        return PolicyGradients(
            _sum_of_those_there(self.gradients, other.gradients),
            self.loss + other.loss,
            self.metrics + other.metrics,
            self.entropy_sum + other.entropy_sum,
        )


def _sum_of_those_there(gradients: PyTree | None, others: PyTree | None) -> PyTree | None:
    if gradients is None or others is None:
        return others if gradients is None else gradients
    return jax.tree.map(jnp.add, gradients, others)


def _completion_logprobs(
    model: AbstractLanguageModel, batch: UpdateBatch, settings: LossSettings
) -> tuple[Float[Array, "rows new"], Float[Array, "rows new"], Features]:
    hidden, features = training_features(
        model, batch, layers=settings.layers, gradient_checkpointing=settings.gradient_checkpointing
    )
    rows, new = batch.completion_tokens.shape
    # Positions that count go first, so that only their logits are computed.
    mask = jnp.asarray(batch.completion_mask).reshape(-1)
    order = jnp.argsort(~mask, stable=True)
    support = jax.tree.map(lambda x: jnp.asarray(x).reshape(rows * new, *x.shape[2:])[order], batch.support)
    logprobs, entropies = chunked_logprobs(
        hidden.reshape(rows * new, -1)[order],
        jnp.asarray(batch.completion_tokens).reshape(-1)[order],
        model.unembed,
        settings.temperature,
        settings.chunk,
        differentiable_entropy=settings.entropy_bonus,
        count=mask.sum(),
        support=support,
    )
    back = jnp.argsort(order)
    return logprobs[back].reshape(rows, new), entropies[back].reshape(rows, new), features


@eqx.filter_jit
def policy_logprobs(
    model: AbstractLanguageModel, batch: UpdateBatch, settings: LossSettings
) -> Float[Array, "rows new"]:
    """Log-probabilities of the completions, without gradients: for a reference, or for a check.

    Only those of tokens that the mask counts are meant to be used.
    """
    return _completion_logprobs(model, batch, settings)[0]


@eqx.filter_jit
def policy_entropies(
    model: AbstractLanguageModel, batch: UpdateBatch, settings: LossSettings
) -> Float[Array, "rows new"]:
    """Entropies of the sampling distribution at the completions' tokens, nats, without gradients.

    Only those of tokens that the mask counts are meant to be used.
    """
    return _completion_logprobs(model, batch, settings)[1]


@eqx.filter_jit
def policy_gradients(
    model: AbstractLanguageModel,
    batch: UpdateBatch,
    normalizer: LossNormalizer,
    settings: LossSettings,
    *,
    feature_width: int | None = None,
    adapters: Adapters | None = None,
) -> tuple[PolicyGradients, Features]:
    """Loss and gradients of one micro-batch.

    The features of the forward come out with them, whether a draft wants them or not: the program that updates the
    policy is the same with a learning draft, a frozen one and none, and so are the bits of its result.

    **Arguments:**

    - `model`: the policy's copy in the dtype to compute in, see `models.cast_weights`.
    - `batch`: the micro-batch.
    - `normalizer`: counts of the whole step.
    - `settings`: of the loss.
    - `feature_width`: the features are padded to as many positions, so that those of micro-batches of unequal width can
        be put together.
    - `adapters`: those that were merged into `model`. Then the gradients are by them, and by nothing else.

    **Returns:**

    The gradients in float32, and the features of the whole sequences (before the update).
    """

    def loss_of(trained: PyTree) -> tuple[Float[Array, ""], tuple[PolicyLossMetrics, Float[Array, ""], Features]]:
        policy = trained
        if adapters is not None:
            assert isinstance(model, Transformer)
            policy = with_low_rank_gradients(model, trained)
        return _loss(policy, batch, normalizer, settings)

    (loss, (metrics, entropy_sum, features)), gradients = eqx.filter_value_and_grad(loss_of, has_aux=True)(
        model if adapters is None else adapters
    )
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    return PolicyGradients(gradients, loss, metrics, entropy_sum), _padded(features, feature_width)


@eqx.filter_jit
def policy_forward(
    model: AbstractLanguageModel,
    batch: UpdateBatch,
    normalizer: LossNormalizer,
    settings: LossSettings,
    *,
    feature_width: int | None = None,
) -> tuple[PolicyGradients, Features]:
    """As `policy_gradients`, for a micro-batch whose gradients are known to be 0
    ([`rows_with_gradient`][eqx_specgrpo.grpo.UpdateBatch.rows_with_gradient]): a third of the work, and `None` in place
    of gradients. Where that is so of a whole step, see [`eqx_specgrpo.grpo.no_gradients`][]."""
    loss, (metrics, entropy_sum, features) = _loss(model, batch, normalizer, settings)
    return PolicyGradients(None, loss, metrics, entropy_sum), _padded(features, feature_width)


def _loss(
    model: AbstractLanguageModel, batch: UpdateBatch, normalizer: LossNormalizer, settings: LossSettings
) -> tuple[Float[Array, ""], tuple[PolicyLossMetrics, Float[Array, ""], Features]]:
    logprobs, entropies, features = _completion_logprobs(model, batch, settings)

    def given(x: Array | np.ndarray | None) -> Array | None:
        return None if x is None else jnp.asarray(x)

    loss, metrics = policy_loss(
        logprobs,
        jnp.asarray(batch.old_logprobs),
        jnp.asarray(batch.advantages),
        jnp.asarray(batch.completion_mask),
        normalizer=normalizer,
        loss=settings.loss,
        importance_sampling_level=settings.importance_sampling_level,
        beta=settings.beta,
        reference_logprobs=given(batch.reference_logprobs),
        kl_estimator=settings.kl_estimator,
        use_bias_correction_kl=settings.use_bias_correction_kl,
        importance_weights=given(batch.importance_weights),
        off_policy_mask_threshold=settings.off_policy_mask_threshold,
        sampling_logprobs=given(batch.sampling_logprobs),
        entropy_mask=given(batch.entropy_mask),
        entropies=entropies if settings.entropy_bonus else None,
        entropy_coef=settings.entropy_coef,
    )
    entropy_sum = lax.stop_gradient(jnp.sum(jnp.where(batch.completion_mask, entropies, 0.0)))
    return loss, (metrics, entropy_sum, lax.stop_gradient(features))


def _padded(features: Features, width: int | None) -> Features:
    if width is None:
        return features
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0))), features)


@eqx.filter_jit
def no_gradients(model: PyTree) -> PyTree:
    """The gradients of a step none of whose rows has one: zeros in float32, shaped as those of `policy_gradients`."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), eqx.filter(model, eqx.is_inexact_array))


def check_finite(what: str, step: int, **values: Float[Array, ""] | np.ndarray) -> None:
    """Raises `NonFiniteError` if one of the values is not finite. Call it before the update is made."""
    for name, value in values.items():
        if not np.isfinite(np.asarray(value)):
            raise NonFiniteError(
                f"step {step}: the {what}'s {name} is {float(np.asarray(value))}. This update was not made. "
                "A lower learning rate or a smaller max_grad_norm usually helps; in bfloat16, try float32"
            )


@jax.jit
def global_norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean norm over all leaves."""
    return optax.tree.norm(tree)


@eqx.filter_jit(donate="all-except-first")
def apply_gradients(
    unchanged: tuple[optax.GradientTransformation, PyTree, Float[Array, ""]], params: PyTree, state: Any
) -> tuple[PyTree, Any]:
    """Moves the parameters. DONATES the parameters and the optimizer's state.

    **Arguments:**

    - `unchanged`: the optimizer, the gradients and the learning rate.
    - `params`: float32 master weights.
    - `state`: the optimizer's.
    """
    optimizer, gradients, learning_rate = unchanged
    updates, state = optimizer.update(gradients, state, eqx.filter(params, eqx.is_inexact_array))
    return eqx.apply_updates(params, jax.tree.map(lambda u: -learning_rate * u, updates)), state


def compute_copy(params: Module, dtype: str) -> Module:
    """The policy (or the draft) with its matrices in the dtype to compute in. Taken once a step.

    Of a policy with adapters these are the merged weights.
    """
    if isinstance(params, AdaptedTransformer):
        return params.merged(jnp.dtype(dtype))  # pyright: ignore[reportReturnType]: a language model for another
    return _cast(params, dtype)


@eqx.filter_jit
def _cast(params: Module, dtype: str) -> Module:
    return cast_weights(params, jnp.dtype(dtype))


def trained_part(policy: AbstractLanguageModel) -> PyTree:
    """What the optimizer moves, and a checkpoint keeps: the adapters if there are any, else the policy itself."""
    return policy.adapters if isinstance(policy, AdaptedTransformer) else policy


def with_trained_part(policy: AbstractLanguageModel, trained: PyTree) -> AbstractLanguageModel:
    """The inverse of `trained_part`."""
    return policy.with_adapters(trained) if isinstance(policy, AdaptedTransformer) else trained
