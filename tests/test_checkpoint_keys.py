"""Every key of a checkpoint is read, harmless or refused: the tables know all that transformers and gguf write."""

import json
import shutil
import warnings

import gguf
import pytest
import torch
from make_reference import REFERENCE
from transformers import AutoConfig, GenerationConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from eqx_specgrpo.errors import CheckpointError
from eqx_specgrpo.models import CHECKPOINT_KEYS, CheckpointWarning, load_model, load_tokenizer, rope_frequencies
from eqx_specgrpo.models._hf_config import config_from_hf
from eqx_specgrpo.models._hf_families import FAMILIES
from eqx_specgrpo.models._keys import check_keys, rule_of
from eqx_specgrpo.models._rope import rope_attention_factor

CONFIG, ROPE = CHECKPOINT_KEYS["`config.json`"], list(CHECKPOINT_KEYS.values())[2]
GENERATION, GGUF = CHECKPOINT_KEYS["`generation_config.json`"], CHECKPOINT_KEYS["Metadata of `.gguf` files"]


def _values(family="llama", **changes):
    values = dict(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
    return {"model_type": family, "max_position_embeddings": 128, "num_key_value_heads": 2, **values, **changes}


def _config(values):
    return config_from_hf(json.loads(json.dumps(values)), REFERENCE / "config.json")


def test_each_key_has_one_rule():
    for title, table in CHECKPOINT_KEYS.items():
        names = [name for rule in table for name in rule.names]
        assert len(names) == len(set(names)), title
        assert all(rule.why for rule in table)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_transformers_writes_of_a_family(family, tmp_path):
    config = AutoConfig.for_model(family)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    attributes = [key for key in vars(config) if not key.startswith("_")]
    for key in {*config.to_dict(), *written, *attributes}:
        assert rule_of(key, CONFIG) is not None, f"transformers writes {key} of {family}: read, harmless or refused?"
    nested = [value for value in config.rope_parameters.values() if isinstance(value, dict)]
    for key in {key for values in nested or [config.rope_parameters] for key in values}:
        assert rule_of(key, ROPE) is not None, key
    # And its defaults, in full, are a model that loads without a warning.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _config({**config.to_dict(), "model_type": family})


def test_all_sampling_options_of_transformers():
    for key in GenerationConfig().to_dict():
        assert rule_of(key, GENERATION) is not None, key


def test_all_rope_keys_of_transformers():
    from transformers.modeling_rope_utils import RopeParameters

    for key in RopeParameters.__annotations__:
        assert rule_of(key, ROPE) is not None, key


def test_all_keys_of_gguf():
    def names(namespace):
        for name, value in vars(namespace).items():
            if isinstance(value, type):
                yield from names(value)
            elif isinstance(value, str) and not name.startswith("_"):
                yield value

    found = list(names(gguf.Keys))
    assert len(found) > 200 and "{arch}.attention.causal" in found
    for key in found:
        assert rule_of(key, GGUF) is not None, key


def test_refused_keys_are_refused_and_neutral_ones_are_not():
    """Each refused key by a value of its own, and each with what means that it is off."""
    count = 0
    for rule in CONFIG:
        for key in rule.names if rule.treatment == "refused" else ():
            count += 1
            for neutral in (*rule.neutral, "", [], {}):
                _config(_values(**{key: neutral}))
            odd = False if True in rule.neutral else 2.5
            if odd not in rule.neutral:
                with pytest.raises(CheckpointError) as caught:
                    _config(_values(**{key: odd}))
                assert f"'{key}' is {odd}" in str(caught.value) and rule.why in str(caught.value)
    assert count > 50


def test_unknown_keys_are_named_once_and_loading_goes_on():
    with pytest.warns(CheckpointWarning) as caught:
        config = _config(_values(novel_scale=0.3, novel_name="x" * 100, off=False, nothing=None, none=[]))
    assert config == _config(_values())
    (message,) = [str(warning.message) for warning in caught]
    assert "'novel_scale' (0.3), 'novel_name' ('xxx" in message and "..." in message
    assert "off" not in message and "noth" not in message and "none" not in message


@pytest.mark.parametrize(
    "family, changes, words",
    [
        # Options of one family in the file of another, which transformers passes over.
        ("llama", dict(sliding_window=16), ["sliding_window", "llama"]),
        ("llama", dict(use_sliding_window=True), ["use_sliding_window"]),
        ("mistral", dict(use_sliding_window=True), ["use_sliding_window"]),
        ("mistral", dict(sliding_window=16, layer_types=["full_attention"] * 2), ["layer_types", "delete"]),
        ("qwen2", dict(layer_types=["full_attention"]), ["1 layers", "2"]),
        ("llama", dict(architectures=["LlamaForSequenceClassification"]), ["LlamaForCausalLM"]),
        ("llama", dict(rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 32}), ["beta_fast"]),
        ("llama", dict(rope_scaling={"rope_type": "default", "factor": 2.0}), ["factor", "default"]),
        # transformers takes the type of Gemma 3's from `rope_type` alone.
        ("gemma3_text", dict(rope_scaling={"type": "linear", "factor": 2.0}), ["factor", "default"]),
        ("llama", dict(embedding_multiplier=2.0), ["embedding_multiplier", "llama"]),
        ("qwen3", dict(final_logit_softcapping=30.0), ["final_logit_softcapping", "qwen3"]),
        ("granite", dict(no_rope_layers=[1, 0]), ["no_rope_layers", "granite"]),
        ("phi3", dict(sliding_window=9, layer_types=["full_attention"] * 2), ["layer_types", "delete"]),
        ("llama", dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "low_freq_factor": 2}), ["low_freq_factor"]),
    ],
)
def test_contradictions(family, changes, words):
    with pytest.raises(CheckpointError) as caught:
        _config(_values(family, **changes))
    for word in words:
        assert word in str(caught.value)


