"""A draft driven by hand: the parts of a round as programs of their own, which all checks share."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Int, Key

from ..drafts import AbstractSampler, IndependentSampler
from ..models import sequence_features
from ..sampling import Sampling


class ScriptedSampler(AbstractSampler):
    """Draws given tokens, whatever the logits, so that two drafts can be compared position by position, ties or not;
    or draws by itself.

    **Arguments:**

    - `sampling`: of the distributions returned.
    - `is_scripted`: whether `tokens` are drawn.
    - `tokens`: where there is a support, taken as indices into it.
    - `keys`: for drawing by itself, one a row.
    """

    sampling: Sampling
    is_scripted: Bool[Array, ""]
    tokens: Int[Array, "rows draft"]
    keys: Key[Array, " rows"]

    def __call__(self, logits, offset, support=None):
        drawn, distribution = IndependentSampler(self.sampling, self.keys)(logits, offset, support)
        given = self.tokens[:, offset]
        if support is not None:
            given = support[given % support.shape[0]]
        return jnp.where(self.is_scripted, given, drawn).astype(jnp.int32), distribution


def script(tokens) -> ScriptedSampler:
    """A sampler that draws these tokens."""
    return ScriptedSampler(Sampling(1.0), jnp.array(True), jnp.asarray(tokens), jr.split(jr.key(0), len(tokens)))


@eqx.filter_jit
def start(draft, target, tokens, lengths, capacity):
    """The draft's state after a fresh `init` on right-padded sequences."""
    features = sequence_features(target, tokens, layers=draft.layers)
    return draft.init(target, features, tokens, lengths, capacity)


@eqx.filter_jit
def propose(draft, target, state, last_token, sampler, length):
    """The proposal, with the probabilities of the whole vocabulary beside it where there are some, and the state."""
    proposal, state = draft.propose(target, state, last_token, sampler, length)
    probs = None if proposal.distribution is None else proposal.distribution.probs(target.vocab_size)
    return proposal.tokens, proposal.token_logprobs(), probs, state


@eqx.filter_jit
def commit(draft, target, state, features, block, num_accepted):
    """The state after a round's outcome."""
    return draft.commit(target, state, features, block, num_accepted)


@eqx.filter_jit
def fill(target, tokens, capacity, layers):
    """The target's cache of right-padded sequences."""
    cache = target.init_cache(tokens.shape[0], capacity, jnp.float32)
    return _hidden(target, tokens, jnp.zeros(tokens.shape[0], jnp.int32), cache, layers)[1]


@eqx.filter_jit
def check_block(target, block, start, cache, layers):
    """The target's features of a block that begins at each row's own position."""
    return _hidden(target, block, start, cache, layers)


def _hidden(target, tokens, start, cache, layers):
    positions = start[:, None] + jnp.arange(tokens.shape[1])[None]
    return target.hidden(tokens, positions, cache, layers=layers)
