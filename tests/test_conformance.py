"""Every draft with every verifier, and that the checks see through each of the published kinds of bugs.

`check_draft` is run on each draft of ours. Then each goes through the decoder with each verifier: greedily, where all
tokens must be plain decoding's; and at temperature 1, where the law of the tokens is compared with the target's own.
"""

import functools as ft
import itertools as it
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, randomise, tiny_transformer
from jaxtyping import Array, Bool, Float

from eqx_specgrpo._types import Rollouts
from eqx_specgrpo.decoding import (
    AbstractVerifier,
    Block,
    Coupled,
    FixedLength,
    GreedyMatch,
    Rejection,
    Verdict,
    _round as round_module,
    decode,
    teacher_forced_logprobs,
)
from eqx_specgrpo.drafts import (
    AbstractDraft,
    AbstractSampler,
    DraftError,
    EagleDraft,
    FallbackDraft,
    HydraHeads,
    LayerSkipDraft,
    MarkovHeads,
    MedusaHeads,
    ModelDraft,
    NGramDraft,
    NoDraft,
    Proposal,
    ReducedVocabulary,
    TemperedDraft,
)
from eqx_specgrpo.models import AbstractLanguageModel, Features, sequence_features
from eqx_specgrpo.sampling import Sampling
from eqx_specgrpo.testing import (
    ConformanceError,
    OneOf,
    check_draft,
    check_draws,
    check_gradients,
    check_interface,
    check_law,
    check_rewind,
    check_saving,
    check_training,
    compare_tokens,
    make_pair,
)
from eqx_specgrpo.testing._statistics import law_p_value
from eqx_specgrpo.testing._tokens import GreedyOrNot

VOCAB, HIDDEN, LENGTH = 7, 16, 3
TARGET = tiny_transformer(num_layers=1, vocab_size=VOCAB, max_position_embeddings=80)
OTHER = eqx.filter_eval_shape(tiny_transformer, vocab_size=VOCAB + 1, hidden_size=8)


def _random(make, *args, scale=0.3, **kwargs) -> Any:
    return randomise(eqx.filter_eval_shape(ft.partial(make, *args, **kwargs), key=jr.key(0)), 1, scale)


HYDRA = _random(HydraHeads, HIDDEN, LENGTH)
REDUCED = HydraHeads(HIDDEN, LENGTH, vocabulary=ReducedVocabulary([4, 0, 1, 6, 2]), key=jr.key(0))
REDUCED = eqx.tree_at(lambda draft: draft.heads, REDUCED, HYDRA.heads)

# A further draft is one line more.
CONFORMANCE_DRAFTS: dict[str, AbstractDraft] = {
    "none": NoDraft(),
    "medusa": randomise(MedusaHeads.fresh(HIDDEN, LENGTH), 0, 0.3),
    "hydra": HYDRA,
    "markov": _random(MarkovHeads, HIDDEN, LENGTH, 5),
    "eagle": _random(EagleDraft, HIDDEN, layers=(0,), max_length=LENGTH, num_heads=2),
    "model": ModelDraft(tiny_transformer(seed=3, num_layers=1, vocab_size=VOCAB, max_position_embeddings=96), LENGTH),
    "layer skip": _random(LayerSkipDraft, HIDDEN, 1, LENGTH),
    "n-gram": NGramDraft(LENGTH, memory_size=0),
    "reduced and tempered": TemperedDraft(REDUCED, jnp.array([8, 0, -8], jnp.int32)),
    "fallback": FallbackDraft(NGramDraft(LENGTH, min_ngram=3, memory_size=0), HYDRA),
    "fallback by confidence": FallbackDraft(
        NGramDraft(LENGTH, min_ngram=1, memory_size=0), _random(MarkovHeads, HIDDEN, LENGTH, 5, confidence=True)
    ),
}
# Drafts that any target suits: there is nothing that they could refuse.
FITS_ANY = ("none", "n-gram")


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@pytest.mark.parametrize("kind", CONFORMANCE_DRAFTS)
def test_our_drafts_conform(kind):
    draft = CONFORMANCE_DRAFTS[kind]
    report = check_draft(draft, TARGET, other_target=None if kind in FITS_ANY else OTHER)
    assert report.loaded_by_name
    assert repr(report) == str(report) and str(report).startswith(f"{type(draft).__name__} passed every check.\n")
    for comparison in (report.greedy, report.coupled):
        assert comparison.equal == comparison.tokens == 64 and comparison.differences == ()
        assert (comparison.acceptance_length > 1) == (kind != "none")
        assert 0 < comparison.logprob_gap_max < 1e-4
    if kind not in ("none", "n-gram"):
        # Verdicts are remembered by a fallback, so that it is compared with its own twin, not with a restart.
        assert (0 < report.rewind_error < 1e-4) == ("fallback" not in kind) and report.draw_p_value > 1e-3