def test_absent_keys_mean_what_they_mean_in_transformers():
    for family in FAMILIES:
        values = _values(family, num_attention_heads=64, hidden_size=128, sliding_window=None)
        for stated in (values, {key: value for key, value in values.items() if key != "num_key_value_heads"}):
            theirs = AutoConfig.for_model(**stated)
            ours = _config(stated)
            assert ours.num_kv_heads == theirs.num_key_value_heads
            assert ours.norm_eps == theirs.rms_norm_eps
            assert ours.tie_embeddings == theirs.tie_word_embeddings
    for family in ("gemma2", "gemma3_text"):
        values = _values(family)
        del values["head_dim"]
        theirs, ours = AutoConfig.for_model(**values), _config(values)
        assert (ours.head_dim, ours.final_logit_softcapping) == (theirs.head_dim, theirs.final_logit_softcapping)
        assert ours.attn_logit_softcapping == theirs.attn_logit_softcapping
        assert (ours.attention_multiplier or ours.head_dim**-0.5) == theirs.query_pre_attn_scalar**-0.5


_LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
_LINEAR = dict(type="linear", factor=4.0)
_YARN = dict(rope_type="yarn", factor=4.0, beta_fast=4.0, original_max_position_embeddings=32)
_LONG = dict(rope_type="longrope", short_factor=[1.0 + i for i in range(8)], long_factor=[9.0] * 8)


