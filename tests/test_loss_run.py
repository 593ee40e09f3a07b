"""What the loss is given in a whole step, and what it carries from step to step."""

import io

import equinox as eqx
import jax
import numpy as np
import pytest
from helpers import quick_compilation
from made_rollouts import make_rollouts
from rich.console import Console
from safetensors.numpy import load_file
from tiny_run import tiny_config, tiny_folder as tiny_folder, tiny_model, tiny_tokenizer

from eqx_specgrpo import train
from eqx_specgrpo._types import ScoredRollouts
from eqx_specgrpo.config import make_parts
from eqx_specgrpo.drafts import NoDraft
from eqx_specgrpo.errors import UserError
from eqx_specgrpo.grpo import LossSettings, group_advantages, make_update_batch, policy_entropies, policy_logprobs
from eqx_specgrpo.records import read_records

EVERYTHING = (
    "grpo.loss_type=cispo",
    "grpo.beta=0.1",
    "grpo.kl_estimator=k1",
    "grpo.entropy_coef=0.01",
    "grpo.use_adaptive_entropy=true",
    "grpo.entropy_target=20.0",
    "grpo.top_entropy_quantile=0.5",
    "grpo.off_policy_mask_threshold=0.2",
    "grpo.importance_sampling_correction=true",
    "grpo.importance_sampling_mode=token_truncate",
    "grpo.importance_sampling_clip_max=1.1",
    "grpo.num_iterations=2",
)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def scored() -> ScoredRollouts:
    """Eight made-up completions of unequal length, as if sampled by something near the model."""
    rng = np.random.default_rng(0)
    lengths = [16, 3, 9, 12, 1, 7, 14, 5]
    completions = [rng.integers(5, 250, length).tolist() for length in lengths]
    rollouts = make_rollouts([[5, 9, 11], [7, 3, 2, 8, 1]], [0] * 4 + [1] * 4, completions)
    rollouts = eqx.tree_at(lambda r: r.tokens, rollouts, np.where(rollouts.tokens > 259, 0, rollouts.tokens))
    batch = make_update_batch(rollouts, np.zeros(8, np.float32))
    near = np.asarray(policy_logprobs(tiny_model(), batch, LossSettings(chunk=24)))
    noise = 0.3 * rng.standard_normal(rollouts.tokens.shape).astype(np.float32)
    rollouts = eqx.tree_at(lambda r: r.logprobs, rollouts, near[:, : rollouts.tokens.shape[1]] + noise)
    rewards = np.arange(8) % 3 - 1.0
    return ScoredRollouts(rollouts, rewards[:, None], rewards, group_advantages(rewards, rollouts.group, 2))


def updated(folder, out, scored, *settings: str):
    config = tiny_config(folder, out, "draft.kind=none", *settings)
    parts = make_parts(config, tiny_tokenizer(), NoDraft())
    policy, reference = tiny_model(), tiny_model(sharpness=14.0) if config.grpo.beta else None
    optimizer = parts.policy_optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    return train.update_policy(parts, policy, optimizer, reference, scored, 1e-3, 0)


def flat(tree) -> np.ndarray:
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])


def test_how_a_step_is_divided_changes_nothing_of_all_this(scored, tiny_folder, tmp_path):
    """Two inner iterations with everything that a loss may have beside it: rows whole and in fours."""
    whole = updated(tiny_folder, tmp_path, scored, *EVERYTHING)
    parts = updated(tiny_folder, tmp_path, scored, *EVERYTHING, "grpo.gradient_accumulation_steps=4")
    assert parts.metrics.keys() == whole.metrics.keys()
    for name, expected in whole.metrics.items():
        assert parts.metrics[name] == pytest.approx(expected, rel=2e-3, abs=1e-5), name
    start = flat(tiny_model())
    step, other = flat(whole.policy) - start, flat(parts.policy) - start
    # Adam divides by the gradient's size: what matters is the direction of the whole step.
    assert np.linalg.norm(step) > 1e-2 and np.linalg.norm(other - step) < 2e-2 * np.linalg.norm(step)
    # What was asked for was there.
    metrics, batch = whole.metrics, whole.batch
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(1.1, rel=1e-6)
    assert metrics["sampling/importance_sampling_ratio/min"] < 0.9
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.24, abs=0.05)  # of normal noise, 0.3
    assert metrics["entropy_coef"] == pytest.approx(0.02)  # two updates below the target
    assert metrics["policy_loss"] > metrics["loss"]
    assert 0.4 < batch.entropy_mask.sum() / batch.completion_mask.sum() < 0.6
    np.testing.assert_array_equal(np.asarray(batch.entropy_mask)[~batch.completion_mask], False)
    entropies = np.asarray(policy_entropies(whole.weights, batch, LossSettings(chunk=24)))
    kept, rest = (entropies[batch.completion_mask & mask] for mask in (batch.entropy_mask, ~batch.entropy_mask))
    assert kept.min() >= rest.max() - 1e-4


