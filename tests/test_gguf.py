"""GGUF files written here, for what SmolLM2's own file does not cover."""

import json

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from make_reference import REFERENCE, TEXTS
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from eqx_specgrpo.errors import CheckpointError
from eqx_specgrpo.models import LinearRope, Llama3Rope, load_model, load_tokenizer
from eqx_specgrpo.models._gguf import GGUFFile

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def _interleaved(array, heads):
    """Rows as llama.cpp wants them: dimension `i` of a head next to dimension `i + head_dim / 2`."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape)


def _write_model(path, name, architecture, extra=()):
    config = load_model(REFERENCE / name).config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for key, value in extra:
        if isinstance(value, np.ndarray):
            writer.add_tensor(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_float32(key, value)
    for tensor_name, array in load_file(REFERENCE / name / "model.safetensors").items():
        if architecture == "llama" and ".q_proj." in tensor_name:
            array = _interleaved(array, config.num_heads)
        if architecture == "llama" and ".k_proj." in tensor_name:
            array = _interleaved(array, config.num_kv_heads)
        for theirs, ours in _NAMES.items():
            tensor_name = tensor_name.replace(theirs, ours)
        writer.add_tensor(tensor_name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config


@pytest.mark.parametrize("name, architecture", [("llama2", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_same_weights_as_safetensors(name, architecture, tmp_path):
    _write_model(tmp_path / "m.gguf", name, architecture)
    found, expected = load_model(tmp_path / "m.gguf"), load_model(REFERENCE / name)
    # GGUF stores the two numbers in float32.
    assert found.config.norm_eps == pytest.approx(expected.config.norm_eps)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found.config.qkv_bias == expected.config.qkv_bias
    assert found.config.qk_norm == expected.config.qk_norm
    assert found.config.tie_embeddings == expected.config.tie_embeddings
    assert found.config.head_dim == expected.config.head_dim


def test_rope_scaling(tmp_path):
    path = tmp_path / "m.gguf"
    _write_model(path, "llama2", "llama", [("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 4.0)])
    assert load_model(path).config.rope_scaling == LinearRope(4.0)
    _write_model(path, "llama2", "llama", [("llama.rope.scaling.type", "yarn")])
    with pytest.raises(CheckpointError, match="'yarn' is not supported"):
        load_model(path)

    # Llama 3.1's divisors, as llama.cpp's converter computes them: one wavelength at a time.
    head_dim, theta = 64, 500000.0

    def divisors(factor, low, high, original):
        out = []
        for frequency in theta ** -(np.arange(0, head_dim, 2) / head_dim):
            wavelength = 2 * np.pi / frequency
            if wavelength < original / high:
                out.append(1.0)
            elif wavelength > original / low:
                out.append(factor)
            else:
                smooth = (original / wavelength - low) / (high - low)
                out.append(1 / ((1 - smooth) / factor + smooth))
        return np.array(out, np.float32)

    # The heads of the reference models are too small for it, so only this part is checked.
    for numbers, expected in (
        ((32.0, 1.0, 4.0, 8192), Llama3Rope(32.0, 1.0, 4.0, 8192)),
        ((8.0, 2.0, 4.0, 4096), None),
    ):
        _write_model(path, "llama2", "llama", [("rope_freqs.weight", divisors(*numbers))])
        file = GGUFFile(path)
        if expected is None:
            with pytest.raises(CheckpointError, match="rope_freqs.weight"):
                file._rope_scaling("llama", head_dim, theta)
        else:
            assert file._rope_scaling("llama", head_dim, theta) == expected


def test_unknown_tensor_and_architecture(tmp_path):
    path = tmp_path / "m.gguf"
    _write_model(path, "llama2", "llama", [("blk.0.attn_sinks.weight", np.ones(4, np.float32))])
    with pytest.raises(CheckpointError, match="1 unexpected: blk.0.attn_sinks.weight"):
        load_model(path)
    _write_model(path, "llama2", "gemma")
    with pytest.raises(CheckpointError, match="'gemma' is not supported; supported are llama"):
        load_model(path)
    _write_model(path, "llama2", "llama")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(path)
    with pytest.raises(CheckpointError, match="tokenizer.ggml.tokens"):
        _write_model(path, "llama2", "llama")
        load_tokenizer(path)


def _write_tokenizer(path, kind, tokens, types, **fields):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in fields.items():
        match key:
            case "pre":
                writer.add_tokenizer_pre(value)
            case "merges":
                writer.add_token_merges(value)
            case "scores":
                writer.add_token_scores(value)
            case "eot":
                writer.add_eot_token_id(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_sentencepiece_like_transformers(tmp_path):
    pieces = [
        "▁",
        "e",
        "t",
        "a",
        "o",
        "h",
        "l",
        "▁t",
        "he",
        "▁the",
        "ll",
        "hell",
        "hello",
        "▁hell",
        "lo",
        "▁hello",
        "1",
        "2",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    _write_tokenizer(tmp_path / "t.gguf", "llama", tokens, types, scores=scores, eot=5)
    ours, theirs = load_tokenizer(tmp_path / "t.gguf"), AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    assert ours.eos_ids == (2, 5)
    for text in [*TEXTS, "hello the hell", " the  loll12\nhello</s> a"]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"] and ids[0] == 1
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-2"])
def test_byte_level_like_transformers(pre, tmp_path):
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(
        [*TEXTS, "123 1234 's 'S it's \r\n\r\n  HelloWorld fooBar"] * 4,
        tokenizers.trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    vocabulary = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    merges = [" ".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    types = [3, 3, 3, *[1] * (len(tokens) - 3)]
    _write_tokenizer(tmp_path / "t.gguf", "gpt2", tokens, types, pre=pre, merges=merges)
    ours, theirs = load_tokenizer(tmp_path / "t.gguf"), AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    bos = [1] if pre in ("llama-bpe", "tekken") else []
    # Without the last: transformers adds a token <|endoftext|> to vocabularies that have none.
    for text in [*TEXTS[:-1], "12345 it'S HelloWorld fooBar\r\n\r\n"]:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == bos + ids
        assert ours.decode(ids, skip_special_tokens=False) == text

    _write_tokenizer(tmp_path / "t.gguf", "gpt2", tokens, types, pre="viking", merges=merges)
    with pytest.raises(CheckpointError, match="'viking' is not supported; supported are llama-bpe"):
        load_tokenizer(tmp_path / "t.gguf")
