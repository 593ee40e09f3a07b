"""A run's parts on four devices: what it hands to the decoder."""

import jax.random as jr
import pytest
from tiny_run import tiny_config, tiny_folder as tiny_folder, tiny_model, tiny_tokenizer

from eqx_specgrpo._types import Prompts
from eqx_specgrpo.config import load_held_out
from eqx_specgrpo.config._parts import make_parts
from eqx_specgrpo.drafts import NoDraft
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.evaluation import _evaluate as evaluate_module, make_evaluation
from eqx_specgrpo.tasks import TrainerState
from eqx_specgrpo.train import _roll_out as roll_out_module

PROMPTS = Prompts.from_lists([[5, 6], [7]])


def handed_over(monkeypatch, module) -> list[dict]:
    """The options of the decodings that a module asks for. None is made: the first of them ends the test's call."""
    seen = []

    def decode(*_, **options):
        seen.append(options)
        raise KeyError("enough seen")

    monkeypatch.setattr(module, "decode", decode)
    return seen


@pytest.mark.parametrize("model, data", [(1, 4), (2, 2), (4, 1)])
def test_a_run_decodes_on_its_mesh(tiny_folder, tmp_path, monkeypatch, model, data):
    parts = make_parts(tiny_config(tiny_folder, tmp_path, f"devices.model={model}"), tiny_tokenizer(), NoDraft())
    seen = handed_over(monkeypatch, roll_out_module)
    with pytest.raises(KeyError, match="enough seen"):
        roll_out_module.roll_out(parts, tiny_model(), NoDraft(), PROMPTS, jr.key(0))
    mesh = seen[0]["mesh"]
    assert (mesh.data, mesh.model) == (data, model) and mesh is parts.mesh


def test_so_does_an_evaluation(tiny_folder, tmp_path, monkeypatch):
    config = tiny_config(tiny_folder, tmp_path, "devices.model=2", "eval.task=arithmetic", "eval.limit=2")
    parts = make_parts(config, tiny_tokenizer(), NoDraft())
    held_out = load_held_out(config)
    assert held_out is not None
    evaluation = make_evaluation(config, held_out, parts.tokenizer, tiny_model(), parts.verifier, parts.length)
    seen = handed_over(monkeypatch, evaluate_module)
    with pytest.raises(KeyError, match="enough seen"):
        evaluate_module.evaluate(evaluation, tiny_model(), NoDraft(), TrainerState(0, 1, None), print)
    assert (seen[0]["mesh"].data, seen[0]["mesh"].model) == (2, 2)


def test_devices_that_cannot_be_divided(tiny_folder, tmp_path):
    with pytest.raises(UserError, match=r"devices.model = 3, but there are 4 devices.*\[1, 2, 4\]"):
        make_parts(tiny_config(tiny_folder, tmp_path, "devices.model=3"), tiny_tokenizer(), NoDraft())
