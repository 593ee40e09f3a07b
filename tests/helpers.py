"""Tiny targets, drafts and verifiers for the proofs of losslessness; some of them are wrong on purpose."""

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jaxtyping import Array, Float, Int

from eqx_specgrpo.decoding import (
    VERIFIER_KINDS,
    AbstractAcceptanceRule,
    AbstractSampling,
    AbstractVerifier,
    Block,
    Coupled,
    GreedyMatch,
    Rejection,
    Verdict,
    _segment as segment_module,
)
from eqx_specgrpo.drafts import AbstractDraft, CoupledSampler, Proposal
from eqx_specgrpo.models import (
    AbstractLanguageModel,
    Features,
    KVCache,
    NoCache,
    Transformer,
    TransformerConfig,
    YarnRope,
    sequence_features,
    with_grouped_outputs,
)
from eqx_specgrpo.runtime._compile import _COMPILED as COMPILED

# Gives a program whose text is looked at XLA's own options, where conftest.py has set others for the whole process.
AS_USERS_COMPILE = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ.get("XLA_FLAGS", "") else {}


def normalized(logits: Any) -> np.ndarray:
    """Log-probabilities: logits say the same whatever is added to all of them."""
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Compiles without LLVM's optimizations: programs as small as ours take longer to optimize than to run."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@contextmanager
def compiled_programs():
    """Names of what is compiled, and how often: `count_compilations` knows no names, and leaves short ones out."""
    found: Counter[str] = Counter()

    def listen(event, duration, **details):
        if event == COMPILED:
            found[str(details.get("fun_name"))] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def anything(like: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of this shape, for a program that is only looked at."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jr.split(jr.key(0), like.shape)
    return jnp.zeros(like.shape, like.dtype)


def make_rounds_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which each segment takes 20 s: beside compiling tiny models decode in no time, and an adaptive length
    would never draft for them."""
    clock = itertools.count(0.0, 20.0)
    monkeypatch.setattr(segment_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))


#
# Targets
#


# Whatever a layer may have that a Llama's has not, at values that show, in three kinds of layers of which one returns.
EVERY_OPTION: dict[str, Any] = dict(
    num_layers=4,
    sliding_window=6,
    full_attention_layers=(2,),
    no_rope_layers=(1,),
    sliding_rope_theta=30.0,
    rope_scaling=YarnRope(4.0, 8, 0.8, beta_fast=2.0, beta_slow=0.5),
    rotary_dim=2,
    qk_norm=True,
    qk_norm_across_heads=True,
    norm_placement="around",
    norm_offset=1.0,
    activation="gelu_tanh",
    embedding_multiplier=1.4,
    residual_multiplier=0.7,
    attention_multiplier=0.9,
    logits_scaling=0.6,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=8.0,
)


def tiny_transformer(*, seed: int = 0, **changes: Any) -> Transformer:
    """A transformer with every parameter randomised, norms included, whose most likely tokens vary.

    **Arguments:**

    - `changes`: fields of `TransformerConfig`.
    """
    sizes = dict(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_position_embeddings=64,
    )
    config = TransformerConfig(**(sizes | changes))

    model = randomise(eqx.filter_eval_shape(Transformer, config, key=jr.key(0)), seed, 0.35)
    # Fresh embeddings are 0.02 small: every token would look the same, and every continuation would repeat itself.
    return eqx.tree_at(lambda m: m.embedding, model, 3.0 * model.embedding)


def randomise(shapes: Any, seed: int, scale: float) -> Any:
    """Fills a PyTree of shapes at random, so that no parameter is at a value where its absence would not show.

    Matrices are around 0, vectors (norms among them) around 1. With numpy, which compiles nothing.
    """
    rng = np.random.default_rng(seed)

    def fill(x):
        if not isinstance(x, jax.ShapeDtypeStruct | jax.Array):
            return x
        return jnp.asarray((x.ndim == 1) + scale * rng.standard_normal(x.shape), jnp.float32)

    # Drawn layer by layer, as they were before the outputs of one product lay in groups: the models are those that the
    # tests were written for.
    return with_grouped_outputs(jax.tree.map(fill, shapes))


class TabularModel(AbstractLanguageModel):
    """A target whose law is a table over the last two tokens, so that the law of its output can be enumerated.

    The last but one comes out of a real cache by attention that is all but wholly to the position before: an error in
    writing, rewinding or reading the cache shows as a wrong law.

    **Arguments:**

    - `table`: logits of the next token after `[last but one, last]`; index `vocab` of the first stands for "none".
    """

    table: Float[Array, "vocab_and_none vocab vocab"]
    max_length: int = eqx.field(static=True, default=64)

    @property
    def vocab_size(self) -> int:
        return self.table.shape[-1]

    @property
    def hidden_size(self) -> int:
        return 1

    def init_cache(self, batch, capacity, dtype):
        # Squares of places are not exact in bfloat16 from 17 on.
        return (KVCache.empty(batch, 1, capacity, 2, jnp.float32),)

    def no_cache(self):
        return (NoCache(),)

    def hidden(self, tokens, positions, cache, *, layers=()):
        del layers
        places = positions.astype(jnp.float32)
        # The score of slot s at position p is that of p - 1 less 50 (s - p + 1)², by which no other slot counts.
        queries = 50 * math.sqrt(2) * jnp.stack([2 * (places - 1), -jnp.ones_like(places)], axis=-1)
        keys = jnp.stack([places, places**2], axis=-1)
        values = jnp.stack([tokens.astype(jnp.float32), jnp.zeros_like(places)], axis=-1)
        # Where a device multiplies float32 with fewer bits by itself, such scores would not do.
        with jax.default_matmul_precision("float32"):
            mixed, layer_cache = cache[0].attend(queries[:, :, None], keys[:, None], values[:, None], positions, None)
        before = jnp.where(positions == 0, self.vocab_size, jnp.round(mixed[..., 0]).astype(tokens.dtype))
        return Features((before * self.vocab_size + tokens).astype(jnp.float32)[..., None]), (layer_cache,)

    def unembed(self, hidden, ids=None):
        logits = self.table.reshape(-1, self.vocab_size)[hidden[..., 0].astype(jnp.int32)]
        return logits if ids is None else logits[..., ids]

    def embed(self, tokens):
        return tokens[..., None].astype(jnp.float32)


def tabular_model(*, seed: int, vocab: int, scale: float) -> TabularModel:
    table = scale * np.random.default_rng(seed).standard_normal((vocab + 1, vocab, vocab))
    return TabularModel(jnp.asarray(table, jnp.float32))


def sequence_law(model: TabularModel, sampling: AbstractSampling, prompt: list[int], length: int) -> np.ndarray:
    """The exact joint law of the first `length` tokens after a prompt, one axis a token, in float64."""
    vocab = model.vocab_size
    log_table = np.asarray(sampling.distribution(model.table).dense(vocab).logits, np.float64)
    table = np.exp(log_table - log_table.max(-1, keepdims=True))
    table /= table.sum(-1, keepdims=True)
    before = prompt[-2] if len(prompt) > 1 else vocab
    law = table[before, prompt[-1]]
    if length > 1:
        law = law[:, None] * table[prompt[-1]]
    for _ in range(length - 2):
        law = law[..., None] * table[:vocab]
    return law


#
# Drafts
#


class TabularDraft(AbstractDraft[tuple[()]]):
    """Draws each token from a table over the one before, autoregressively: every drafted distribution is known.

    **Arguments:**

    - `table`: logits of the next token.
    - `sampling`: instead of the decoder's, for drafts that draw by other settings than the target.
    """

    table: Float[Array, "vocab vocab"]
    max_length: int = eqx.field(static=True)
    sampling: AbstractSampling | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        return ()

    @property
    def train_length(self) -> int:
        return 0

    def check(self, target):
        del target

    def init(self, target, features, tokens, lengths, capacity):
        return ()

    def propose(self, target, state, last_token, sampler, length):
        if self.sampling is not None:
            sampler = eqx.tree_at(lambda s: s.sampling, sampler, self.sampling)
        steps = []
        for offset in range(length):
            steps.append(sampler(self.table[last_token], offset))
            last_token = steps[-1][0]
        return Proposal.stack(steps), state

    def commit(self, target, state, features, block, num_accepted):
        return state

    def train_hidden(self, target, features, tokens):
        raise NotImplementedError

    def train_logits(self, target, hidden):
        raise NotImplementedError

    def provenance(self):
        return {}


class PointMassDraft(AbstractDraft[tuple[()]]):
    """Chooses each token without chance, by a table of successors: what an n-gram draft does."""

    successor: Int[Array, " vocab"]
    max_length: int = eqx.field(static=True)

    @property
    def layers(self) -> tuple[int, ...]:
        return ()

    @property
    def train_length(self) -> int:
        return 0

    def check(self, target):
        del target

    def init(self, target, features, tokens, lengths, capacity):
        return ()

    def propose(self, target, state, last_token, sampler, length):
        tokens = []
        for _ in range(length):
            last_token = self.successor[last_token]
            tokens.append(last_token)
        return Proposal(jnp.stack(tokens, axis=1), None), state

    def commit(self, target, state, features, block, num_accepted):
        return state

    def train_hidden(self, target, features, tokens):
        raise NotImplementedError

    def train_logits(self, target, hidden):
        raise NotImplementedError

    def provenance(self):
        return {}


class History(eqx.Module):
    """All committed tokens of every row that were fed to the target, and how many."""

    tokens: Int[Array, "rows capacity"]
    lengths: Int[Array, " rows"]

    def append(self, block: Int[Array, "rows block"], num_kept: Int[Array, " rows"]) -> "History":
        index = self.lengths[:, None] + jnp.arange(block.shape[1])[None]
        rows = jnp.arange(block.shape[0])[:, None]
        return History(self.tokens.at[rows, index].set(block), self.lengths + num_kept)


class OracleDraft(AbstractDraft[History]):
    """Proposes what the target itself would say greedily, from full forwards over the committed tokens, no cache.

    **Arguments:**

    - `max_length`: see `AbstractDraft`.
    - `num_right`: from this draft position on, it proposes another token than the target's; an array, so that all such
        drafts share one compiled program.
    """

    max_length: int = eqx.field(static=True)
    num_right: Int[Array, ""]

    @property
    def layers(self) -> tuple[int, ...]:
        return ()

    @property
    def train_length(self) -> int:
        return 0

    def check(self, target):
        del target

    def init(self, target, features, tokens, lengths, capacity):
        return History(jnp.zeros((tokens.shape[0], capacity), jnp.int32), lengths * 0).append(tokens, lengths)

    def propose(self, target, state, last_token, sampler, length):
        def step(carry, index):
            history, token = carry
            history = history.append(token[:, None], jnp.ones_like(token))
            features = sequence_features(target, history.tokens)
            hidden = jnp.take_along_axis(features.last, (history.lengths - 1)[:, None, None], axis=1)[:, 0]
            best = jnp.argmax(target.unembed(hidden), axis=-1)
            token = jnp.where(index < self.num_right, best, (best + 1) % target.vocab_size)
            return (history, token), token

        _, proposed = lax.scan(step, (state, last_token), jnp.arange(length))
        return Proposal(proposed.T, None), state

    def commit(self, target, state, features, block, num_accepted):
        return state.append(block, num_accepted + 1)

    def train_hidden(self, target, features, tokens):
        raise NotImplementedError

    def train_logits(self, target, hidden):
        raise NotImplementedError

    def provenance(self):
        return {}


def oracle_draft(length: int) -> OracleDraft:
    """Under greedy decoding every token is accepted."""
    return OracleDraft(length, jnp.int32(length))


def wrong_draft(length: int) -> OracleDraft:
    """Under greedy decoding no token is accepted."""
    return OracleDraft(length, jnp.int32(0))


#
# Verifiers that are wrong on purpose, with one fault each: what the proofs must catch. The rest is `Rejection`'s.
#


class InvertedRatio(AbstractAcceptanceRule):
    """Accepts with `min(1, draft / target)`."""

    def survival(self, target, proposal):
        length = proposal.tokens.shape[0]
        log_ratio = proposal.token_logprobs() - target[:length].logprob(proposal.tokens)
        return jnp.exp(jnp.cumsum(jnp.minimum(log_ratio, 0.0)))

    def next_weights(self, target, proposal, num_accepted):
        return Rejection().next_weights(target, proposal, num_accepted)


class ResidualNotSubtracted(AbstractAcceptanceRule):
    """Corrects a rejected token by a draw from the target instead of the residual."""

    def survival(self, target, proposal):
        return Rejection().survival(target, proposal)

    def next_weights(self, target, proposal, num_accepted):
        return target[num_accepted].probs()


class ResidualNotRenormalised(AbstractAcceptanceRule):
    """Inverts the cumulative sum of the residual as if it summed to 1, so that the last token gets what is missing."""

    def survival(self, target, proposal):
        return Rejection().survival(target, proposal)

    def next_weights(self, target, proposal, num_accepted):
        weights = Rejection().next_weights(target, proposal, num_accepted)
        return weights.at[-1].add(jnp.maximum(1.0 - weights.sum(), 0.0))


class BonusFromDraft(AbstractAcceptanceRule):
    """Draws the token after a fully accepted draft from the draft's last distribution."""

    def survival(self, target, proposal):
        return Rejection().survival(target, proposal)

    def next_weights(self, target, proposal, num_accepted):
        length = proposal.tokens.shape[0]
        weights = Rejection().next_weights(target, proposal, num_accepted)
        if length == 0:
            return weights
        return jnp.where(num_accepted == length, proposal.probs_at(jnp.int32(length - 1), weights.shape[-1]), weights)


class LastDraftTokenDropped(AbstractAcceptanceRule):
    """Counts the last drafted token as rejected whatever happens, and corrects as if it had been rejected."""

    def survival(self, target, proposal):
        survival = Rejection().survival(target, proposal)
        return jnp.where(jnp.arange(survival.shape[0]) < survival.shape[0] - 1, survival, 0.0)

    def next_weights(self, target, proposal, num_accepted):
        return Rejection().next_weights(target, proposal, num_accepted)


class CutOff(AbstractAcceptanceRule):
    """Submits only the drafted tokens before the first doubtful one; the rest counts as never drafted.

    **Arguments:**

    - `threshold`: below this probability a position is doubtful.
    - `look_at_token`: the probability is the drafted token's: wrong, since which tokens are submitted then depends on
        what was drawn. Otherwise it is that of the most likely token: lossless, the control of the experiment.
    """

    threshold: float = eqx.field(static=True)
    look_at_token: bool = eqx.field(static=True)

    def _submitted(self, proposal):
        if proposal.distribution is None:
            return jnp.ones(proposal.tokens.shape[0], bool)
        largest = proposal.distribution.logits.max(-1) - proposal.distribution.log_normalizer
        looked_at = proposal.token_logprobs() if self.look_at_token else largest
        return jnp.cumprod(jnp.exp(looked_at) > self.threshold).astype(bool)

    def survival(self, target, proposal):
        return jnp.where(self._submitted(proposal), Rejection().survival(target, proposal), 0.0)

    def next_weights(self, target, proposal, num_accepted):
        weights = Rejection().next_weights(target, proposal, num_accepted)
        if proposal.tokens.shape[0] == 0:
            return weights
        was_submitted = jnp.pad(self._submitted(proposal), (0, 1))[num_accepted]
        return jnp.where(was_submitted, weights, target[num_accepted].probs())


class FirstFailingBlock(AbstractAcceptanceRule):
    """Block verification that keeps what is before the first position that fails, instead of up to the last that
    passes."""

    def survival(self, target, proposal):
        # P(at least i) of `Block` is 1 - (1 - h_i)(1 - h_{i+1})...: the single h are found from it.
        none_from = jnp.append(1.0 - Block().survival(target, proposal), 1.0)
        passes = 1.0 - none_from[:-1] / jnp.maximum(none_from[1:], 1e-30)
        return jnp.cumprod(passes)

    def next_weights(self, target, proposal, num_accepted):
        return Block().next_weights(target, proposal, num_accepted)


class NoFallback(AbstractAcceptanceRule):
    """Has nothing to draw from where the residual is zero everywhere."""

    def survival(self, target, proposal):
        return Rejection().survival(target, proposal)

    def next_weights(self, target, proposal, num_accepted):
        target_probs = target[num_accepted].probs()
        return jnp.maximum(target_probs - proposal.probs_at(num_accepted, target_probs.shape[-1]), 0.0)


class Opaque(AbstractVerifier):
    """A rule that does not state its law: it can only be judged by what it draws."""

    rule: AbstractAcceptanceRule

    def sampler(self, sampling, keys, positions):
        return self.rule.sampler(sampling, keys, positions)

    def verify(self, target, proposal, key, position) -> Verdict:
        return self.rule.verify(target, proposal, key, position)


class NoiseOfTheRound(AbstractVerifier):
    """Wrong for a coupling: the noise of a position depends on where its round began."""

    def sampler(self, sampling, keys, positions):
        return CoupledSampler(sampling, keys, 100 * positions)

    def verify(self, target, proposal, key, position) -> Verdict:
        return Coupled().verify(target, proposal, key, 100 * position)


class NoiseOfTheRow(AbstractVerifier):
    """Wrong: all rounds of a row share their noise."""

    def sampler(self, sampling, keys, positions):
        return CoupledSampler(sampling, keys, 0 * positions)

    def verify(self, target, proposal, key, position) -> Verdict:
        return Coupled().verify(target, proposal, key, 0 * position)


LOSSLESS = [
    *(
        kind.verifier
        for kind in VERIFIER_KINDS.values()
        if isinstance(kind.verifier, AbstractAcceptanceRule) and not kind.greedy_only
    ),
    CutOff(threshold=0.45, look_at_token=False),
]
GREEDY = [Rejection(), GreedyMatch()]
BROKEN = [
    InvertedRatio(),
    ResidualNotSubtracted(),
    ResidualNotRenormalised(),
    BonusFromDraft(),
    LastDraftTokenDropped(),
    CutOff(threshold=0.3, look_at_token=True),
    FirstFailingBlock(),
]
