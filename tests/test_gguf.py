"""GGUF files written here, for what SmolLM2's own file does not cover."""

import io
import json

import gguf
import jax
import numpy as np
import pytest
import sentencepiece
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
    # As llama.cpp reads them: a factor without a type, also by its old name, is linear.
    for extra in ([("llama.rope.scaling.factor", 4.0)], [("llama.rope.scale_linear", 4.0)]):
        _write_model(path, "llama2", "llama", extra)
        assert load_model(path).config.rope_scaling == LinearRope(4.0)
    _write_model(path, "llama2", "llama", [("llama.rope.scaling.type", "none"), ("llama.rope.scaling.factor", 4.0)])
    assert load_model(path).config.rope_scaling is None
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


_INST = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


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
            case "space_prefix":
                writer.add_add_space_prefix(value)
            case "template":
                writer.add_chat_template(value)
            case "bos":
                writer.add_add_bos_token(value)
            case "eos":
                writer.add_add_eos_token(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _trained_sentencepiece(prefix: bool) -> sentencepiece.SentencePieceProcessor:
    """Of the kind that Llama 2 and Mistral have: bytes for what is not known, and no space taken away."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "hello the hell the hello Hello world the end INST [INST] [/INST]"] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_like_sentencepiece(prefix, tmp_path):
    """Each stretch between special tokens is a text of its own, as in mistral_common and llama.cpp (whose issues 2310
    and 8584 are about it). transformers' own reader of these files puts no space behind a special token."""
    theirs = _trained_sentencepiece(prefix)
    size = theirs.vocab_size()
    kinds = [(theirs.is_unknown, 2), (theirs.is_control, 3), (theirs.is_byte, 6)]
    types = [next((kind for test, kind in kinds if test(i)), 1) for i in range(size)]
    tokens, scores = [theirs.id_to_piece(i) for i in range(size)], [theirs.get_score(i) for i in range(size)]
    path = tmp_path / "t.gguf"
    _write_tokenizer(path, "llama", tokens, types, scores=scores, eot=5, space_prefix=prefix, template=_INST)
    ours = load_tokenizer(path)
    assert ours.eos_ids == (2, 5)
    for text in [*TEXTS, "hello the hell", " the  hello12\n", " Hello", "  a ", " ", "", "\u2581x", "<0x0A>"]:
        assert ours.encode(text) == [1, *theirs.encode(text)]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    first, second = theirs.encode("hello the"), theirs.encode(" hell")
    assert ours.encode("hello the</s> hell<s>") == [1, *first, 2, *second, 1]
    prompt = [{"role": "user", "content": "Hello the"}]
    assert ours.encode_prompt(prompt) == [1, *theirs.encode("[INST] Hello the [/INST]")]

    # Saved as a folder, it is the same tokenizer, for transformers too.
    ours.save(tmp_path / "saved")
    saved, hugging_face = load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in (*TEXTS, "hello the</s> hell<s>"):
        assert saved.encode(text) == ours.encode(text) == hugging_face(text)["input_ids"]


def test_what_goes_in_front_and_behind(tmp_path):
    tokens, types = ["<unk>", "<s>", "</s>", "a", "<x>"], [2, 3, 3, 1, 4]
    for flags, expected in (
        ({}, [1, 3]),
        ({"bos": False}, [3]),
        ({"eos": True}, [1, 3, 2]),
        ({"bos": False, "eos": True}, [3, 2]),
    ):
        _write_tokenizer(tmp_path / "t.gguf", "llama", tokens, types, scores=[0.0] * 5, space_prefix=False, **flags)
        ours = load_tokenizer(tmp_path / "t.gguf")
        assert ours.encode("a") == expected
        assert ours.encode("a<x>a<unk>", add_special_tokens=False) == [3, 4, 3, 0]
        assert ours.decode([1, 3, 4, 0, 2]) == "a<x>"


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
