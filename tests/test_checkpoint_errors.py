"""Bad checkpoints get a sentence that names the culprit; nothing is loaded, and nothing that was there is lost."""

import errno
import json
import shutil
import struct

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from make_reference import REFERENCE
from safetensors.numpy import load_file, save_file

from eqx_specgrpo.errors import CheckpointError, UserError
from eqx_specgrpo.models import (
    Transformer,
    TransformerConfig,
    _checkpoint,
    _locate,
    _safetensors,
    load_model,
    load_model_config,
    load_pretrained,
    load_tokenizer,
    save_model,
)


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint (tied embeddings), to be damaged."""
    shutil.copytree(REFERENCE / "smollm2", tmp_path / "model")
    return tmp_path / "model"


def _edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def _edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def _fails(path, *words, load=load_model):
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    for word in words:
        assert str(word) in message, message
    assert caught.value.exit_code == 2


def test_the_undamaged_one_loads(folder):
    load_model(folder)


def test_missing_files(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "elsewhere")
    _fails(folder, folder, "model.safetensors", "model.safetensors.index.json")
    (folder / "pytorch_model.bin").touch()
    _fails(folder, "pytorch_model.bin", "pickle", "never read")
    (folder / "model.gguf").touch()
    _fails(folder, folder / "model.gguf")
    (folder / "config.json").unlink()
    _fails(folder, folder / "config.json", "missing")
    _fails(tmp_path / "nowhere", tmp_path / "nowhere", "does not exist")
    _fails("./a/typo", "does not exist")
    _fails("typo.gguf", "typo.gguf", "does not exist")
    adapter = tmp_path / "lora" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    for place in (adapter.parent, adapter):
        _fails(place, "an adapter and no model: give its base as --model", f"--adapter {adapter}")
    _fails(folder / "elsewhere", "is a file")


@pytest.mark.parametrize("damage", ["truncated", "empty", "corrupt", "header", "longer"])
def test_damaged_weights(folder, damage):
    path = folder / "model.safetensors"
    good = path.read_bytes()
    bad = {
        "truncated": good[:-100],
        "empty": b"",
        "corrupt": b"\xff" * 1000,
        "header": good[:8] + b"}" + good[9:],
        "longer": good + b"\0" * 8,
    }
    path.write_bytes(bad[damage])
    _fails(folder, path, "truncated or corrupt", "again")


def test_damaged_config(folder):
    for text in ("{", "", "\udcff"):
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        _fails(folder, folder / "config.json", "JSON")
    (folder / "config.json").write_text("[1]")
    _fails(folder, folder / "config.json", "object")


def test_missing_unexpected_and_misshapen_tensors(folder):
    norm, extra = "model.norm.weight", "model.layers.0.self_attn.sinks"
    query = "model.layers.1.self_attn.q_proj.weight"

    _edit_tensors(folder, lambda t: t.pop(norm))
    _fails(folder, folder, "1 missing", norm)

    def more(tensors):
        tensors[extra] = np.zeros(3, np.float32)
        tensors[query] = tensors[query][:-2]

    _edit_tensors(folder, more)
    _fails(
        folder, "1 missing", norm, "1 unexpected", extra, "1 of the wrong shape", query, "[22, 24] instead of [24, 24]"
    )

    # Many: the first five and a count.
    _edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if ".layers." in name and name != extra])
    _fails(folder, "28 missing", "and 23 more")


def test_harmless_buffers_are_ignored(folder):
    _edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    load_model(folder)


def test_tied_unembedding(folder):
    _edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert load_model(folder).unembedding is None
    _edit_tensors(folder, lambda t: t["lm_head.weight"].__setitem__((3, 3), 7.0))
    _fails(folder, "lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings")
    _edit_config(folder, tie_word_embeddings=False)
    assert load_model(folder).unembedding[3, 3] == 7.0
    _edit_tensors(folder, lambda t: t.pop("lm_head.weight"))
    _fails(folder, "1 missing", "lm_head.weight")


def test_quantized_tensors(folder):
    _edit_tensors(folder, lambda t: t.update({"model.norm.weight": np.ones(24, np.int8)}))
    _fails(folder, "model.norm.weight", "I8", "F32")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="gpt2"), ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma3_text"]),
        (dict(model_type="gemma3"), ["'gemma3' is not supported"]),
        (dict(model_type="smollm3", no_rope_layers=[1, 0]), ["no_rope_layers", "3 times"]),
        (dict(model_type="gemma3_text", rope_parameters={"rope_type": "default"}), ["rope_parameters", "Gemma 3"]),
        (dict(model_type="gemma2", hidden_activation="relu"), ["hidden_activation", "gelu_pytorch_tanh"]),
        (dict(model_type=None), ["None", "llama"]),
        (dict(rope_parameters={"rope_type": "axial", "factor": 4.0}), ["axial", "default", "linear", "yarn"]),
        (dict(rope_parameters=None, rope_scaling={"type": "ntk", "factor": 2.0}), ["ntk", "llama3"]),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "short_factor": [1.0]}), ["short_factor", "yarn"]),
        (dict(rope_parameters={"rope_type": "longrope", "short_factor": 2}), ["short_factor", "list"]),
        (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), ["rope_parameters", "flat"]),
        (dict(rope_parameters={"rope_type": "linear"}), ["factor"]),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor"]),
        (dict(hidden_act="gelu"), ["gelu", "silu"]),
        (dict(quantization_config={"quant_method": "gptq"}), ["quantization_config", "unquantized"]),
        (dict(hidden_size=None), ["hidden_size"]),
        (dict(hidden_size="24"), ["hidden_size", "'24'"]),
        (dict(num_key_value_heads=2), ["num_kv_heads", "multiple"]),
        (dict(head_dim=7), ["head_dim", "even"]),
        (
            dict(model_type="qwen2", use_sliding_window=False, layer_types=["sliding_attention"] * 3),
            ["layer_types", "sliding_window None"],
        ),
        (dict(layer_types=["full_attention", "linear_attention", "full_attention"]), ["linear_attention"]),
    ],
)
def test_unsupported_configurations(folder, changes, words):
    _edit_config(folder, **changes)
    _fails(folder, folder / "config.json", *words)


def test_damaged_shards(tmp_path):
    model = load_model(REFERENCE / "smollm2")
    save_model(model, tmp_path / "m", shard_bytes=20_000)
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 2
    index = tmp_path / "m" / "model.safetensors.index.json"
    good_index, good_shard = index.read_text(), shards[1].read_bytes()

    shards[1].write_bytes(good_shard[:-5])
    _fails(tmp_path / "m", shards[1], "truncated")
    shards[1].unlink()
    _fails(tmp_path / "m", index, shards[1].name, "1 missing")
    shards[1].write_bytes(good_shard)

    values = json.loads(good_index)
    index.write_text(json.dumps({**values, "weight_map": {**values["weight_map"], "ghost": shards[0].name}}))
    _fails(tmp_path / "m", index, "ghost")
    index.write_text(json.dumps({**values, "weight_map": {"a": "../../etc/passwd"}}))
    _fails(tmp_path / "m", index, "../../etc/passwd", "outside")
    index.write_text("{}")
    _fails(tmp_path / "m", index, "weight_map")
    index.write_text(good_index)
    load_model(tmp_path / "m")


def test_no_network(monkeypatch):
    def offline(name, **_):
        raise ConnectionError("Network is unreachable\nlong trace")

    monkeypatch.setattr(_locate, "snapshot_download", offline)
    for load in (load_model, load_tokenizer, load_pretrained):
        _fails("no-such-org/no-such-model", "no-such-org/no-such-model", "Network is unreachable", "network", load=load)


def test_download(monkeypatch, folder):
    asked = []

    def download(name, revision, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns, revision))
        return str(folder)

    monkeypatch.setattr(_locate, "snapshot_download", download)
    load_model("org/name")
    assert asked[0][0] == "org/name" and not any(
        p.endswith((".bin", ".py", "*")) for p in asked[0][1] if p != "tokenizer*"
    )
    load_model("org/name", revision="v2")
    for load in (load_tokenizer, load_pretrained):  # there is none in this folder
        with pytest.raises(CheckpointError):
            load("org/name", revision="v3")

    def download_file(name, file, revision):
        asked.append((name, file, revision))
        return str(folder / file)

    monkeypatch.setattr(_locate, "hf_hub_download", download_file)
    load_model_config("org/name", revision="v4")
    assert [revision for *_, revision in asked] == [None, "v2", "v3", "v3", "v4"]
    for load in (load_model, load_tokenizer, load_pretrained, load_model_config):
        with pytest.raises(CheckpointError, match="model.revision = 'v2' is of a model by name.* but .* is here"):
            load(folder, revision="v2")


def test_gguf(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 5))
    _fails(path, path, "truncated, corrupt")
    path.write_bytes(b"nonsense" * 10)
    _fails(path, path, "no GGUF file")
    _fails(path, path, load=load_tokenizer)
    # `None` in sys.modules is what an absent package looks like to an import.
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    _fails(path, path, 'pip install "eqx_specgrpo[gguf]"')


def test_save_refuses_what_it_cannot_represent(tmp_path):
    config = TransformerConfig(8, 8, 8, 1, 2, 2, 4, 16, output_bias=True)
    with pytest.raises(CheckpointError, match="output_bias=True"):
        save_model(Transformer(config, key=jr.key(0)), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="float16"):
        save_model(load_model(REFERENCE / "qwen2"), tmp_path / "x", dtype=jnp.float16)


def test_save_does_not_replace_strangers(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="not a checkpoint"):
        save_model(load_model(REFERENCE / "qwen2"), tmp_path / "work")
    assert [p.name for p in tmp_path.iterdir()] == ["work"]
    assert (tmp_path / "work" / "thesis.tex").exists()


@pytest.mark.parametrize("where", ["weights", "json"])
def test_full_disk_loses_nothing(tmp_path, monkeypatch, where):
    old, new = load_model(REFERENCE / "qwen2"), load_model(REFERENCE / "qwen3")
    save_model(old, tmp_path / "m")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "weights":
        monkeypatch.setattr(_safetensors, "write_tensor_file", full)
    else:
        monkeypatch.setattr(_checkpoint.json, "dumps", full)
    with pytest.raises(UserError, match="disk is full"):
        save_model(new, tmp_path / "m")
    monkeypatch.undo()
    assert load_model(tmp_path / "m").config == old.config
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    save_model(new, tmp_path / "m")
    assert load_model(tmp_path / "m").config == new.config
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
