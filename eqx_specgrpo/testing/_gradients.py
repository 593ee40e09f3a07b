"""Who learns from the draft's loss: every weight of the draft, and nothing of the target."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ..distill import DraftBatch, ForwardKL, draft_gradients
from ..models import sequence_features
from ._errors import require
from ._pair import Pair, perturbed


@eqx.filter_jit
def _loss_gradients(draft, target, tokens, prompt_lengths, completion_lengths):
    """Of the draft step's loss, for the draft's weights and for the target's, its features included."""

    def loss(target):
        features = sequence_features(target, tokens, layers=draft.layers)
        outcome = draft_gradients(
            draft,
            target,
            DraftBatch(features, tokens, prompt_lengths, completion_lengths),
            ForwardKL(),
            temperature=jnp.ones(()),
            alpha=jnp.ones(draft.train_length),
            position_decay=jnp.ones(()),
            new=tokens.shape[1] - 2,
            chunk=16,
        )
        return outcome.loss, outcome.gradients

    (value, gradients), to_target = eqx.filter_value_and_grad(loss, has_aux=True)(target)
    return value, gradients, jax.tree.map(lambda x: jnp.abs(x).max(), to_target)


def check_gradients(pair: Pair, *, frozen: Sequence[str] = (), noise: float = 0.01) -> float:
    """That the draft step's gradient is finite, reaches every weight of the draft, and is zero for the target.

    **Arguments:**

    - `frozen`: places of weights that are meant not to learn, as in `.adapter.scale`.
    - `noise`: put on the draft's weights first, since zeros in a fresh draft may hide others.

    **Returns:**

    The largest gradient that reached the target: 0.
    """
    draft, target, name = pair.draft, pair.target, pair.name
    own = [leaf for leaf in jax.tree.leaves(draft) if eqx.is_inexact_array(leaf)]
    theirs = [leaf for leaf in jax.tree.leaves(target) if eqx.is_inexact_array(leaf)]
    require(
        not {id(leaf) for leaf in own} & {id(leaf) for leaf in theirs},
        f"{name} holds an array of the target's: it would be trained and saved with the draft. The target is an "
        "argument of every method; take from there what is needed",
    )
    if draft.train_length == 0:
        return 0.0
    rng, rows, seq = np.random.default_rng(4), min(pair.rows, 2), 12
    tokens = rng.integers(0, target.vocab_size, (rows, seq)).astype(np.int32)
    prompt_lengths = np.array([2, 4][:rows], np.int32)
    value, gradients, to_target = _loss_gradients(
        perturbed(draft, noise), target, tokens, prompt_lengths, seq - prompt_lengths
    )
    reached = max((float(x) for x in jax.tree.leaves(to_target)), default=0.0)
    require(reached == 0.0, f"{name}: the draft's loss reaches the target with a gradient of {reached:.1e}")
    require(bool(np.isfinite(value)), f"{name}: the loss of the draft step is {float(value)}")
    for path, gradient in jtu.tree_leaves_with_path(gradients):
        place, gradient = jtu.keystr(path), np.asarray(gradient)
        require(bool(np.isfinite(gradient).all()), f"{name}{place}: the gradient is not finite")
        require(
            bool(gradient.any()) or place in frozen,
            f"{name}{place} gets no gradient, so that it never learns; if that is meant, say so: frozen=[{place!r}]",
        )
    return reached