#
# Every draft with every verifier, in one program a draft
#


class EitherSampler(AbstractSampler):
    """Draws as one of two samplers."""

    is_first: Bool[Array, ""]
    first: AbstractSampler
    second: AbstractSampler

    def __call__(self, logits, offset, support=None):
        one, distribution = self.first(logits, offset, support)
        other, _ = self.second(logits, offset, support)
        return jnp.where(self.is_first, one, other), distribution


class AnyVerifier(AbstractVerifier):
    """One of our verifiers: `Coupled`, or a rule."""

    is_coupled: Bool[Array, ""]
    rule: OneOf

    def sampler(self, sampling, keys, positions):
        samplers = (v.sampler(sampling, keys, positions) for v in (Coupled(), self.rule))
        return EitherSampler(self.is_coupled, *samplers)

    def verify(self, target, proposal, key, position) -> Verdict:
        verdicts = (v.verify(target, proposal, key, position) for v in (Coupled(), self.rule))
        return jax.tree.map(lambda a, b: jnp.where(self.is_coupled, a, b), *verdicts)


_RULES = (Rejection(), Block(), GreedyMatch())
VERIFIERS = {
    **{type(rule).__name__: AnyVerifier(jnp.array(False), OneOf(_RULES, i)) for i, rule in enumerate(_RULES)},
    "Coupled": AnyVerifier(jnp.array(True), OneOf(_RULES, 0)),
}
PROMPTS, SAMPLES, NEW = [[5], [1, 2, 3, 1, 2], [4, 0, 6]], 400, 5


@ft.cache
def _decode(kind: str, verifier: str, greedy: bool) -> Rollouts:
    return decode(
        TARGET,
        PROMPTS,
        draft=CONFORMANCE_DRAFTS[kind],
        verifier=VERIFIERS[verifier],
        length=FixedLength(2),
        sampling=GreedyOrNot(jnp.array(greedy), Sampling(0.7)),
        key=jr.key(8),
        max_new_tokens=NEW,
        samples=SAMPLES,
        smallest_bucket=len(PROMPTS) * SAMPLES,
    )


@eqx.filter_jit
def _next_probs(target, tokens, length):
    hidden = sequence_features(target, tokens).last[:, length - 1]
    return jax.nn.softmax(target.unembed(hidden) / 0.7)


