"""Estimates the memory of an update from sizes alone, and chooses how the update uses the memory that there is."""

import bisect
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..models import AbstractLanguageModel, Transformer, matrix_dtype
from ..runtime import Memory

# How many arrays of one chunk's logits there are at a time (themselves, their softmax, their gradient), and how many of
# gradients of the table of embeddings.
_LOGITS, _EMBEDDINGS = 2.8, 1.8
# What one layer's backward needs besides what is kept, in arrays as wide as the MLP. Where the forward is computed
# again, its own values are among it.
_OF_ONE_LAYER, _OF_ONE_LAYER_AGAIN = 5.5, 10.5
# XLA computes gradients of weights late, and until then holds gradients of values, as wide as the MLP, for each layer.
_HELD_FOR_WEIGHTS = 2.3


def update_bytes(
    model: AbstractLanguageModel, positions: int, *, dtype: str | None = None, chunk: int, gradient_checkpointing: bool
) -> int | None:
    """Estimates the bytes that `policy_gradients` needs besides weights, gradients, features and the optimizer's state;
    `None` for a model that is no `Transformer`. (A run measures free memory after it has made the optimizer's state, so
    the state is counted there already. [`eqx_specgrpo.grpo.optimizer_bytes`][] returns its size.)

    The estimate is linear in the positions. It is the larger of two peaks: one when the logits of a chunk are computed,
    while all values for the backward pass are kept, and one in the layers' backward pass. The
    factors follow the compiler on CPU, within 25% (tested).

    **Arguments:**

    - `model`: the policy; its arrays may be shapes only.
    - `positions`: of the micro-batch, padding included, each prompt once.
    - `dtype`: of the matrices in computation; that of the model's own by default.
    - `chunk`: positions unembedded at a time.
    - `gradient_checkpointing`: whether only the layers' inputs are kept.
    """
    if not isinstance(model, Transformer):
        return None
    config, size = model.config, jnp.dtype(matrix_dtype(model) if dtype is None else dtype).itemsize
    weights = sum(x.size for x in jax.tree.leaves(eqx.filter(model.blocks, _is_weight)))
    wide = 4 * positions * config.intermediate_size
    logits = 4 * config.vocab_size * (_LOGITS * min(chunk, positions) + _EMBEDDINGS * config.hidden_size)
    if gradient_checkpointing:
        kept = 4 * positions * config.num_layers * config.hidden_size
        # Weights are stacked, and so are their gradients, which are cast to float32 so.
        return round(kept + max(4 * weights + logits, 8 * weights + _OF_ONE_LAYER_AGAIN * wide))
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    in_float32 = 2 * config.hidden_size + 2 * queries + 2 * keys + 2 * config.intermediate_size
    operands = 2 * config.hidden_size + config.intermediate_size  # of products with weights
    kept = positions * config.num_layers * (4 * in_float32 + size * operands)
    held = _HELD_FOR_WEIGHTS * config.num_layers * wide
    in_low_precision = size * weights if size < 4 else 0  # gradients, before they are cast
    return round(kept + max(logits, held + _OF_ONE_LAYER * wide) + in_low_precision)


def _is_weight(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct) and jnp.issubdtype(x.dtype, jnp.inexact)


# Of what is free when a run starts, an update may take so much: estimates err, and allocators waste.
_MARGIN = 0.75
# Of memory that is shared with other processes, keeping values may take so much of all that there is. Computing them
# again costs a third of the arithmetic at most.
_SHARE_TO_KEEP = 1 / 8


class UpdateBudget(NamedTuple):
    """The memory that an update may use, besides weights, optimizer and gradients.

    **Arguments:**

    - `to_keep`: bytes up to which the layers' values are kept for the backward.
    - `most`: bytes up to which an update goes at all.
    """

    to_keep: int
    most: int

    @staticmethod
    def of(memory: Memory, resident: int) -> "UpdateBudget":
        """Returns the budget on a device, of which `resident` bytes will be used for other things."""
        most = max(int(_MARGIN * (memory.available - resident)), 0)
        return UpdateBudget(min(most, int(_SHARE_TO_KEEP * memory.total)) if memory.is_shared else most, most)


class UpdateChoice(NamedTuple):
    """How an update uses memory.

    **Arguments:**

    - `gradient_checkpointing`: whether only the layers' inputs are kept.
    - `max_tokens`: positions of a micro-batch, see [`eqx_specgrpo.grpo.plan_micro_batches`][].
    - `reason`: what was chosen and why, in a line.
    """

    gradient_checkpointing: bool
    max_tokens: int | None
    reason: str


def choose_update(
    model: AbstractLanguageModel,
    smallest: int,
    budget: UpdateBudget | None,
    *,
    dtype: str,
    chunk: int,
    gradient_checkpointing: bool | None = None,
    max_tokens: int | None = None,
    usual_tokens: int | None = None,
) -> UpdateChoice:
    """Chooses the fastest update that fits: the largest micro-batches, and gradient checkpointing only if even the
    smallest micro-batch's values are too many to keep.

    **Arguments:**

    - `model`: the policy.
    - `smallest`: positions of the largest micro-batch when rows are divided as far as they go.
    - `budget`: `None` if it is not known what memory there is: everything is kept then.
    - `dtype`, `chunk`: see [`eqx_specgrpo.grpo.update_bytes`][].
    - `gradient_checkpointing`, `max_tokens`: what a user has said, which goes; `None`: nothing.
    - `usual_tokens`: the most positions of a micro-batch where memory is no matter; `None`: no limit.
    """

    def needed(positions: int, again: bool) -> int | None:
        return update_bytes(model, positions, dtype=dtype, chunk=chunk, gradient_checkpointing=again)

    smallest = smallest if max_tokens is None else max(smallest, max_tokens)
    kept = needed(smallest, False)
    if budget is None or kept is None:
        again, most = gradient_checkpointing or False, None
        reason = f"layers' values are {'computed again' if again else 'kept'}: how much memory they need is not known"
    else:
        again = kept > budget.to_keep if gradient_checkpointing is None else gradient_checkpointing
        most = budget.most if again else budget.to_keep
        taken = f"{_gib(kept)} for the {smallest} positions of {'a row' if max_tokens is None else 'a micro-batch'}"
        if gradient_checkpointing is not None:
            reason = f"as configured, layers' values are {'computed again in the backward' if again else 'kept'}"
        elif again:
            reason = f"layers' values are computed again in the backward: to keep them takes {taken}, more than "
            reason += f"{_gib(budget.to_keep)}"
        else:
            reason = f"layers' values are kept for the backward: that takes {taken}, and may take {_gib(most)}"
    if max_tokens is None:
        fitting = None
        if most is not None:
            fitting = bisect.bisect_right(range(1, _MANY), most, key=lambda positions: needed(positions, again) or 0)
        limits = [limit for limit in (usual_tokens, fitting) if limit is not None and limit < _MANY - 1]
        max_tokens = max(min(limits), 1) if limits else None
    size = "of any size" if max_tokens is None else f"of up to {max_tokens} positions"
    if again and most is not None and (needed(smallest, True) or 0) > most:
        reason += f". Even so {_gib(needed(smallest, True) or 0)} are needed, and {_gib(most)} are free: it may not fit"
    return UpdateChoice(again, max_tokens, f"micro-batches {size}, {reason}")


_MANY = 1 << 24  # positions: more than any device holds


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
