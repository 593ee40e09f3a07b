"""`specgrpo verify`: the certificate as a user meets it."""

import functools as ft
import json
import re

import jax.random as jr
import pytest
from helpers import quick_compilation, randomise
from tiny_run import tiny_folder as tiny_folder, tiny_model
from typer.testing import CliRunner

from eqx_specgrpo.cli import app
from eqx_specgrpo.decoding import VERIFIER_KINDS, AbstractAcceptanceRule
from eqx_specgrpo.drafts import HydraHeads, MedusaHeads, save_draft
from eqx_specgrpo.errors import CheckpointError, UserError
from eqx_specgrpo.testing import (
    Certificate,
    ConformanceError,
    Finding,
    _certificate as verify_module,
    _saving as saving_module,
    check_saving,
    make_pair,
)

# Every verifier that can be named, those that state their law first.
VERIFIED = sorted(
    (kind.verifier for kind in VERIFIER_KINDS.values()), key=lambda rule: not isinstance(rule, AbstractAcceptanceRule)
)
CHECKS = [
    "drafted tokens",
    "the law of what is decoded",
    "the draft's interface",
    "rewinding",
    "training",
    "the draft's gradient",
    "saving and loading",
    *(f"the law of {type(rule).__name__}" for rule in VERIFIED),
    "greedy tokens are plain decoding's",
    "log-probabilities, greedy",
    "coupled tokens are plain decoding's",
    "log-probabilities, coupled",
    "the tokens kept by truncated sampling",
]

BROKEN = '''
import jax.numpy as jnp
from typing import Any
from eqx_specgrpo.drafts import AbstractDraft, HydraHeads


class Forgetful(AbstractDraft[Any]):
    """Loses its place after a full acceptance."""

    heads: HydraHeads
    max_length: int
    train_length: int
    layers: tuple

    def __init__(self, target, max_length, *, key):
        self.heads = HydraHeads(target.hidden_size, max_length, key=key)
        self.max_length, self.train_length, self.layers = max_length, max_length, ()

    def check(self, target):
        self.heads.check(target)

    def init(self, *args):
        return self.heads.init(*args)

    def propose(self, *args):
        return self.heads.propose(*args)

    def commit(self, target, state, features, block, num_accepted):
        return self.heads.commit(target, state, features, block, jnp.minimum(num_accepted, max(block.shape[1] - 2, 0)))

    def train_hidden(self, *args):
        raise RuntimeError("out of order")

    def train_logits(self, *args):
        return self.heads.train_logits(*args)

    def provenance(self):
        return {}
'''


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@pytest.fixture
def without_laws(monkeypatch):
    """The verifiers' checks have a test of their own; they are the same whatever the pair."""
    monkeypatch.setattr(verify_module, "_of_verifiers", lambda: [])


def _verify(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)], env={"COLUMNS": "160"})


def test_the_whole_certificate_of_a_saved_draft(tiny_folder, tmp_path, monkeypatch):
    # Chains of one token are enough here: test_exactness.py has the others.
    monkeypatch.setattr(verify_module, "check_verifier", ft.partial(verify_module.check_verifier, lengths=(1,)))
    save_draft(tmp_path / "draft", randomise(MedusaHeads.fresh(32, 3), 0, 0.1), tiny_model(), "tiny")
    result = _verify("--model", tiny_folder, "--draft", tmp_path / "draft", "--rows", 3, "--tokens", 12, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"] and found["lossless"] and found["model"] == str(tiny_folder)
    checks = {check["name"]: check for check in found["checks"]}
    assert list(checks) == CHECKS and all(check["passed"] for check in checks.values())
    assert {f"the law of {name}" for name in ("Rejection", "Block", "GreedyMatch", "Coupled")} <= checks.keys()
    assert 0 < checks["the law of Block"]["law_error"] < 1e-6
    for name in ("greedy", "coupled"):
        tokens = checks[f"{name} tokens are plain decoding's"]
        assert tokens["equal"] == tokens["tokens"] == 36 and tokens["near_ties"] == []
        assert 0 <= checks[f"log-probabilities, {name}"]["logprob_gap_max"] < 1e-3
    assert checks["the draft's gradient"]["target_gradient"] == 0
    assert "checking rewinding" in result.stderr


def test_the_table_and_a_failure(tiny_folder, tmp_path, without_laws):
    """A draft of the user's own with two faults: each is a line of the table, the other checks go on."""
    path = tmp_path / "forgetful.py"
    path.write_text(BROKEN)
    result = _verify("--model", tiny_folder, "--draft", f"{path}:Forgetful", "--rows", 2, "--tokens", 5)
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stdout.splitlines() if "FAILED" in line]
    assert any("rewinding" in line for line in lines) and any("the draft's interface" in line for line in lines)
    assert "RuntimeError: out of order" in result.stdout
    assert re.search("all were accepted: row . then proposes", " ".join(result.stdout.replace("│", " ").split()))
    assert "10 of 10 equal (100.00%)" in result.stdout  # wrong about its place, and harmless
    verdict = result.stdout.splitlines()[-1]
    assert verdict.startswith("Lossless as far as was checked, but the draft is not in order: the draft's interface, ")


