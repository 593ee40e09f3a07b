"""`specgrpo devices`: what it says of devices that are not there. What those hold that are there is compared in
`on_devices/test_runs.py`."""

import pytest
from tiny_run import tiny_config, tiny_folder as tiny_folder
from typer.testing import CliRunner

from eqx_specgrpo.choices import DRAFTS
from eqx_specgrpo.cli import app
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.train import plan_devices


def test_more_devices_hold_less(tiny_folder, tmp_path):
    config = tiny_config(tiny_folder, tmp_path, "grpo.prompts_per_step=8")
    one, four = (plan_devices(config, count=count) for count in (1, 4))
    for name in ("policy", "its optimizer", "weights to compute with"):
        assert 0.25 * one.kept[name] <= four.kept[name] < 0.3 * one.kept[name], name  # norms are whole everywhere
    assert four.rollout["keys and values of the rows"] == one.rollout["keys and values of the rows"] // 4
    assert one.rollout["copies of the weights"] == one.update["weights gathered at use"] == 0
    assert one.peak > four.peak


def test_adapters_and_a_model_axis(tiny_folder, tmp_path):
    whole = plan_devices(tiny_config(tiny_folder, tmp_path), count=1)
    lora = plan_devices(tiny_config(tiny_folder, tmp_path, "lora.rank=2"), count=1)
    assert lora.kept["its optimizer"] < 0.5 * whole.kept["its optimizer"]
    divided = plan_devices(tiny_config(tiny_folder, tmp_path, "devices.model=2"), count=4)
    layouts = {one.path: (one.number, one.shape, tuple(one.master), tuple(one.copy)) for one in divided.parameters}
    assert layouts["policy.blocks.*.attention.qkv.weight"] == (2, (64, 32), ("model", "data"), ("model",))
    with pytest.raises(UserError, match="devices.model = 2, but there are 3 devices"):
        plan_devices(tiny_config(tiny_folder, tmp_path, "devices.model=2"), count=3)


@pytest.mark.parametrize("kind", [kind for kind in DRAFTS if kind != "model"])
def test_no_draft_reads_the_weights_that_it_is_made_for(tiny_folder, tmp_path, kind):
    """So that it can be made where the weights are divided over several processes."""
    plan = plan_devices(tiny_config(tiny_folder, tmp_path, f"draft.kind={kind}"), count=2)
    assert plan.kept["policy"] > 0


@pytest.mark.parametrize("memory, said", [("0.000001", "It does not fit"), ("8", "It fits")])
def test_the_command_says_whether_it_fits(tiny_folder, memory, said):
    done = CliRunner().invoke(app, ["devices", "--model", str(tiny_folder), "--count", "4", "--memory", memory])
    assert done.exit_code == 0, done.output
    assert said in done.output and "data 4 x model 1" in done.output
    assert "policy.blocks.*.mlp.down.weight" in done.output