@pytest.mark.parametrize(
    "stated",
    [
        dict(rope_scaling=_LLAMA3),
        dict(rope_scaling=_LLAMA3 | dict(original_max_position_embeddings=64)),
        dict(rope_scaling=_LLAMA3, original_max_position_embeddings=32),
        dict(rope_scaling=_LLAMA3 | dict(original_max_position_embeddings=64), original_max_position_embeddings=32),
        dict(rope_parameters=_LLAMA3, original_max_position_embeddings=32, rope_theta=5e5),
        dict(rope_parameters=_LLAMA3 | dict(rope_theta=100.0), rope_theta=5e5),
        dict(rope_scaling=_LINEAR, rope_theta=5e5),
        dict(rope_scaling=_LINEAR | dict(rope_theta=100.0), rope_theta=5e5),
        dict(rope_scaling=_LINEAR, rope_parameters=_LLAMA3 | dict(rope_theta=100.0)),
        dict(rope_scaling=_LINEAR, original_max_position_embeddings=32),
        dict(rope_scaling={}, rope_parameters=_LINEAR),
        dict(rope_scaling=None, rope_theta=700, original_max_position_embeddings=32),
        dict(rope_scaling=dict(type="dynamic", factor=4.0), rope_theta=700),
        dict(rope_parameters=_YARN),
        dict(rope_parameters=_YARN, original_max_position_embeddings=16),
        dict(rope_scaling=dict(type="yarn", factor=4.0), rope_theta=500),
        dict(rope_parameters=_YARN | dict(attention_factor=0.75, beta_slow=0.5, truncate=False)),
        dict(rope_parameters=_YARN | dict(mscale=0.7, mscale_all_dim=1.3)),
        dict(rope_parameters=_YARN | dict(mscale=0.7)),
        dict(rope_parameters=_YARN | dict(factor=1.0)),
        dict(rope_parameters=_LONG | dict(factor=2.0), original_max_position_embeddings=64),
        dict(rope_parameters=_LONG | dict(original_max_position_embeddings=64)),
        dict(rope_parameters=_LONG | dict(attention_factor=1.5), rope_theta=500),
    ],
)
def test_rope_wherever_it_is_stated(stated):
    """Frequencies like transformers', whichever of the four places says what."""
    values = _values(**json.loads(json.dumps(stated)))
    ours = _config(values)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(values))))
    found = torch.tensor(rope_frequencies(ours.head_dim, ours.rope_theta, ours.rope_scaling)).float()
    torch.testing.assert_close(found, theirs.inv_freq, atol=0, rtol=2e-6)
    assert rope_attention_factor(ours.rope_scaling) == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize(
    "stated",
    [
        {},
        dict(rope_theta=5e5, rope_local_base_freq=300.0),
        dict(rope_theta=5e5, rope_scaling=dict(rope_type="linear", factor=4.0)),
        dict(rope_parameters=dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=100.0))),
        dict(rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=7.0)), rope_theta=70.0),
    ],
)
def test_both_ropes_of_gemma3(stated):
    values = _values("gemma3_text", sliding_window=16, **json.loads(json.dumps(stated)))
    values["layer_types"] = ["sliding_attention", "full_attention"]
    ours = _config(values)
    theirs = Gemma3RotaryEmbedding(AutoConfig.for_model(**json.loads(json.dumps(values))))
    found = [torch.tensor(rope_frequencies(ours.head_dim, *rope)).float() for rope in ours.ropes]
    torch.testing.assert_close(found[ours.rope(0)], theirs.sliding_attention_inv_freq, atol=0, rtol=2e-6)
    torch.testing.assert_close(found[ours.rope(1)], theirs.full_attention_inv_freq, atol=0, rtol=2e-6)


def test_the_parts_of_a_head_that_turn_in_phi3():
    short = dict(short_factor=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], long_factor=[8.0] * 6)
    for stated in (
        dict(partial_rotary_factor=0.75),
        dict(rope_parameters=dict(partial_rotary_factor=0.5)),
        dict(partial_rotary_factor=0.75, rope_scaling=dict(short, type="su", original_max_position_embeddings=64)),
        dict(partial_rotary_factor=0.75, rope_scaling=dict(short, type="yarn", original_max_position_embeddings=9)),
    ):
        values = _values("phi3", max_position_embeddings=8192, **json.loads(json.dumps(stated)))
        ours = _config(values)
        theirs = Phi3RotaryEmbedding(AutoConfig.for_model(**json.loads(json.dumps(values))))
        found = torch.tensor(rope_frequencies(ours.rotary_dim, ours.rope_theta, ours.rope_scaling)).float()
        torch.testing.assert_close(found, theirs.inv_freq, atol=0, rtol=2e-6)
        assert rope_attention_factor(ours.rope_scaling) == pytest.approx(theirs.attention_scaling)


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    shutil.copytree(REFERENCE / "smollm2", tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter_config.json.*merge it first"):
        load_model(tmp_path / "m")


def test_gguf_keys(tmp_path):
    """What is refused names the key; what is not known is a warning, for the tokenizer alone too."""

    def write(*fields):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_context_length(16)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
        writer.add_token_scores([0.0] * 4)
        for key, value in fields:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return load_tokenizer(tmp_path / "m.gguf")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(("general.name", "x"), ("llama.attention.causal", True), ("llama.logit_scale", 1.0), ("split.count", 1))
    for key, value in (
        ("llama.attention.causal", False),
        ("llama.logit_scale", 2.0),
        ("llama.expert_count", 8),
        ("llama.rope.scaling.attn_factor", 0.5),
        ("tokenizer.ggml.remove_extra_whitespaces", True),
        ("split.count", 2),
        ("general.type", "adapter"),
    ):
        with pytest.raises(CheckpointError, match="not supported") as caught:
            write((key, value))
        assert key.replace("llama.", "{arch}.") in str(caught.value)
    with pytest.warns(CheckpointWarning, match="'{arch}.novelty' \\(0.5\\)"):
        write(("llama.novelty", 0.5))


def test_rules_by_family():
    table = [rule for rule in CONFIG if "sliding_window" in rule.names]
    check_keys({"sliding_window": 8}, table, "x", "mistral")
    with pytest.raises(CheckpointError, match="llama has no such option"):
        check_keys({"sliding_window": 8}, table, "x", "llama")
