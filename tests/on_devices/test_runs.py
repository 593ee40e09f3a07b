"""Whole runs on four devices: what is sampled, learned and kept is what one device samples, learns and keeps."""

import shutil
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from helpers import quick_compilation
from rich.console import Console
from tiny_run import tiny_config, tiny_folder as tiny_folder, tiny_model

from eqx_specgrpo.config import _parts as parts_module, make_policy_optimizer
from eqx_specgrpo.drafts import NoDraft
from eqx_specgrpo.grpo import trained_part
from eqx_specgrpo.layout import Layout, OneDevice, make_mesh
from eqx_specgrpo.models import load_model
from eqx_specgrpo.records import read_records
from eqx_specgrpo.train import RunState, plan_devices, run

# Rows that the shards can't have an equal part of, a draft with temperatures, and a reference. Adam divides by the
# gradient's size, so that one of rounding alone would move a weight as far as any other, unless its epsilon is larger.
SETTINGS = (
    "steps=2",
    "save_steps=1",
    "compare=false",
    "seed=3",
    "draft.verifier=coupled",
    "draft.warmup=1",
    "draft.fit_temperature=true",
    "grpo.prompts_per_step=3",
    "grpo.num_generations=2",
    "grpo.beta=0.04",
    "grpo.adam_epsilon=1e-3",
)
OTHER = {"full": (), "lora": ("lora.rank=4", "grpo.optim=adamw", "draft.kind=eagle", "draft.fit_temperature=false")}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def trained(folder: Path, out: Path, mesh, *settings: str, resume: bool = False):
    config = tiny_config(folder, out, *SETTINGS, *settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "make_mesh", lambda model: mesh)
        return run(config, resume=resume, console=Console(quiet=True))


def weights(model) -> np.ndarray:
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])


@pytest.fixture(scope="module", params=OTHER)
def one_device(request, tiny_folder, tmp_path_factory):
    settings = OTHER[request.param]
    out = tmp_path_factory.mktemp(request.param) / "run"
    return settings, out, trained(tiny_folder, out, OneDevice(), *settings)


def check_same(out, result, expected_out, expected, tolerance: float) -> None:
    told, wanted = (read_records(folder / "completions.jsonl") for folder in (out, expected_out))
    assert [one["completion"] for one in told] == [one["completion"] for one in wanted]
    for name in ("loss", "grad_norm", "entropy", "kl", "draft/loss", "draft/grad_norm"):
        np.testing.assert_allclose(result.metrics[name], expected.metrics[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert np.abs(weights(result.policy) - weights(expected.policy)).max() < tolerance
    assert np.abs(weights(result.draft) - weights(expected.draft)).max() < 10 * tolerance


@pytest.mark.parametrize("model", [1, 2])
def test_devices_hold_what_is_planned(tiny_folder, tmp_path, model):
    config = tiny_config(tiny_folder, tmp_path, f"devices.model={model}")
    policy, mesh = tiny_model(), make_mesh(model)
    state = RunState.fresh(policy, NoDraft(), make_policy_optimizer(config.grpo), optax.identity()).laid_out(mesh)
    plan = plan_devices(config)
    assert (plan.data, plan.model) == (4 // model, model)
    for name, tree in (("policy", state.policy), ("its optimizer", state.policy_optimizer)):
        arrays = jax.tree.leaves(eqx.filter(tree, eqx.is_array))
        held = sum(x.addressable_shards[0].data.nbytes for x in arrays)
        assert plan.kept[name] == held, name


def test_weights_are_divided_as_they_are_read(tiny_folder):
    mesh = make_mesh()
    read, whole = load_model(tiny_folder, place=mesh.place), load_model(tiny_folder)
    assert eqx.tree_equal(jax.device_get(read), jax.device_get(whole))
    placed = mesh.lay_out(whole, Layout.MASTER)
    assert jax.tree.map(lambda x: x.sharding, read) == jax.tree.map(lambda x: x.sharding, placed)


@pytest.mark.parametrize("model", [1, 2])
def test_a_run_is_that_of_one_device(tiny_folder, tmp_path, one_device, model):
    settings, expected_out, expected = one_device
    out = tmp_path / "run"
    result = trained(tiny_folder, out, make_mesh(model), *settings)
    check_same(out, result, expected_out, expected, 1e-5)
    policy, mesh = trained_part(result.policy), make_mesh(model)
    placed = mesh.lay_out(policy, Layout.MASTER)
    assert jax.tree.map(lambda x: x.sharding, policy) == jax.tree.map(lambda x: x.sharding, placed)


def test_a_checkpoint_goes_on_with_other_devices(tiny_folder, tmp_path):
    """From 2 x 2 to one and four, and back from one."""
    first = tmp_path / "first"
    trained(tiny_folder, first, make_mesh(2), "steps=1")
    losses = []
    for number, mesh in enumerate((make_mesh(2), OneDevice(), make_mesh(1))):
        out = Path(shutil.copytree(first, tmp_path / f"resumed{number}"))
        losses.append(trained(tiny_folder, out, mesh, "steps=2", resume=True).metrics["loss"][-1])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5, atol=1e-7)
    back = [
        trained(tiny_folder, tmp_path / f"resumed{number}", mesh, "steps=3", resume=True).metrics["loss"][-1]
        for number, mesh in ((1, make_mesh(2)), (0, make_mesh(2)))
    ]
    np.testing.assert_allclose(back[0], back[1], rtol=1e-5, atol=1e-7)