@ft.cache
def _law(prompt: int) -> np.ndarray:
    """The exact joint law of the first three tokens, from forwards over all their beginnings."""
    start, law = len(PROMPTS[prompt]), np.ones(())
    for depth in range(3):
        beginnings = np.array(list(it.product(range(VOCAB), repeat=depth)), np.int32).reshape(VOCAB**depth, depth)
        tokens = np.zeros((VOCAB**2, 8), np.int32)  # one shape, one program
        tokens[: len(beginnings), : start + depth] = [[*PROMPTS[prompt], *beginning] for beginning in beginnings]
        probs = np.asarray(_next_probs(TARGET, tokens, start + depth), np.float64)
        probs = probs[: len(beginnings)].reshape([VOCAB] * (depth + 1))
        law = law[..., None] * probs / probs.sum(-1, keepdims=True)
    return law


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("kind", CONFORMANCE_DRAFTS)
def test_every_draft_with_every_verifier(kind, verifier):
    greedy = _decode(kind, verifier, True)
    np.testing.assert_array_equal(greedy.tokens, _decode("none", "GreedyMatch", True).tokens)
    assert kind == "none" or greedy.statistics.drafted.sum() > 0
    if verifier == "GreedyMatch":
        return  # not lossless under sampling
    sampled = _decode(kind, verifier, False)
    for prompt in range(len(PROMPTS)):
        tokens = sampled.tokens[sampled.group == prompt]
        assert law_p_value(tokens[:, :2], _law(prompt).sum(2)) > 1e-4
        assert law_p_value(tokens[:, 1:3], _law(prompt).sum(0)) > 1e-4
    gap = np.abs(sampled.logprobs - teacher_forced_logprobs(TARGET, Sampling(0.7), sampled))
    assert gap.max() < 1e-4
    if verifier == "Coupled":
        np.testing.assert_array_equal(sampled.tokens, _decode("none", "Coupled", False).tokens)


def test_the_laws_can_tell():
    """Tokens at one temperature are not taken for those at another, nor those of one prompt for another's."""
    sampled = _decode("none", "Rejection", False)
    assert max(law_p_value(sampled.tokens[sampled.group == 0][:, :2], _law(p).sum(2)) for p in (1, 2)) < 1e-6
    greedy = _decode("none", "Rejection", True)
    assert law_p_value(greedy.tokens[greedy.group == 0][:, :2], _law(0).sum(2)) < 1e-6


#
# Broken drafts
#


class Wrapped(AbstractDraft[Any]):
    """A draft with a fault, chosen by name, so that the rest is a good draft's."""

    draft: AbstractDraft
    fault: str = eqx.field(static=True)
    extra: Any = None
    rewind_fault: Any = -1

    @property
    def max_length(self) -> int:
        return self.draft.max_length

    @property
    def train_length(self) -> int:
        return 9 if self.fault == "train_length" else self.draft.train_length

    @property
    def layers(self) -> tuple[int, ...]:
        return self.draft.layers

    def check(self, target):
        if self.fault != "accepts anything":
            self.draft.check(target)

    def init(self, target, features, tokens, lengths, capacity):
        state = self.draft.init(target, features, tokens, lengths, capacity)
        match self.fault:
            case "a scalar in the state":
                return state, jnp.zeros((), jnp.int32)
            case "the state grows":
                return state, jnp.zeros((tokens.shape[0], 1))
        return state

    def propose(self, target, state, last_token, sampler, length):
        if self.fault in ("a scalar in the state", "the state grows"):
            proposal, inner = self.draft.propose(target, state[0], last_token, sampler, length)
            return proposal, (inner, state[1])
        if self.fault == "one random number for all positions":
            sampler = SameOffset(sampler)
        proposal, state = self.draft.propose(target, state, last_token, sampler, length)
        match self.fault:
            case "another distribution is returned":
                warmer = Sampling(1.5).distribution(proposal.distribution.logits)
                return Proposal(proposal.tokens, warmer), state
            case "a doubtful token is replaced":
                best = jnp.argmax(proposal.distribution.logits, -1).astype(jnp.int32)
                is_doubtful = proposal.token_logprobs() < jnp.log(0.5)
                return Proposal(jnp.where(is_doubtful, best, proposal.tokens), proposal.distribution), state
            case "one token too many":
                return Proposal(jnp.pad(proposal.tokens, ((0, 0), (0, 1))), None), state
        return proposal, state

    def commit(self, target, state, features, block, num_accepted):
        width = block.shape[1]
        if self.fault == "rewind":
            # An array says which, so that all share their programs.
            outcomes = [
                jnp.minimum(num_accepted, max(width - 2, 0)),
                jnp.broadcast_to(num_accepted[0], num_accepted.shape),
                jnp.full_like(num_accepted, width - 1),
                num_accepted,
            ]
            new = self.draft.commit(target, state, features, block, jnp.stack(outcomes)[self.rewind_fault])
            is_ignored = (self.rewind_fault == 3) & (width == 1)
            return jax.tree.map(lambda old, new: jnp.where(is_ignored, old, new), state, new)
        match self.fault:
            case "a scalar in the state":
                return self.draft.commit(target, state[0], features, block, num_accepted), state[1]
            case "the state grows":
                return self.draft.commit(target, state[0], features, block, num_accepted), jnp.pad(
                    state[1], ((0, 0), (0, 1))
                )
        return self.draft.commit(target, state, features, block, num_accepted)

    def train_hidden(self, target, features, tokens):
        hidden = self.draft.train_hidden(target, features, tokens)
        return jnp.roll(hidden, 1, axis=1) if self.fault == "trained a position late" else hidden

    def train_logits(self, target, hidden):
        logits = self.draft.train_logits(target, hidden)
        return logits / 0.0 if self.fault == "no finite loss" else logits

    def provenance(self):
        if self.fault == "says something else each time":
            return {"at": time.perf_counter()}
        return {"where": {1}} if self.fault == "provenance" else {}


