"""The policy's optimizers by name: made of optax's parts, behind one clip, before one weight decay."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree
from optax import contrib

OptimizerName = Literal["adamw", "adafactor", "muon", "lion", "sgd"]

# Muon's step has as large entries as AdamW's usually has, so that one learning rate suits both (Liu et al. 2025,
# "Muon is scalable for LLM training", arXiv:2502.16982, equation 4).
_MUON_RMS = 0.2
_MUON_MOMENTUM = 0.95


class OptimizerKind(NamedTuple):
    """What an optimizer is made of.

    **Arguments:**

    - `scale`: from the two moments' decays and the epsilon to what turns a gradient into a step for a rate of 1.
    - `uses`: the options of `[grpo]` that it has a use for.
    - `summary`: what it is, in a few words.
    """

    scale: Callable[[float, float, float], optax.GradientTransformation]
    uses: tuple[str, ...]
    summary: str


def _adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(beta1, beta2, epsilon)


def _adafactor(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """As transformers' `Adafactor` without `scale_parameter` and `relative_step`: the rate is what it is."""
    del beta1, beta2, epsilon
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _lion(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    del epsilon
    return optax.scale_by_lion(beta1, beta2)


def _sgd(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    del beta1, beta2, epsilon
    return optax.identity()


def _muon(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Matrices of the layers are orthogonalised; vectors, the embedding and the unembedding have AdamW's steps."""
    return optax.partition(
        {
            "muon": optax.chain(
                contrib.scale_by_muon(beta=_MUON_MOMENTUM, weight_dimension_numbers=_every_one),
                optax.stateless(lambda updates, _: jax.tree.map(_with_adams_size, updates)),
            ),
            "adam": _adam(beta1, beta2, epsilon),
        },
        _muon_or_adam,
    )


def _every_one(updates: PyTree) -> PyTree:
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), updates)


def _with_adams_size(update: Any) -> Any:
    return update if not eqx.is_array(update) else update * (_MUON_RMS * max(update.shape) ** 0.5)


def _muon_or_adam(params: PyTree) -> PyTree:
    """Which leaf has whose steps. Rows of an embedding are looked up one by one: it is no map to be orthogonalised."""

    def label(path: tuple[Any, ...], x: Any) -> str:
        is_embedding = any(isinstance(key, jax.tree_util.GetAttrKey) and "embedding" in key.name for key in path)
        return "muon" if x.ndim == 2 and not is_embedding else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


_BETAS = ("adam_beta1", "adam_beta2")
OPTIMIZERS: Mapping[str, OptimizerKind] = MappingProxyType(
    {
        "adamw": OptimizerKind(_adam, (*_BETAS, "adam_epsilon"), "two moments"),
        "adafactor": OptimizerKind(_adafactor, (), "of a matrix two vectors in place of the second moment, no first"),
        "muon": OptimizerKind(
            _muon,
            (*_BETAS, "adam_epsilon"),
            "one momentum, whose steps are orthogonalised; AdamW for vectors and embeddings",
        ),
        "lion": OptimizerKind(_lion, _BETAS, "the sign of one momentum; a tenth of AdamW's rate is usual"),
        "sgd": OptimizerKind(_sgd, (), "the gradient itself, no state; it takes far larger rates"),
    }
)
assert tuple(OPTIMIZERS) == get_args(OptimizerName)


def make_optimizer(
    name: str = "adamw",
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Makes an optimizer for a learning rate of 1, with clipping of the gradient's global norm.

    The learning rate is an argument of `apply_gradients`, so that a schedule is an array. Weight decay is decoupled in
    all of them: a weight loses the share `learning_rate * weight_decay` at each step. Vectors (norms and biases) do not
    decay.

    **Arguments:**

    - `name`: of `OPTIMIZERS`: AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), Adafactor (Shazeer and Stern 2018,
        arXiv:1804.04235), Muon (Jordan et al. 2024, [kellerjordan.github.io/posts/muon](
        https://kellerjordan.github.io/posts/muon)), Lion (Chen et al. 2023, arXiv:2302.06675) or SGD.
    - `beta1`, `beta2`, `epsilon`: of AdamW, and of the others as far as they have them.
    - `weight_decay`, `max_grad_norm`: of all of them.
    """
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        OPTIMIZERS[name].scale(beta1, beta2, epsilon),
        optax.add_decayed_weights(weight_decay, mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)),
    )


def adamw(
    *, beta1: float, beta2: float, epsilon: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """Makes AdamW for a learning rate of 1, with clipping of the global norm; see `make_optimizer`."""
    return make_optimizer(
        "adamw",
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
    )


def optimizer_bytes(optimizer: optax.GradientTransformation, trained: PyTree) -> int:
    """Computes the size of an optimizer's state in bytes.

    **Arguments:**

    - `trained`: the trained arrays, or their shapes.
    """
    parameters = jax.tree.map(lambda x: x if _is_inexact(x) else None, trained)
    state = eqx.filter_eval_shape(optimizer.init, parameters)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if _has_size(x))


def _is_inexact(x: Any) -> bool:
    return _has_size(x) and jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)


def _has_size(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