def test_corrected_ratios_are_to_the_trainer(scored, tiny_folder, tmp_path):
    """In the first inner iteration the trainer's ratio is 1, whatever the sampler said; without a correction it is
    not."""
    settings = ("grpo.importance_sampling_correction=true", "grpo.importance_sampling_mode=sequence_mask")
    corrected = updated(tiny_folder, tmp_path, scored, *settings)
    assert corrected.metrics["clip_ratio/region_mean"] == 0
    new = corrected.batch.completion_tokens.shape[1]
    mask = np.asarray(corrected.batch.completion_mask)
    np.testing.assert_allclose(
        corrected.batch.sampling_logprobs[mask], np.asarray(scored.rollouts.logprobs, np.float32)[:, :new][mask]
    )
    gaps = np.where(mask, corrected.batch.old_logprobs - corrected.batch.sampling_logprobs, 0).sum(1)
    expected = np.where(np.exp(gaps) > 3, 0, np.exp(gaps))
    np.testing.assert_allclose(corrected.batch.importance_weights[:, 0], expected, rtol=1e-4)
    plain = updated(tiny_folder, tmp_path, scored)
    assert plain.metrics["clip_ratio/region_mean"] > 0.1
    assert "sampling/importance_sampling_ratio/min" not in plain.metrics


def test_kl_in_the_reward(scored, tiny_folder, tmp_path):
    settings = ("grpo.beta=0.05", "grpo.use_kl_in_reward=true", "grpo.kl_estimator=k1")
    update = updated(tiny_folder, tmp_path, scored, *settings)
    assert update.batch.reference_logprobs is None  # no term of the loss
    plain = make_update_batch(scored.rollouts, scored.advantages)
    reference = np.asarray(policy_logprobs(tiny_model(sharpness=14.0), plain, LossSettings(chunk=24)))
    mask = plain.completion_mask
    kl = np.where(mask, plain.old_logprobs - reference, 0)
    expected = group_advantages(scored.rewards - 0.05 * kl.sum(1), scored.rollouts.group, 2)
    np.testing.assert_allclose(update.batch.advantages, expected, atol=1e-4)
    assert np.abs(expected - scored.advantages).max() > 0.01
    assert update.metrics["kl"] == pytest.approx(kl.sum() / mask.sum(), rel=1e-4)


def run(folder, out, *settings: str, resume: bool = False) -> list[dict]:
    config = tiny_config(folder, out, "steps=4", "save_steps=2", "draft.kind=none", *settings)
    with Console(file=io.StringIO()).capture():
        train.run(config, resume=resume, console=Console(file=io.StringIO()))
    clocks = (
        "time/",
        "compile/",
        "spec/tokens_per_second",
        "spec/expected",
        "spec/judged",
        "spec/seconds",
        "draft/seconds",
    )
    return [
        {name: value for name, value in record.items() if not name.startswith(clocks)}
        for record in read_records(out / "metrics.jsonl")
    ]


def test_what_the_loss_carries_survives_a_resume(tiny_folder, tmp_path, monkeypatch):
    """A reference that follows the policy and a coefficient that adapts: ended by an error after two steps of four and
    resumed, the run is to the bit the one that was not."""
    settings = (
        *EVERYTHING,
        "grpo.sync_ref_model=true",
        "grpo.ref_model_sync_steps=2",
        "grpo.ref_model_mixup_alpha=0.75",
    )
    straight = run(tiny_folder, tmp_path / "straight", *settings)
    with monkeypatch.context() as patch:
        patch.setenv("TINY_RUN_RAISE_AT", "2")
        with pytest.raises(UserError, match="out of order"):
            run(tiny_folder, tmp_path / "stopped", *settings)
    assert run(tiny_folder, tmp_path / "stopped", *settings, resume=True) == straight
    ends = [tmp_path / name / "checkpoints" / "step-000004" for name in ("straight", "stopped")]
    for tree in ("policy", "reference", "entropy"):
        first, second = (load_file(end / f"{tree}.safetensors") for end in ends)
        for name, array in first.items():
            np.testing.assert_array_equal(array, second[name])
    # By hand: after two steps and after four.
    middle = tmp_path / "straight" / "checkpoints" / "step-000002"
    policies = [load_file(end / "policy.safetensors") for end in (middle, ends[0])]
    references = [load_file(end / "reference.safetensors") for end in (middle, ends[0])]
    for name, reference in references[1].items():
        mixed = 0.75 * policies[1][name] + 0.25 * references[0][name]
        np.testing.assert_allclose(reference, mixed, atol=1e-6)
    assert any(not np.array_equal(policies[1][name], references[1][name]) for name in policies[1])
    assert straight[0]["kl"] != straight[3]["kl"]
    assert straight[3]["entropy_coef"] == pytest.approx(0.01 + 8 * 0.005)


def test_a_run_without_all_this_keeps_nothing_more(tiny_folder, tmp_path):
    run(tiny_folder, tmp_path / "run", "steps=1")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert not {"reference.safetensors", "entropy.safetensors"} & {path.name for path in checkpoint.iterdir()}
