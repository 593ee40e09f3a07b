"""A real checkpoint: SmolLM2-135M-Instruct from its GGUF file, and from a safetensors folder that we wrote."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from make_reference import POSITIONS, REFERENCE, TEXTS, reference_logprobs
from smollm2 import find_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from eqx_specgrpo.models import load_pretrained, load_tokenizer, save_model, sequence_features

FOLDER = REFERENCE / "smollm2_135m_gguf"
CHATS = [
    [{"role": "user", "content": "What is 2+2?"}],
    [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "  17 * 23 =\n"},
    ],
]


@pytest.fixture(scope="module")
def pretrained():
    try:
        path = find_gguf()
    except FileNotFoundError as error:
        pytest.fail(str(error))
    return load_pretrained(path)


@pytest.fixture(scope="module")
def saved(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "policy"
    model, tokenizer = pretrained
    save_model(model, folder, tokenizer)
    return folder


@eqx.filter_jit
def _logprobs(model, tokens):
    return jax.nn.log_softmax(model.unembed(sequence_features(model, tokens).last))


def _assert_equal_but_for_rounding(found, expected):
    """That log-probabilities (in float32) of SmolLM2 differ by rounding alone.

    Which rounding is the processor's matter: sums are made in the order that its vectors suggest. With AVX2 the root
    mean square is 1.6e-5 (transformers in float32: 1.8e-5) and the worst of 64 x 49,152 values 2.3e-4 (at a token of
    probability e^-26); with AVX-512 the worst is below 1e-4. So the mean is bounded tightly, the worst value loosely.
    """
    difference = found.astype(np.float64) - expected
    assert np.sqrt(np.mean(difference**2)) < 4e-5
    assert np.abs(difference).max() < 5e-4


def test_logprobs(pretrained, saved):
    expected = np.load(FOLDER / "expected.npz")
    tokens = expected["tokens"]
    assert tokens.shape == (1, POSITIONS)
    model, _ = pretrained
    found = np.asarray(_logprobs(model, jnp.asarray(tokens)))
    columns = np.take_along_axis(found[0], expected["columns"], axis=1)
    _assert_equal_but_for_rounding(columns, expected["logprobs"])

    # With the cache: the first half as one block, the rest as another.
    half = POSITIONS // 2
    cache = model.init_cache(1, POSITIONS, jnp.float32)
    step = eqx.filter_jit(lambda m, t, p, c: m.hidden(t, p, c))
    blocks = []
    for start in (0, half):
        positions = jnp.arange(start, start + half, dtype=jnp.int32)[None]
        features, cache = step(model, jnp.asarray(tokens[:, start : start + half]), positions, cache)
        blocks.append(jax.nn.log_softmax(model.unembed(features.last)))
    _assert_equal_but_for_rounding(np.concatenate(blocks, axis=1), found)

    # From safetensors, by us and by transformers.
    again, _ = load_pretrained(saved)
    assert eqx.tree_equal(again, model)
    theirs = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval().double()
    _assert_equal_but_for_rounding(found, reference_logprobs(theirs, tokens))
    assert theirs.generation_config.eos_token_id == 2


def test_tokenization(pretrained, saved):
    _, tokenizer = pretrained
    assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.bos_token) == ((2,), 2, "<|im_start|>")
    # What the published checkpoint's tokenizer.json gives. It splits off digits before anything else; transformers,
    # which rebuilds the tokenizer from the GGUF without that step, differs in the last two.
    assert tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.encode("Café déjà vu.") == [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]
    assert tokenizer.encode("  multiple   spaces") == [216, 2701, 256, 5600]
    assert len(tokenizer.encode(" ½ ٣")) == len(tokenizer.encode(" ")) * 2 + len(tokenizer.encode("½")) + len(
        tokenizer.encode("٣")
    )
    assert tokenizer.encode("  1") == [tokenizer.backend.token_to_id("ĠĠ"), 33]

    committed = json.loads((FOLDER / "tokenization.json").read_text())
    assert [entry["text"] for entry in committed] == TEXTS
    theirs = AutoTokenizer.from_pretrained(saved)
    for entry in committed:
        ids = tokenizer.encode(entry["text"])
        assert ids == entry["ids"] == theirs(entry["text"])["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == entry["text"]


def test_chat(pretrained, saved):
    _, tokenizer = pretrained
    again = load_tokenizer(saved)
    theirs = AutoTokenizer.from_pretrained(saved)
    for chat in CHATS:
        text = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert tokenizer.apply_chat_template(chat) == again.apply_chat_template(chat) == text
        assert tokenizer.encode_prompt(chat) == again.encode_prompt(chat) == ids
        assert text.endswith("<|im_start|>assistant\n")
    assert again.eos_ids == tokenizer.eos_ids
