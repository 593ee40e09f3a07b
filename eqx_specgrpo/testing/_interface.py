"""Shapes and dtypes of everything that a draft returns, found without running it."""

import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from ..drafts import IndependentSampler, draft_vocabulary
from ..models import sequence_features
from ..sampling import Sampling
from ._errors import require
from ._pair import Pair


def check_interface(pair: Pair) -> None:
    """That the decoder and the draft step can work with what the draft's methods return."""
    draft, target, name, rows = pair.draft, pair.target, pair.name, pair.rows
    most = draft.max_length
    require(isinstance(most, int) and 0 <= most <= 8, f"{name}.max_length is {most}, but lengths are 0 to 8")
    require(
        isinstance(draft.train_length, int) and 0 <= draft.train_length <= most,
        f"{name}.train_length is {draft.train_length}, but must be 0 to max_length, which is {most}",
    )
    draft.check(target)
    try:
        json.dumps(draft.provenance())
    except (TypeError, ValueError) as error:
        require(False, f"{name}.provenance() is not JSON-able ({error}): return numbers, strings, lists and tables")

    seq = pair.prompts.tokens.shape[1]
    capacity = seq + 2 * (most + 1)
    tokens, ids = _ints(rows, seq), _ints(rows)
    features = eqx.filter_eval_shape(sequence_features, target, tokens, layers=draft.layers)
    state = eqx.filter_eval_shape(draft.init, target, features, tokens, ids, capacity)
    for path, leaf in jtu.tree_leaves_with_path(state):
        require(
            _is_array(leaf) and leaf.shape[:1] == (rows,),
            f"{name}.init: {_place(path)} is {_describe(leaf)}, but every array of the state must have the row as its "
            f"leading axis ({rows} rows here), so that rows can be selected",
        )

    keys = jax.eval_shape(lambda: jr.split(jr.key(0), rows))
    for length in range(1, most + 1):
        proposal, proposed = eqx.filter_eval_shape(_propose, draft, target, state, ids, keys, length)
        what = f"{name}.propose of length {length}"
        _check_array(f"{what}: tokens", proposal.tokens, (rows, length), jnp.integer)
        if proposal.distribution is not None:
            logits = proposal.distribution.logits
            require(
                logits.shape[:2] == (rows, length) and logits.shape[2] <= target.vocab_size,
                f"{what}: the distribution's logits have shape {logits.shape}, expected {rows} rows, {length} "
                f"positions and at most {target.vocab_size} tokens",
            )
            require(
                proposal.distribution.support is not None or logits.shape[2] == target.vocab_size,
                f"{what}: {logits.shape[2]} logits for a vocabulary of {target.vocab_size}, but no support that says "
                "which tokens they belong to",
            )
        _check_same(f"{what}: the state", proposed, state)
    for width in range(1, most + 2):
        block = eqx.filter_eval_shape(sequence_features, target, _ints(rows, width), layers=draft.layers)
        committed = eqx.filter_eval_shape(draft.commit, target, state, block, _ints(rows, width), ids)
        _check_same(f"{name}.commit of a block of {width}: the state", committed, state)

    if draft.train_length:
        hidden = eqx.filter_eval_shape(draft.train_hidden, target, features, tokens)
        _check_array(f"{name}.train_hidden", hidden, (rows, seq, draft.train_length, hidden.shape[-1]), jnp.floating)
        logits = eqx.filter_eval_shape(draft.train_logits, target, hidden)
        vocab = draft_vocabulary(draft).size or target.vocab_size
        _check_array(f"{name}.train_logits", logits, (*hidden.shape[:-1], vocab), jnp.floating)


def _propose(draft, target, state, last_token, keys, length):
    return draft.propose(target, state, last_token, IndependentSampler(Sampling(1.0), keys), length)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if _is_array(leaf) else repr(leaf)


def _place(path: Any) -> str:
    return f"state{jtu.keystr(path)}"


def _check_array(what: str, found: Any, shape: tuple[int, ...], kind: Any) -> None:
    require(
        found.shape == shape and jnp.issubdtype(found.dtype, kind),
        f"{what}: {_describe(found)}, expected {kind.__name__}{list(shape)}",
    )


def _check_same(what: str, found: Any, expected: Any) -> None:
    """Of one structure, for the decoder's loop carries the state."""
    require(
        jax.tree.structure(found) == jax.tree.structure(expected),
        f"{what} is {jax.tree.structure(found)}, but init gave {jax.tree.structure(expected)}",
    )
    pairs = zip(jtu.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, leaf), other in pairs:
        require(
            leaf.shape == other.shape and leaf.dtype == other.dtype,
            f"{what}: {_place(path)} is {_describe(leaf)}, but init gave {_describe(other)}",
        )
