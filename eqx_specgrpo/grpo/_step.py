"""One optimizer step of the policy, in pieces that the loop puts together."""

import functools as ft
import operator
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PyTree

from ..errors import UserError
from ..layout import ROWS, WHOLE, AbstractDeviceMesh, Layout, OneDevice, at_use, value_and_gradients
from ..models import (
    AbstractLanguageModel,
    AdaptedTransformer,
    Adapters,
    Features,
    Transformer,
    are_factors,
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
    model: AbstractLanguageModel, batch: UpdateBatch, settings: LossSettings, mesh: AbstractDeviceMesh = OneDevice()
) -> Float[Array, "rows new"]:
    """Computes log-probabilities of the completions without gradients, for a reference or for a check.

    Only those of tokens that the mask counts are meant to be used.

    **Arguments:** as for [`eqx_specgrpo.grpo.policy_gradients`][].
    """
    return _of_tokens(model, batch, settings, mesh)[0]


@eqx.filter_jit
def policy_entropies(
    model: AbstractLanguageModel, batch: UpdateBatch, settings: LossSettings, mesh: AbstractDeviceMesh = OneDevice()
) -> Float[Array, "rows new"]:
    """Computes entropies (nats) of the sampling distribution at the completions' tokens, without gradients.

    Only those of tokens that the mask counts are meant to be used.

    **Arguments:** as for [`eqx_specgrpo.grpo.policy_gradients`][].
    """
    return _of_tokens(model, batch, settings, mesh)[1]


def _of_tokens(
    model: AbstractLanguageModel, batch: UpdateBatch, settings: LossSettings, mesh: AbstractDeviceMesh
) -> tuple[Float[Array, "rows new"], Float[Array, "rows new"]]:
    specs = mesh.data_specs(model, Layout.MASTER)

    def of_shard(model: AbstractLanguageModel, batch: UpdateBatch, settings: LossSettings):
        return _completion_logprobs(at_use(mesh, model, specs), batch, settings)[:2]

    return mesh.by_shard(of_shard, (specs, ROWS, WHOLE), ROWS)(model, batch, settings)


@eqx.filter_jit
def policy_gradients(
    model: AbstractLanguageModel,
    batch: UpdateBatch,
    normalizer: LossNormalizer,
    settings: LossSettings,
    *,
    adapters: Adapters | None = None,
    mesh: AbstractDeviceMesh = OneDevice(),
) -> tuple[PolicyGradients, Features]:
    """Computes loss and gradients of one micro-batch.

    The features of the forward come out with them, whether a draft wants them or not: the program that updates the
    policy is the same with a learning draft, a frozen one and none, and so are the bits of its result.

    On a mesh of several devices each shard computes its rows. It gathers a block's weights when it comes to that block,
    and keeps its part of the gradients' sums.

    **Arguments:**

    - `model`: the policy's copy in the dtype to compute in, see [`eqx_specgrpo.grpo.compute_copy`][].
    - `batch`: the micro-batch; on a mesh from [`eqx_specgrpo.grpo.batch_of_shards`][].
    - `normalizer`: counts of the whole step.
    - `settings`: of the loss.
    - `adapters`: those that were merged into `model`. Then the gradients are by them, and by nothing else.
    - `mesh`: that the model is laid out on.

    **Returns:**

    The gradients in float32, and the features of the whole sequences (before the update), in the order of the batch.
    """

    def with_factors(adapters: Adapters) -> AbstractLanguageModel:
        assert isinstance(model, Transformer)
        return with_low_rank_gradients(model, adapters)

    policy = model if adapters is None else with_factors(adapters)
    is_trained = jax.tree.map(eqx.is_inexact_array, policy) if adapters is None else are_factors(policy)
    # Adapters are small, and come whole.
    specs = mesh.data_specs(policy, Layout.MASTER)
    specs = jax.tree.map(lambda trained, spec: WHOLE if trained and adapters is not None else spec, is_trained, specs)
    of_trained = jax.tree.map(lambda trained, spec: spec if trained else None, is_trained, specs)

    def of_shard(policy, batch, normalizer, settings):
        normalizer = _of_own_tokens(normalizer, batch, mesh)
        (loss, (metrics, entropy_sum, features)), gradients = value_and_gradients(
            mesh, lambda model: _loss(model, batch, normalizer, settings), policy, specs, is_trained
        )
        sums = mesh.total(loss), _total(metrics, mesh), mesh.total(entropy_sum)
        return gradients, sums, features

    gradients, sums, features = mesh.by_shard(of_shard, (specs, ROWS, WHOLE, WHOLE), (of_trained, WHOLE, ROWS))(
        policy, batch, normalizer, settings
    )
    if adapters is not None:
        _, by_adapters = eqx.filter_vjp(lambda adapters: eqx.filter(with_factors(adapters), is_trained), adapters)
        (gradients,) = by_adapters(gradients)
    return PolicyGradients(mesh.laid_out(gradients, Layout.MASTER), *sums), features


