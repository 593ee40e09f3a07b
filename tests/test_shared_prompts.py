"""Prompts that are stored once for all of their rows, against a copy of the prompt in each row's cache."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation, randomise, tiny_transformer

from eqx_specgrpo.decoding import (
    Coupled,
    FixedLength,
    _decode as decode_module,
    _prompts as prompts_module,
    decode,
    teacher_forced_logprobs,
)
from eqx_specgrpo.drafts import HydraHeads, NoDraft
from eqx_specgrpo.models import KVCache, PrefixPass, SharedPromptCache, _partial_attention, sequence_features
from eqx_specgrpo.sampling import Sampling

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 3, 1, 2, 7, 5, 4, 3, 6, 8]]
SAMPLES, NEW = 6, 18


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def hydra():
    shapes = eqx.filter_eval_shape(HydraHeads, 16, 3, key=jr.key(0))
    return randomise(shapes, 1, 0.3)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("length", [0, 3])
def test_tokens_are_those_of_rows_with_prompts_of_their_own(window, length, hydra, monkeypatch):
    """With random numbers that belong to positions, so that a difference would go on to the end of a row."""
    target = tiny_transformer(sliding_window=window, max_position_embeddings=40)
    common = dict(
        draft=hydra if length else NoDraft(), verifier=Coupled(), length=FixedLength(length), sampling=Sampling(1.0),
        key=jr.key(4), max_new_tokens=NEW, eos_ids=[2, 9], samples=SAMPLES,
    )  # fmt: skip
    shared = decode(target, PROMPTS, **common)
    # Rows end at different times: the batch was shrunk on the way, which gives the rest prompts of their own.
    assert len(set(shared.lengths)) > 4 and np.sort(shared.lengths)[-4] > np.sort(shared.lengths)[4]
    asked = []
    monkeypatch.setattr(decode_module, "share_prompts", lambda *args, **sizes: bool(asked.append(sizes)))
    own = decode(target, PROMPTS, **common)
    assert len(asked) == 1
    np.testing.assert_array_equal(shared.tokens, own.tokens)
    np.testing.assert_array_equal(shared.lengths, own.lengths)
    np.testing.assert_allclose(shared.logprobs, own.logprobs, atol=1e-5)
    counts = np.arange(NEW)[None] < shared.lengths[:, None]
    expected = teacher_forced_logprobs(target, Sampling(1.0), shared)
    np.testing.assert_allclose(shared.logprobs[counts], expected[counts], atol=1e-5)


def test_when_prompts_are_shared(monkeypatch):
    """Not where rows wait for their turn: those that take their places follow other prompts."""
    target, answers = tiny_transformer(), []
    ask = decode_module.share_prompts

    def asked(**sizes):
        answers.append(ask(target, **sizes))
        return answers[-1]

    monkeypatch.setattr(decode_module, "share_prompts", lambda target, **sizes: asked(**sizes))
    common = dict(key=jr.key(0), max_new_tokens=4)
    decode(target, PROMPTS, samples=2, expected_lengths=[1.0, 3.0, 2.0], **common)
    decode(target, PROMPTS, samples=2, max_rows=4, **common)
    decode(target, PROMPTS, samples=1, **common)
    assert answers == [True, False, False]


def test_on_an_accelerator_prompts_are_shared_where_copies_are_large(monkeypatch):
    """16 MiB a layer are the limit; a CPU shares them always."""
    target = tiny_transformer()
    config = target.config
    position = 2 * config.num_kv_heads * config.head_dim * 4
    few = dict(prompts=1, width=(16 << 20) // (15 * position), samples=16, waiting=0, cache_dtype="float32")
    more = few | dict(samples=17)
    assert prompts_module.share_prompts(target, **few)
    monkeypatch.setattr(prompts_module, "platform_of", lambda tree: "gpu")
    assert not prompts_module.share_prompts(target, **few)
    assert prompts_module.share_prompts(target, **more)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("piece, spare", [(3, 0), (4, 0), (4, 5), (64, 0), (64, 5)])
def test_the_cache_alone(window, piece, spare, monkeypatch):
    """Blocks behind prompts of unequal length, with a rewind, against whole sequences; then with prompts unshared.

    Slots are read in pieces, and at once; there are more for prompts than these are padded to.
    """
    monkeypatch.setattr(_partial_attention, "_piece_length", lambda seq, slots: piece)
    jax.clear_caches()  # a block that was traced with other pieces
    target = tiny_transformer(sliding_window=window, qk_norm=True)
    rng = np.random.default_rng(0)
    width, lengths, samples, capacity = 6, jnp.array([2, 6], jnp.int32), 3, 8
    prompts = jnp.asarray(rng.integers(0, 13, (2, width)), jnp.int32)
    own = jnp.asarray(rng.integers(0, 13, (6, 5)), jnp.int32)
    place = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (2, width))
    _, cache = target.hidden(prompts, place, target.init_cache(2, width + spare, jnp.float32))
    rows = target.init_cache(6, capacity, jnp.float32)
    layers = tuple(SharedPromptCache(p, lengths, r) for p, r in zip(cache, rows, strict=True))
    starts = jnp.repeat(lengths, samples)[:, None]

    def expected(tokens):
        found = []
        for row in range(6):
            prompt = prompts[row // samples, : int(lengths[row // samples])]
            sequence = jnp.concatenate([prompt, tokens[row]])[None]
            found.append(sequence_features(target, sequence).last[0, len(prompt) :])
        return np.stack(found)

    def block(layers, first, tokens):
        positions = starts + first + jnp.arange(tokens.shape[1])[None]
        features, layers = target.hidden(tokens, positions, layers)
        return features.last, layers

    rejected = (own[:, :3] + 1) % 13
    _, layers = block(layers, 0, jnp.concatenate([own[:, :1], rejected[:, 1:]], axis=1))
    second, layers = block(layers, 1, own[:, 1:4])
    np.testing.assert_allclose(second, expected(own)[:, 1:4], atol=1e-5)
    chosen = jnp.array([5, 0, 3])
    alone = tuple(layer.unshared(chosen) for layer in layers)
    assert all(
        isinstance(layer, KVCache) and layer.values.shape == (3, 2, width + spare + capacity, 4) for layer in alone
    )
    positions = (starts + 4)[chosen]
    last, _ = target.hidden(own[chosen, 4:], positions, alone)
    np.testing.assert_allclose(last.last, expected(own)[chosen, 4:], atol=1e-5)


def test_a_prefix_for_training_is_the_same():
    target = tiny_transformer(sliding_window=4)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 13, (1, 9)), jnp.int32)
    place = jnp.arange(9, dtype=jnp.int32)[None]
    # Two of the prompt's five places are padding.
    padded = jnp.concatenate([tokens[:, :3], tokens[:, :2]], axis=1)
    prefix_pass = PrefixPass(jnp.array([3]), jnp.array([0]), jnp.array([6]))
    _, cache = target.hidden(padded, place[:, :5], (prefix_pass,) * 2)
    features, _ = target.hidden(tokens[:, 3:], place[:, 3:], cache)
    np.testing.assert_allclose(features.last, sequence_features(target, tokens).last[:, 3:], atol=1e-5)