class SameOffset(AbstractSampler):
    """Every position's token is drawn with the first one's random number."""

    sampler: AbstractSampler

    def __call__(self, logits, offset, support=None):
        return self.sampler(logits, 0, support)


def _pair(fault: str, draft: AbstractDraft = HYDRA, extra: Any = None):
    return make_pair(Wrapped(draft, fault, extra), TARGET, None)


@pytest.mark.parametrize("kind", ["hydra", "eagle"])
@pytest.mark.parametrize(
    "fault, words",
    [
        # the last token of a full acceptance is forgotten
        (0, "round 1, in which all were accepted: row . then proposes"),
        # all rows are rewound as the first
        (1, "some were accepted, in each row another number: row [123]"),
        # nothing is rewound
        (2, "round 3, in which none was accepted"),
        # rounds without drafting are ignored
        (3, "in which nothing was drafted"),
    ],
    ids=["full acceptance", "unequal rows", "no rewind", "plain rounds"],
)
def test_rewinding_catches(kind, fault, words):
    draft = Wrapped(CONFORMANCE_DRAFTS[kind], "rewind", rewind_fault=jnp.int32(fault))
    with pytest.raises(ConformanceError, match=f"{words}.* a fresh init on the committed tokens"):
        check_rewind(make_pair(draft, TARGET, None))


class Heavy(AbstractDraft[Any]):
    """Remembers the sum of all tokens it was told of, rejected ones perhaps included: more than a restart knows."""

    scale: float = eqx.field(static=True)
    with_rejected: bool = eqx.field(static=True)
    max_length: int = eqx.field(static=True, default=LENGTH)
    train_length: int = eqx.field(static=True, default=0)
    layers: tuple[int, ...] = eqx.field(static=True, default=())

    def check(self, target):
        del target

    def init(self, target, features, tokens, lengths, capacity):
        return jnp.zeros(tokens.shape[0], jnp.int32)  # nothing of the prompt

    def propose(self, target, state, last_token, sampler, length):
        offsets = jnp.arange(VOCAB)[None, None] + jnp.arange(length)[None, :, None]
        return Proposal(*sampler.chain(jnp.sin(self.scale * state[:, None, None] + offsets))), state

    def commit(self, target, state, features, block, num_accepted):
        counts = jnp.arange(block.shape[1])[None] <= num_accepted[:, None]
        return state + jnp.where(counts | self.with_rejected, block + 1, 0).sum(1, dtype=jnp.int32)

    def train_hidden(self, target, features, tokens):
        raise NotImplementedError

    def train_logits(self, target, hidden):
        raise NotImplementedError

    def provenance(self):
        return {}


def test_a_draft_may_remember_more_than_a_restart_knows_but_nothing_of_what_was_rejected():
    right, wrong = (make_pair(Heavy(0.3, with_rejected), TARGET, None) for with_rejected in (False, True))
    with pytest.raises(ConformanceError, match="than a fresh init"):
        check_rewind(right)
    assert check_rewind(right, same_after_restart=False) == 0.0
    with pytest.raises(ConformanceError, match="otherwise than after other rejected tokens"):
        check_rewind(wrong, same_after_restart=False)