OTHERS = '''
import jax.numpy as jnp
from jaxtyping import Array, Float
from eqx_specgrpo.decoding import Categorical
from eqx_specgrpo.drafts import HydraHeads, Proposal


class Cold(HydraHeads):
    """Its tokens are drawn at half the temperature that it reports."""

    def __init__(self, target, max_length, *, key):
        super().__init__(target.hidden_size, max_length, key=key)

    def propose(self, *args):
        proposal, state = super().propose(*args)
        warmer = Categorical.from_logits(proposal.distribution.logits / 2.0)
        return Proposal(proposal.tokens, warmer), state

    def provenance(self):
        return {}


class Scaled(HydraHeads):
    """Has a weight that nothing uses."""

    scale: Float[Array, ""]

    def __init__(self, target, max_length, *, key):
        super().__init__(target.hidden_size, max_length, key=key)
        self.scale = jnp.ones(())

    def provenance(self):
        return {}
'''


def test_a_draft_that_reports_other_distributions_is_not_lossless(tiny_folder, tmp_path, without_laws):
    path = tmp_path / "cold.py"
    path.write_text(OTHERS)
    result = _verify("--model", tiny_folder, "--draft", f"{path}:Cold", "--rows", 2, "--tokens", 5, "--json")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    failed = [check["name"] for check in found["checks"] if not check["passed"]]
    assert not found["lossless"] and failed[:2] == ["drafted tokens", "the law of what is decoded"]


def test_a_weight_that_is_not_to_learn_has_to_be_named(tiny_folder, tmp_path, without_laws, monkeypatch):
    monkeypatch.setattr(verify_module, "_of_output", lambda *_: [])
    path = tmp_path / "scaled.py"
    path.write_text(OTHERS)
    arguments = ("--model", tiny_folder, "--draft", f"{path}:Scaled", "--rows", 2, "--tokens", 5)
    silent = _verify(*arguments)
    assert silent.exit_code == 1 and "the draft's gradient failed" in silent.stdout, silent.output
    named = _verify(*arguments, "--frozen", ".scale")
    assert named.exit_code == 0, named.output


def test_a_draft_that_can_not_be_loaded_again_is_a_finding(monkeypatch):
    def unreadable(*_):
        raise CheckpointError("draft.json names no class")

    target = tiny_model()
    monkeypatch.setattr(saving_module, "load_draft", unreadable)
    pair = make_pair(MedusaHeads.fresh(target.hidden_size, 2), target, [[1, 2]])
    with pytest.raises(ConformanceError, match="can't be loaded again: draft.json names no class"):
        check_saving(pair)


def test_the_verdict_names_what_it_rests_on():
    output = Finding("the law", False, "off", {}, 0.1)
    own = Finding("saving", False, "lost", {}, 0.1, of_output=False)
    assert Certificate("m", "d", (output, own)).verdict() == "NOT lossless as far as was checked: the law failed."
    assert "not in order: saving failed" in Certificate("m", "d", (own,)).verdict()


def test_what_fails_is_a_finding():
    def fails():
        raise ConformanceError("row 3 is off")

    def refused():
        raise UserError("no such thing")

    finding = verify_module._finding("a check", fails)
    assert (finding.passed, finding.result) == (False, "row 3 is off")
    with pytest.raises(UserError, match="no such thing"):
        verify_module._finding("a check", refused)
    good = Finding("another", True, "fine", {"x": 1.0}, 0.1)
    assert Certificate("m", "d", (good,)).passed and not Certificate("m", "d", (good, finding)).passed
    assert Certificate("m", "d", (good, finding)).to_json()["checks"][0]["x"] == 1.0
    assert "another" not in Certificate("m", "d", (good, finding)).verdict()


def test_bad_input_is_refused_with_a_sentence(tiny_folder, tmp_path):
    save_draft(tmp_path / "draft", HydraHeads(16, 3, key=jr.key(0)), tiny_model(hidden_size=16), "small")
    for arguments, words in {
        ("--draft", "medsua"): "medusa",
        ("--draft", tmp_path / "draft"): "hidden_size 16, but this target's is 32",
        ("--tokens", 90): "the model's context holds 96, prompt included: ask for fewer with --tokens",
    }.items():
        result = _verify("--model", tiny_folder, *arguments)
        assert isinstance(result.exception, UserError) and words in str(result.exception), result.output
    assert _verify("--rows", 1).exit_code == 2
