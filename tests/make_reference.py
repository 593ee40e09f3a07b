"""Writes `tests/reference/`: tiny random models of every family, and what transformers computes from them.

    python tests/make_reference.py            # the tiny models
    python tests/make_reference.py smollm2    # SmolLM2, from its GGUF file (see smollm2.py); also needs `accelerate`

The tests compare with the committed values; they also build models anew with other seeds, by the functions below.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eqx_specgrpo.models import Transformer, rope_frequencies

REFERENCE = Path(__file__).parent / "reference"
POSITIONS = 64
VOCAB = 64

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    attn_implementation="eager",
)
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So small that of the frequencies some are kept, some divided and some in the band between.
    "original_max_position_embeddings": 32,
}


def _linear_rope(theta: float) -> dict:
    return {"rope_type": "linear", "rope_theta": theta, "factor": 4.0}


_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    # So that some of the few frequencies are kept, some divided and some in between.
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 3.0],
    "long_factor": [1.0, 8.0, 32.0],
}
_GEMMA = dict(head_dim=8, query_pre_attn_scalar=10, sliding_window=9, tie_word_embeddings=True)

# Each differs from the common part in what sets its family apart. Those in `COMMITTED` are committed.
CONFIGS = {
    "llama2": ("llama", dict(num_key_value_heads=4)),
    "llama3": ("llama", dict(hidden_size=32, rope_parameters=_LLAMA3_ROPE)),
    "llama_linear": ("llama", dict(rope_parameters=_linear_rope(10000.0), rms_norm_eps=1e-5)),
    "mistral": ("mistral", dict(sliding_window=12, head_dim=10)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen3": ("qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "smollm2": (
        "llama",
        dict(
            num_attention_heads=3,
            num_key_value_heads=1,
            num_hidden_layers=3,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            rms_norm_eps=1e-5,
        ),
    ),
    "llama_bias": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "qwen2_window": ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)),
    "qwen3_bias": ("qwen3", dict(head_dim=8, attention_bias=True)),
    "gemma2": ("gemma2", dict(_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": (
        "gemma3_text",
        dict(_GEMMA, num_hidden_layers=3, layer_types=["sliding_attention"] * 2 + ["full_attention"]),
    ),
    # A window in all layers, and a sixth of each head turns: more than a pair, and not all.
    "phi3": ("phi3", dict(sliding_window=20, hidden_size=32, rope_parameters={"partial_rotary_factor": 0.5})),
    "phi4": (
        "phi3",
        dict(
            hidden_size=32,
            max_position_embeddings=256,
            original_max_position_embeddings=64,
            rope_parameters=dict(_LONG_ROPE, partial_rotary_factor=0.75),
            tie_word_embeddings=True,
        ),
    ),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        dict(embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.3, logits_scaling=2.5),
    ),
    "smollm3": ("smollm3", dict(num_hidden_layers=3, no_rope_layers=[1, 0, 1], tie_word_embeddings=True)),
    "qwen3_yarn": ("qwen3", dict(head_dim=16, rope_parameters=_YARN_ROPE)),
    "smollm3_window": (
        "smollm3",
        dict(num_hidden_layers=4, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=8, mlp_bias=True),
    ),
    "qwen3_mixed": ("qwen3", dict(head_dim=8, use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "llama_dynamic": ("llama", dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})),
    "llama_yarn": (
        "llama",
        dict(
            hidden_size=64,
            rope_parameters=dict(_YARN_ROPE, attention_factor=0.8, truncate=False, original_max_position_embeddings=40),
        ),
    ),
    "llama_long": (
        "llama",
        dict(rope_parameters=dict(_LONG_ROPE, original_max_position_embeddings=64, factor=3.0)),
    ),
    "gemma3_scaled": (
        "gemma3_text",
        dict(
            _GEMMA,
            num_hidden_layers=7,
            attention_bias=True,
            hidden_activation="silu",
            rope_parameters={
                "full_attention": _linear_rope(1e5),
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        ),
    ),
    "gemma2_wide": ("gemma2", dict(_GEMMA, query_pre_attn_scalar=8, sliding_window=500, tie_word_embeddings=False)),
}
COMMITTED = tuple(CONFIGS)[:7] + (*("gemma2", "gemma3", "phi3", "phi4", "olmo2", "granite", "smollm3", "qwen3_yarn"),)


def random_model(name: str, seed: int, **more: Any) -> PreTrainedModel:
    """A float32 model in which every parameter is random, because a default (a norm's 1, a bias's 0) would hide that it
    is not used."""
    family, changes = CONFIGS[name]
    config = AutoConfig.for_model(family, **{**_COMMON, **changes, **more})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter_name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim == 1:
                parameter.add_(0.3 * noise)  # To 1, or to Gemma's 0.
            else:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
    return model


def random_tokens(vocab: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (1, POSITIONS), dtype=np.int32)


def reference_logprobs(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """`[rows, positions, vocab]`, float32."""
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits
    return torch.log_softmax(logits.double(), -1).float().numpy()


def take_frequencies(model: PreTrainedModel, ours: Transformer) -> None:
    """Gives a transformers model the rotary frequencies of ours, which are not the same to the last bit."""
    config = ours.config
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    model.model.rotary_emb.inv_freq.copy_(torch.from_numpy(frequencies))


TEXTS = [
    "Hello, world! It's 12345 + 67.89 = 12412.89, isn't it?",
    "def f(x: int) -> str:\n    return f'{x:>4}'\n\n\tprint(f(42))\n",
    "naïve café, Übermaß, Привет мир, 日本語テキスト, العربية, 🙂👍🏽",
    "  leading and   inner    spaces\n\n\nand newlines \r\n tabs\t\tend  ",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "Weird tokens: <|endoftext|> <repo_name>x/y a<|im_end|>b ''' \"\"\" \\n $x_1^2$",
]
_PROSE = (
    "Speculative decoding lets a small draft guess several tokens, which the target checks in one pass. On 14 March "
    "1879 Albert Einstein was born in Ulm; 17 * 23 = 391. def add(a, b): return a + b\nThe quick brown fox jumps over "
    "the lazy dog, and then it does it again until everybody has seen it and nobody is surprised any longer."
)


def _write_tiny() -> None:
    for seed, name in enumerate(COMMITTED):
        model, tokens = random_model(name, seed), random_tokens(VOCAB, seed)
        model.save_pretrained(REFERENCE / name)
        (REFERENCE / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(
            REFERENCE / name / "expected.npz", tokens=tokens, logprobs=reference_logprobs(model, tokens)
        )


def _write_smollm2() -> None:
    from smollm2 import find_gguf

    path = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    # In float32 transformers is itself up to 6e-5 off, which would leave little of a tolerance of 1e-4.
    model = model.double()
    tokens = np.array([tokenizer(_PROSE)["input_ids"][:POSITIONS]], np.int32)
    assert tokens.shape == (1, POSITIONS)
    logprobs = reference_logprobs(model, tokens)[0]
    # All 49152 columns would be 12 MB. A log-probability contains the sum over all columns, so some of them will do:
    # the likeliest at each position, and a fixed scatter over the vocabulary.
    likeliest = np.argsort(-logprobs, axis=-1)[:, :16]
    scatter = np.random.default_rng(0).integers(0, logprobs.shape[1], (POSITIONS, 16))
    columns = np.concatenate([likeliest, scatter], axis=1).astype(np.int32)
    folder = REFERENCE / "smollm2_135m_gguf"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "expected.npz",
        tokens=tokens,
        columns=columns,
        logprobs=np.take_along_axis(logprobs, columns, axis=1),
    )
    encoded = [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    (folder / "tokenization.json").write_text(json.dumps(encoded, indent=1) + "\n")


if __name__ == "__main__":
    _write_smollm2() if "smollm2" in sys.argv[1:] else _write_tiny()