@eqx.filter_jit
def policy_forward(
    model: AbstractLanguageModel,
    batch: UpdateBatch,
    normalizer: LossNormalizer,
    settings: LossSettings,
    *,
    mesh: AbstractDeviceMesh = OneDevice(),
) -> tuple[PolicyGradients, Features]:
    """As `policy_gradients`, for a micro-batch whose gradients are known to be 0
    ([`rows_with_gradient`][eqx_specgrpo.grpo.UpdateBatch.rows_with_gradient]): a third of the work, and `None` in place
    of gradients. Where that is so of a whole step, see [`eqx_specgrpo.grpo.no_gradients`][]."""
    specs = mesh.data_specs(model, Layout.MASTER)

    def of_shard(model, batch, normalizer, settings):
        normalizer = _of_own_tokens(normalizer, batch, mesh)
        loss, (metrics, entropy_sum, features) = _loss(at_use(mesh, model, specs), batch, normalizer, settings)
        sums = mesh.total(loss), _total(metrics, mesh), mesh.total(entropy_sum)
        return sums, features

    sums, features = mesh.by_shard(of_shard, (specs, ROWS, WHOLE, WHOLE), (WHOLE, ROWS))(
        model, batch, normalizer, settings
    )
    return PolicyGradients(None, *sums), features


def _of_own_tokens(normalizer: LossNormalizer, batch: UpdateBatch, mesh: AbstractDeviceMesh) -> LossNormalizer:
    """With which a shard's share of the loss is the same as among all rows of the micro-batch. Only
    `micro_batch_mean` divides by the tokens that it sees."""
    if mesh.data == 1:
        return normalizer
    own = jnp.asarray(batch.completion_mask).sum().astype(jnp.float32)
    of_all = jnp.maximum(mesh.total(own), 1.0) / jnp.maximum(own, 1.0)
    return eqx.tree_at(lambda n: n.num_micro_batches, normalizer, normalizer.num_micro_batches * of_all)


def _total(metrics: PolicyLossMetrics, mesh: AbstractDeviceMesh) -> PolicyLossMetrics:
    if mesh.data == 1:
        return metrics
    of_shards = jax.tree.map(lambda x: mesh.of_all(x[None]), metrics)
    return ft.reduce(operator.add, [jax.tree.map(lambda x, n=n: x[n], of_shards) for n in range(mesh.data)])


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


@eqx.filter_jit
def no_gradients(model: PyTree, mesh: AbstractDeviceMesh = OneDevice()) -> PyTree:
    """The gradients of a step none of whose rows has one: zeros in float32, shaped as those of `policy_gradients`."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), eqx.filter(model, eqx.is_inexact_array))
    return mesh.laid_out(zeros, Layout.MASTER)


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
    unchanged: tuple[optax.GradientTransformation, PyTree, Float[Array, ""]],
    params: PyTree,
    state: Any,
    mesh: AbstractDeviceMesh = OneDevice(),
) -> tuple[PyTree, Any]:
    """Makes one optimizer step. DONATES the parameters and the optimizer's state.

    **Arguments:**

    - `unchanged`: the optimizer, the gradients and the learning rate.
    - `params`: float32 master weights.
    - `state`: the optimizer's.
    - `mesh`: where all of these are laid out, and stay.
    """
    optimizer, gradients, learning_rate = unchanged
    updates, state = optimizer.update(gradients, state, eqx.filter(params, eqx.is_inexact_array))
    params = eqx.apply_updates(params, jax.tree.map(lambda u: -learning_rate * u, updates))
    return mesh.laid_out((params, state), Layout.MASTER)


def compute_copy(params: Module, dtype: str, mesh: AbstractDeviceMesh = OneDevice()) -> Module:
    """Returns the policy (or the draft) with its matrices in the dtype to compute in. A run calls it once a step.

    For a policy with adapters it returns the merged weights.

    **Arguments:**

    - `mesh`: where the parameters are laid out; each device casts what it has.
    """
    if isinstance(params, AdaptedTransformer):
        merged = params.merged(jnp.dtype(dtype))
        return mesh.lay_out(merged, Layout.MASTER)  # pyright: ignore[reportReturnType]: a language model for another
    return _cast(params, dtype, mesh)


@eqx.filter_jit
def _cast(params: Module, dtype: str, mesh: AbstractDeviceMesh) -> Module:
    return mesh.laid_out(cast_weights(params, jnp.dtype(dtype)), Layout.MASTER)


def trained_part(policy: AbstractLanguageModel) -> PyTree:
    """Returns what the optimizer changes and a checkpoint keeps: the adapters if there are any, else the policy."""
    return policy.adapters if isinstance(policy, AdaptedTransformer) else policy


def with_trained_part(policy: AbstractLanguageModel, trained: PyTree) -> AbstractLanguageModel:
    """The inverse of `trained_part`."""
    return policy.with_adapters(trained) if isinstance(policy, AdaptedTransformer) else trained
