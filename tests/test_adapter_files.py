"""Adapters in PEFT's format: PEFT loads ours, we load PEFT's, and what belongs to another base is refused."""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_run import tiny_model

from eqx_specgrpo.errors import CheckpointError, UserError
from eqx_specgrpo.grpo import compute_copy
from eqx_specgrpo.models import (
    ALL_LINEAR,
    AdaptedTransformer,
    Adapters,
    CheckpointWarning,
    describe_adapter,
    load_adapter,
    load_model,
    save_adapter,
    save_model,
    sequence_features,
)

REFERENCE = Path(__file__).parent / "reference"


def moved(adapters: Adapters) -> Adapters:
    keys = iter(jr.split(jr.key(7), 2 * len(adapters.layers)))
    return jax.tree.map(lambda x: x + 0.1 * jr.normal(next(keys), x.shape), adapters)


def logits_of(model, tokens):
    return np.asarray(model.unembed(sequence_features(model, jnp.asarray(tokens)).last))


@pytest.mark.parametrize(
    "family, targets", [("llama2", ALL_LINEAR), ("phi3", ["qkv_proj", "model.layers.1.mlp.down_proj"])]
)
def test_peft_loads_ours(family, targets, tmp_path):
    base = load_model(REFERENCE / family)
    policy = AdaptedTransformer(base, moved(Adapters.fresh(base.config, 3, 8.0, targets, key=jr.key(0))))
    save_adapter(policy.adapters, tmp_path / "a", base, "the base")

    plain = transformers.AutoModelForCausalLM.from_pretrained(REFERENCE / family, dtype=torch.float32).eval()
    tokens = np.arange(24).reshape(2, 12) % base.vocab_size
    with torch.no_grad():
        before = plain(torch.tensor(tokens)).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a")
        after = theirs(torch.tensor(tokens)).logits.numpy()
    ours = logits_of(policy.merged("float32"), tokens)
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_allclose(ours, after, atol=1e-4)
    names = {name for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert len(names) == len(policy.adapters.layers)


def test_we_load_pefts(tmp_path):
    plain = transformers.AutoModelForCausalLM.from_pretrained(REFERENCE / "llama2", dtype=torch.float32).eval()
    config = peft.LoraConfig(
        r=2, lora_alpha=6, use_rslora=True, target_modules=["k_proj", "gate_proj"], lora_dropout=0.1
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(plain, config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.eval().save_pretrained(tmp_path / "a")

    base = load_model(REFERENCE / "llama2")
    adapters = load_adapter(tmp_path / "a", base)
    assert adapters.scale == pytest.approx(6 / np.sqrt(2))
    tokens = np.arange(24).reshape(2, 12) % base.vocab_size
    with torch.no_grad():
        after = theirs(torch.tensor(tokens)).logits.numpy()
    merged = AdaptedTransformer(base, adapters).merged("float32")
    assert np.abs(after - logits_of(base, tokens)).max() > 1e-2
    np.testing.assert_allclose(logits_of(merged, tokens), after, atol=1e-4)


@pytest.fixture
def saved(tmp_path) -> Path:
    base = tiny_model()
    adapters = moved(Adapters.fresh(base.config, 2, 8.0, ["q_proj", "down_proj"], key=jr.key(0)))
    save_adapter(adapters, tmp_path / "a", base, "tiny")
    return tmp_path / "a"


def test_round_trip(saved):
    """To the bit, for a base in either dtype; saving again replaces it."""
    base = tiny_model()
    for other in (base, compute_copy(base, "bfloat16")):
        found = load_adapter(saved, other)
        expected = moved(Adapters.fresh(base.config, 2, 8.0, ["q_proj", "down_proj"], key=jr.key(0)))
        assert eqx.tree_equal(found, expected)
    assert describe_adapter(saved) == {"rank": 2, "alpha": 8.0, "targets": ["down_proj", "q_proj"]}
    save_adapter(found, saved, base, "again")
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == "again"
    assert [path.name for path in saved.parent.iterdir()] == ["a"]


def test_another_base_is_refused(saved):
    base = tiny_model()
    others = (
        (tiny_model(hidden_size=40), r"is for another base: lora_A of model.layers.0.self_attn.q_proj is \[2, 32\]"),
        (tiny_model(num_layers=1), "is for another base: it adapts model.layers.1.mlp.down_proj"),
        (
            eqx.tree_at(lambda m: m.embedding, base, base.embedding + 1),
            "is for another base: one of the same sizes, but with other weights",
        ),
    )
    for other, message in others:
        with pytest.raises(CheckpointError, match=message):
            load_adapter(saved, other)


def test_broken_adapters(saved, tmp_path):
    base, config = tiny_model(), json.loads((saved / "adapter_config.json").read_text())

    def with_config(**values) -> None:
        (saved / "adapter_config.json").write_text(json.dumps({**config, **values}))

    for values, message in (
        ({"peft_type": "IA3"}, "peft_type is 'IA3', but only LORA"),
        ({"use_dora": True}, "'use_dora' is True, which is not supported: it changes how"),
        ({"bias": "all"}, "'bias' is 'all', which is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "only one rank and scale for all layers"),
        ({"init_lora_weights": "pissa"}, "takes something off the base"),
        ({"r": "two"}, "r is 'two'"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"r": 3}, r"another base: lora_A of .* is \[2, 32\], and for this model it would be \[3, 32\]"),
    ):
        with_config(**values)
        with pytest.raises(CheckpointError, match=message):
            load_adapter(saved, base)
    with_config(unheard_of=1)
    with pytest.warns(CheckpointWarning, match="unheard_of"):
        load_adapter(saved, base)
    with_config()
    tensors = load_file(saved / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, saved / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="only one of the two factors of model.layers.0.self_attn.q_proj"):
        load_adapter(saved, base)
    save_file({**tensors, "lm_head.weight": tensors[name]}, saved / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lm_head.weight, which is no factor"):
        load_adapter(saved, base)
    (saved / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        load_adapter(saved, base)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is missing"):
        load_adapter(saved, base)
    with pytest.raises(CheckpointError, match="it is no folder"):
        load_adapter(tmp_path / "nowhere", base)
    save_model(base, tmp_path / "model")
    with pytest.raises(UserError, match="is not an adapter, so it is not replaced"):
        save_adapter(Adapters.fresh(base.config, 1, 1.0, ALL_LINEAR, key=jr.key(0)), tmp_path / "model", base, "x")