@pytest.mark.parametrize(
    "fault, words",
    [
        ("another distribution is returned", "a token: not drawn as the returned distributions say"),
        ("a doubtful token is replaced", "a token: not drawn as the returned distributions say"),
        ("one random number for all positions", "two consecutive tokens: not drawn"),
    ],
)
def test_statistics_of_the_draws_catch(fault, words):
    with pytest.raises(ConformanceError, match=words):
        check_draws(_pair(fault), draws=200)
    with pytest.raises(ConformanceError, match="what is decoded with it is not the target's law"):
        check_law(_pair(fault), draws=4096)


@pytest.mark.parametrize(
    "fault, words",
    [
        ("a scalar in the state", r"init: state\[1\] is int32\[\], but every array of the state must have the row"),
        ("the state grows", r"commit of a block of 1: the state: state\[1\] is float32\[4, 2\], but init gave"),
        ("one token too many", r"propose of length 1: tokens: int32\[4, 2\], expected integer\[4, 1\]"),
        ("train_length", "train_length is 9, but must be 0 to max_length, which is 3"),
        ("provenance", "provenance.. is not JSON-able"),
    ],
)
def test_shapes_that_the_decoder_could_not_use(fault, words):
    with pytest.raises(ConformanceError, match=words):
        check_interface(_pair(fault))


def test_a_draft_that_accepts_any_target():
    with pytest.raises(ConformanceError, match="accepts a target that the draft does not fit: raise DraftError"):
        check_draft(Wrapped(HYDRA, "accepts anything"), TARGET, other_target=OTHER)
    with pytest.raises(DraftError, match="size 16.*size 8"):
        check_draft(HYDRA, OTHER)


@pytest.mark.parametrize(
    "fault, extra, words",
    [
        ("an array of the target's", TARGET.embedding, "holds an array of the target's"),
        ("a weight that is not used", jnp.ones(3), r"\.extra gets no gradient.*frozen=..\.extra"),
        ("no finite loss", None, "the loss of the draft step is nan"),
    ],
)
def test_gradients_that_go_astray(fault, extra, words):
    with pytest.raises(ConformanceError, match=words):
        check_gradients(_pair(fault, extra=extra))


def test_a_weight_may_be_said_to_be_frozen():
    assert check_gradients(_pair("a weight that is not used", extra=jnp.ones(3)), frozen=[".extra"]) == 0.0


def test_a_draft_that_comes_back_as_another(monkeypatch):
    pair = make_pair(HYDRA, TARGET, None)
    assert check_saving(pair)
    assert not check_saving(_pair("", extra=jnp.ones(3)))  # no kind that can be loaded by name
    monkeypatch.setattr("eqx_specgrpo.testing._saving.load_draft", lambda *_: jax.tree.map(lambda x: x + 1, HYDRA))
    with pytest.raises(ConformanceError, match="comes back from disk as another draft"):
        check_saving(pair)
    with pytest.raises(ConformanceError, match="provenance.. says something else at every call"):
        check_saving(_pair("says something else each time"))


@pytest.mark.parametrize("kind", ["medusa", "hydra", "markov", "eagle", "model", "layer skip"])
def test_training_sees_what_is_drafted_with(kind):
    draft = CONFORMANCE_DRAFTS[kind]
    assert check_training(make_pair(draft, TARGET, None)) < 1e-5
    with pytest.raises(ConformanceError, match="at draft offset . training sees .* off by a position"):
        check_training(_pair("trained a position late", draft))


#
# Broken decoders
#

UNEQUAL = [[1, 2, 3], [4], [5, 6, 0, 1, 2, 3, 4], [6, 6]]
_commit = round_module.commit


def _newest_is_the_last_drafted(state, emitted, logprobs, support, num_valid, eos_ids, cache, draft):
    """After full acceptance the bonus token is forgotten."""
    new = _commit(state, emitted, logprobs, support, num_valid, eos_ids, cache, draft)
    is_full = (num_valid == emitted.shape[1]) & (emitted.shape[1] > 1)
    return eqx.tree_at(lambda s: s.last_token, new, jnp.where(is_full, emitted[:, -2], new.last_token))


