"""The same log-probabilities as transformers, in float32 and within 1e-4, for every family."""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import quick_compilation
from make_reference import (
    COMMITTED,
    CONFIGS,
    POSITIONS,
    REFERENCE,
    VOCAB,
    random_model,
    random_tokens,
    reference_logprobs,
    take_frequencies,
)
from transformers import AutoModelForCausalLM

from eqx_specgrpo.models import cast_weights, load_model, save_model, sequence_features


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@eqx.filter_jit
def _logprobs(model, tokens):
    return jax.nn.log_softmax(model.unembed(sequence_features(model, tokens).last))


@eqx.filter_jit
def _step(model, tokens, positions, cache):
    features, cache = model.hidden(tokens, positions, cache)
    return jax.nn.log_softmax(model.unembed(features.last)), cache


def _logprobs_with_cache(model, tokens):
    """Two rows with the same tokens and cursors of their own, in uneven blocks.

    The second row's first block is rubbish that is then overwritten, so that it lags behind; at the end, the first row
    rewinds and repeats its last block.
    """
    blocks = [(0, 0, 7), (7, 0, 1), (8, 1, 28), (36, 29, 28), (57, 57, 7)]
    rubbish = np.full((1, 7), 3, np.int32)
    cache = model.init_cache(2, POSITIONS, jnp.float32)
    found = np.full((2, *tokens.shape[1:], model.vocab_size), np.nan, np.float32)
    for index, (first, second, size) in enumerate(blocks):
        rows = [tokens[:, first : first + size], tokens[:, second : second + size] if index else rubbish]
        positions = np.array([[first], [second]], np.int32) + np.arange(size, dtype=np.int32)
        logprobs, cache = _step(model, jnp.asarray(np.concatenate(rows)), jnp.asarray(positions), cache)
        found[0, first : first + size] = logprobs[0]
        found[1, second : second + size] = logprobs[1]
    return found


@pytest.mark.parametrize("name", COMMITTED)
def test_committed(name):
    expected = np.load(REFERENCE / name / "expected.npz")
    tokens, logprobs = expected["tokens"], expected["logprobs"]
    assert logprobs.shape == (1, POSITIONS, VOCAB)
    model = load_model(REFERENCE / name)
    np.testing.assert_allclose(_logprobs(model, jnp.asarray(tokens)), logprobs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(_logprobs_with_cache(model, tokens), np.repeat(logprobs, 2, axis=0), atol=1e-4, rtol=0)


def _transformers_logprobs(folder: Path, tokens: np.ndarray, dtype=torch.float32) -> np.ndarray:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return reference_logprobs(model.float().eval(), tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_live_and_back(name, tmp_path):
    reference, tokens = random_model(name, seed=1234), random_tokens(VOCAB, seed=4321)
    expected = reference_logprobs(reference, tokens)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    np.testing.assert_allclose(_logprobs(model, jnp.asarray(tokens)), expected, atol=1e-4, rtol=0)

    save_model(model, tmp_path / "ours")
    np.testing.assert_allclose(_transformers_logprobs(tmp_path / "ours", tokens), expected, atol=1e-4, rtol=0)
    again = load_model(tmp_path / "ours")
    assert again.config == model.config
    assert eqx.tree_equal(again, model)

    # Sharded and in bfloat16: what is stored is the rounded matrices.
    save_model(model, tmp_path / "small", dtype=jnp.bfloat16, shard_bytes=8000)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 1
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), cast_weights(model, jnp.bfloat16))
    assert eqx.tree_equal(load_model(tmp_path / "small"), rounded)
    assert eqx.tree_equal(load_model(tmp_path / "small", jnp.bfloat16), cast_weights(model, jnp.bfloat16))
    np.testing.assert_allclose(
        _transformers_logprobs(tmp_path / "small", tokens), _logprobs(rounded, jnp.asarray(tokens)), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(("name", "more"), [("mistral", {"sliding_window": 300}), ("smollm2", {})])
def test_long_sequences(name, more, tmp_path):
    """Attention goes by blocks here. So far along, the last bit of a rotary frequency shows: both take ours."""
    reference = random_model(name, seed=77, max_position_embeddings=4096, **more)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    tokens = np.random.default_rng(5).integers(0, VOCAB, (1, 2048), dtype=np.int32)
    take_frequencies(reference, model)
    expected = reference_logprobs(reference, tokens)
    np.testing.assert_allclose(_logprobs(model, jnp.asarray(tokens)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "olmo2"])
def test_every_parameter_matters(name):
    # What makes the tests above able to fail: a change of any array of the model shows.
    model = load_model(REFERENCE / name)
    tokens = jnp.asarray(random_tokens(VOCAB, seed=0))
    before = _logprobs(model, tokens)
    leaves, structure = jax.tree.flatten(model)
    for index, leaf in enumerate(leaves):
        changed = jax.tree.unflatten(structure, leaves[:index] + [leaf * 0.9 + 0.02] + leaves[index + 1 :])
        assert jnp.max(jnp.abs(_logprobs(changed, tokens) - before)) > 1e-3


def test_older_config_style(tmp_path):
    # As transformers 4 wrote it: rope_theta and rope_scaling at the top level, no head_dim, torch_dtype.
    for name, old in {
        "llama3": {
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        "llama_linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "smollm2": {"rope_theta": 100000, "rope_scaling": None},
    }.items():
        values = json.loads((REFERENCE / name / "config.json").read_text())
        expected = load_model(REFERENCE / name).config
        for key in ("rope_parameters", "head_dim", "dtype", "attention_bias", "mlp_bias"):
            del values[key]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**values, **old, "torch_dtype": "float32"}))
        (folder / "model.safetensors").write_bytes((REFERENCE / name / "model.safetensors").read_bytes())
        assert load_model(folder).config == expected


def test_window_that_never_cuts_is_none(tmp_path):
    values = json.loads((REFERENCE / "mistral" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((REFERENCE / "mistral" / "model.safetensors").read_bytes())
    for window, expected in ((None, None), (128, None), (4096, None), (127, 127)):
        (tmp_path / "config.json").write_text(json.dumps({**values, "sliding_window": window}))
        assert load_model(tmp_path).config.sliding_window == expected
