"""A checkpoint of a few kilobytes and a configuration that fits it, for tests of whole runs.

The weights are random, but sharp enough that a draft is sometimes right and sometimes wrong.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import equinox as eqx
import jax.random as jr
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open
from tokenizers import decoders, models, pre_tokenizers

from eqx_specgrpo.config import RunConfig, load_config
from eqx_specgrpo.models import Tokenizer, Transformer, TransformerConfig, save_model

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CONTEXT = 96
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Half of all tokens are even, so that completions of a random model differ in their rewards.
REWARD = '''
import os
import signal
import time


def even(completion_ids, trainer_state, log_extra, log_metric, **kwargs):
    """The share of even token ids, with their number in the records.

    Environment variables say after how many steps something happens.
    """
    now = lambda name: str(trainer_state.global_step) == os.environ.get(name)
    if now("TINY_RUN_KILL_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    if now("TINY_RUN_INTERRUPT_AT"):
        for _ in range(int(os.environ.get("TINY_RUN_INTERRUPTS", "1"))):
            signal.raise_signal(signal.SIGINT)
    if now("TINY_RUN_SLEEP_AT"):
        time.sleep(4)
    if now("TINY_RUN_RAISE_AT"):
        raise ValueError("out of order")
    counts = [sum(token % 2 == 0 for token in ids) for ids in completion_ids]
    log_extra("num_even", counts)
    log_metric("most_even", max(counts))
    return [count / len(ids) for count, ids in zip(counts, completion_ids)]
'''


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """One token a byte, and four special ones."""
    symbols = [PAD, END, USER, ASSISTANT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, END, USER, ASSISTANT])
    settings = {"eos_token": END, "pad_token": PAD, "clean_up_tokenization_spaces": False}
    return Tokenizer(backend, settings, chat_template, eos_ids=())


def tiny_model(
    vocab_size: int = 260, *, hidden_size: int = 32, num_layers: int = 2, sharpness: float = 15.0
) -> Transformer:
    """Grouped-query attention, untied embeddings; `sharpness` multiplies the logits."""
    config = TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
    )
    model = Transformer(config, key=jr.key(0))
    return eqx.tree_at(
        lambda m: (m.embedding, m.unembedding), model, (20 * model.embedding, sharpness * model.unembedding)
    )


def write_tiny_folder(folder: Path, chat_template: str | None = CHAT_TEMPLATE, num_layers: int = 2) -> Path:
    """A Hugging Face folder, with the reward file `reward.py` in it."""
    save_model(tiny_model(num_layers=num_layers), folder, tiny_tokenizer(chat_template))
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """One folder for all tests of a session; none may write to it."""
    return write_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


def tiny_settings(folder: Path, out: Path, *settings: str) -> list[str]:
    """A run of two prompts a step, four samples each, 16 new tokens, as `key=value`; later `settings` win."""
    return [
        f"model.path={folder}",
        f"reward.functions=[{str(folder / 'reward.py') + ':even'!r}]",
        f"out={out}",
        "steps=6",
        "save_steps=3",
        "task.prompt='{expression}='",
        "grpo.prompts_per_step=2",
        "grpo.num_generations=4",
        "grpo.max_completion_length=16",
        "grpo.learning_rate=3e-3",
        "grpo.logprob_chunk=24",
        "draft.max_length=3",
        "draft.length=3",
        "draft.adaptive=false",
        "draft.warmup=2",
        "draft.fraction=0.5",
        "draft.learning_rate=1e-2",
        *settings,
    ]


def checkpoint_arrays(checkpoint: Path, tree: str) -> dict[str, np.ndarray]:
    """The arrays of a tree in a checkpoint, of however many pieces, put together without the library."""
    arrays = {}
    for name, about in json.loads((checkpoint / "meta.json").read_text())["trees"][tree].items():
        arrays[name] = np.empty(about["shape"], about["dtype"])
        missing = arrays[name].size
        for piece in about["pieces"]:
            with safe_open(checkpoint / piece["file"], "numpy") as file:
                part = file.get_tensor(piece["name"])
            place = tuple(slice(start, start + size) for start, size in zip(piece["start"], part.shape, strict=True))
            arrays[name][place] = part
            missing -= part.size
        assert missing == 0, f"{name} is not whole"
    return arrays


def as_flags(settings: Iterable[str]) -> list[str]:
    """For the command line."""
    return [argument for setting in settings for argument in ("--set", setting)]


def tiny_config(folder: Path, out: Path, *settings: str) -> RunConfig:
    """The same as a configuration."""
    return load_config(None, tiny_settings(folder, out, *settings))


def main_like(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Runs the command line in this process, as its entry point does: exit code, stdout and stderr."""
    from eqx_specgrpo.cli import main

    monkeypatch.setattr("sys.argv", ["specgrpo", *arguments])
    monkeypatch.setattr("eqx_specgrpo.cli.keep_freed_memory", lambda: None)  # for good, in the tests' own process
    with pytest.raises(SystemExit) as info:
        main()
    captured = capsys.readouterr()
    return int(info.value.code or 0), captured.out, captured.err