def _all_rows_advance_alike(state, emitted, logprobs, support, num_valid, eos_ids, cache, draft):
    """As far as the row that advances most."""
    most = jnp.full_like(num_valid, num_valid.max())
    return _commit(state, emitted, logprobs, support, most, eos_ids, cache, draft)


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "coupled"])
@pytest.mark.parametrize(
    "new, commit",
    [(17, _newest_is_the_last_drafted), (18, _all_rows_advance_alike)],
    ids=["full acceptance", "unequal rows"],
)
def test_token_identity_catches_a_decoder_that(new, commit, greedy, monkeypatch):
    # Lengths of their own, so that the broken programs are no one else's.
    monkeypatch.setattr(round_module, "commit", commit)
    comparison = compare_tokens(HYDRA, TARGET, UNEQUAL, greedy=greedy, key=jr.key(1), max_new_tokens=new, length=1)
    assert comparison.share < 0.9
    with pytest.raises(ConformanceError, match="and that is no near tie"):
        comparison.require_near_ties("the decoder", 1e-3)
    with pytest.raises(ConformanceError, match="is off by"):
        comparison.require_logprobs("the decoder", 1e-3)


class AltersBlocks(AbstractLanguageModel):
    """A target whose passes over several tokens with a cache are wrong: a fault of the cache, seen from outside.

    **Arguments:**

    - `like_row_zero`: the block is put where that of the first row stands.
    - `noise`: hidden states are larger by this share.
    """

    model: Any
    like_row_zero: Bool[Array, ""]
    noise: Float[Array, ""]

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.model.hidden_size

    @property
    def max_length(self) -> int:
        return self.model.max_length

    def init_cache(self, batch, capacity, dtype):
        return self.model.init_cache(batch, capacity, dtype)

    def no_cache(self):
        return self.model.no_cache()

    def hidden(self, tokens, positions, cache, *, layers=()):
        is_block = 1 < tokens.shape[1] <= LENGTH + 1
        if is_block:
            positions = jnp.where(self.like_row_zero, positions[:1], positions)
        features, cache = self.model.hidden(tokens, positions, cache, layers=layers)
        return Features(features.last * (1.0 + is_block * self.noise), features.layers), cache

    def unembed(self, hidden, ids=None):
        return self.model.unembed(hidden, ids)

    def embed(self, tokens):
        return self.model.embed(tokens)


def _altered(greedy: bool, like_row_zero: bool, noise: float):
    target = AltersBlocks(TARGET, jnp.array(like_row_zero), jnp.asarray(noise))
    return compare_tokens(HYDRA, target, UNEQUAL, greedy=greedy, key=jr.key(2), max_new_tokens=24, samples=16)


def test_token_identity_catches_unequal_rows_that_share_a_position():
    comparison = _altered(True, True, 0.0)
    assert comparison.share < 0.9
    with pytest.raises(ConformanceError, match="and that is no near tie"):
        comparison.require_near_ties("the decoder", 1e-3)


def test_near_ties_are_told_from_errors():
    """Blocks that are slightly off swap tokens only where two are all but tied, and the gap says how near."""
    comparison = _altered(False, False, 0.02)
    assert comparison.differences and comparison.equal < comparison.tokens == 64 * 24
    for difference in comparison.differences:
        assert 0 < difference.gap <= difference.behind < 0.5 and difference.plain != difference.speculative
    comparison.require_near_ties("slightly off", 0.5)
    with pytest.raises(ConformanceError, match="row .* says token .* where plain decoding says .* no near tie"):
        comparison.require_near_ties("slightly off", comparison.largest_gap / 2)
    assert _altered(False, False, 0.0).share == 1.0


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match="all prompts are of one length"):
        check_draft(HYDRA, TARGET, prompts=[[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="needs [0-9]* positions, but the target's context holds 80: give shorter"):
        check_draft(HYDRA, TARGET, prompts=[[1] * 60, [3, 4]])
