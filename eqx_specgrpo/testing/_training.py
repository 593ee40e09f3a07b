"""What a draft is trained to say is what it says when it drafts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..drafts import AbstractDraft, FallbackDraft, TemperedDraft, draft_vocabulary
from ..models import sequence_features
from ._drive import propose, script, start
from ._errors import require
from ._pair import Pair
from ._rewind import capacity_of


def _learner(draft: AbstractDraft) -> AbstractDraft:
    """The part that the draft step's loss sees."""
    match draft:
        case TemperedDraft():
            return _learner(draft.draft)
        case FallbackDraft():
            return _learner(draft.then)
        case _:
            return draft


@eqx.filter_jit
def _trained(draft, target, tokens, places):
    """Probabilities over the whole vocabulary that training sees, one position a row."""
    features = sequence_features(target, tokens, layers=draft.layers)
    hidden = draft.train_hidden(target, features, tokens)
    hidden = jnp.take_along_axis(hidden, places[:, None, None, None], axis=1)[:, 0]
    probs = jax.nn.softmax(draft.train_logits(target, hidden))
    support = draft_vocabulary(draft).support
    if support is None:
        return probs
    return jnp.zeros((*probs.shape[:-1], target.vocab_size)).at[..., support].set(probs)


def check_training(pair: Pair, *, tolerance: float = 1e-3) -> float:
    """That `train_logits` of `train_hidden` are the logits from which `propose` draws, when it has drafted the tokens
    that training sees.

    A draft whose two ways are off by a position learns well and is seldom right.

    **Arguments:**

    - `tolerance`: of probabilities.

    **Returns:**

    The largest difference between two probabilities; 0 if there is nothing to train.
    """
    draft, target = _learner(pair.draft), pair.target
    offsets = min(draft.train_length, draft.max_length)
    if offsets == 0:
        return 0.0
    rng, lengths = np.random.default_rng(7), pair.prompts.lengths
    width = int(lengths.max()) + draft.max_length + 2
    tokens = rng.integers(0, target.vocab_size, (pair.rows, width)).astype(np.int32)
    known = draft_vocabulary(draft).support
    if known is not None:  # what the draft cannot say, it cannot have drafted
        tokens = np.asarray(known)[tokens % len(known)]
    rows = np.arange(pair.rows)
    # The newest token, and those that are drafted after it.
    chain = np.stack([tokens[rows, lengths + offset] for offset in range(draft.max_length + 1)], axis=1)
    scripted = chain[:, 1:]
    if known is not None:
        scripted = np.argsort(np.asarray(known))[np.searchsorted(np.sort(np.asarray(known)), scripted)]
    state = start(draft, target, tokens, lengths, max(capacity_of(pair), width + draft.max_length + 1))
    drafted, _, probs, _ = propose(draft, target, state, chain[:, 0], script(scripted), draft.max_length)
    if probs is None:
        return 0.0
    require(
        bool(np.array_equal(np.asarray(drafted), chain[:, 1:])),
        f"{pair.name}.propose returns other tokens than its sampler drew: return what the sampler gave",
    )
    expected = np.asarray(_trained(draft, target, tokens, lengths - 1))[:, :offsets]
    found = np.asarray(probs)[:, :offsets]
    error = np.abs(found - expected).max(axis=(0, 2))
    worst = int(error.argmax())
    require(
        float(error[worst]) <= tolerance,
        f"{pair.name}: at draft offset {worst} training sees a probability that is off by {error[worst]:.1e} from the "
        "one that propose draws with, after the same tokens: is train_hidden off by a position? Where training is "
        "meant to see something else, say same_in_training=False",
    )
    return float(error[worst])
