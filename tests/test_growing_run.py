"""A run whose caches grow and whose rows wait, cut off behind its checkpoint and resumed."""

import io
import shutil

from rich.console import Console
from tiny_run import tiny_config, tiny_folder as tiny_folder

from eqx_specgrpo import train
from eqx_specgrpo.decoding import _decode as decode_module, _room as room_module


def test_a_run_that_grows_is_resumed_to_the_bit(tiny_folder, tmp_path, monkeypatch):
    """As if killed between a step's records and its checkpoint: with n-gram memories, and an order of rows that depends
    on what the run remembers of its prompts."""
    monkeypatch.setattr(room_module, "_SMALLEST", 24)
    monkeypatch.setattr(room_module, "_CHEAP", 0)
    growths, grow = [], decode_module.grown

    def grown(draft, state, room, *others):
        growths.append(room)
        return grow(draft, state, room, *others)

    monkeypatch.setattr(decode_module, "grown", grown)

    def run(out, **options):
        settings = (
            "grpo.max_completion_length=64",
            "grpo.max_rows=4",
            "draft.kind=ngram",
            "steps=2",
            "save_steps=1",
            "task.size=2",
        )
        config = tiny_config(tiny_folder, out, "draft.warmup=0", *settings)
        train.run(config, console=Console(file=io.StringIO()), **options)

    straight, cut = tmp_path / "straight", tmp_path / "cut"
    run(straight)
    assert len(growths) >= 2
    before = len(growths)
    shutil.copytree(straight, cut)
    for name in ("checkpoints/step-000002", "policy", "draft"):
        shutil.rmtree(cut / name)
    run(cut, resume=True)
    assert len(growths) > before
    assert (cut / "completions.jsonl").read_bytes() == (straight / "completions.jsonl").read_bytes()
    for path in (straight / "checkpoints/step-000002").glob("*.safetensors"):
        assert (cut / path.relative_to(straight)).read_bytes() == path.read_bytes(), path.name
