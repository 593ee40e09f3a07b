"""Optimizers and schedules by name, against optax used directly."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from optax import contrib
from tiny_run import tiny_model

from eqx_specgrpo.config import learning_rate, load_config, rate_schedule
from eqx_specgrpo.errors import ConfigError
from eqx_specgrpo.grpo import OPTIMIZERS, apply_gradients, make_optimizer, optimizer_bytes
from eqx_specgrpo.models import ALL_LINEAR, Adapters, Transformer, TransformerConfig
from eqx_specgrpo.records import load_checkpoint, save_checkpoint

RATE, DECAY, CLIP = 1e-2, 0.1, 2.0
# Two matrices, one of them large enough to be factored, and a vector.
SHAPES = {"large": (129, 130), "small": (4, 6), "vector": (6,)}
PARAMS = {name: jr.normal(jr.key(i), shape) for i, (name, shape) in enumerate(SHAPES.items())}
# The second gradient is clipped, the others are not.
GRADIENTS = [
    {name: size * jr.normal(jr.key(10 + 10 * step + i), shape) for i, (name, shape) in enumerate(SHAPES.items())}
    for step, size in enumerate((0.01, 1.0, 0.005))
]
IS_MATRIX = {name: len(shape) == 2 for name, shape in SHAPES.items()}


def adafactor() -> optax.GradientTransformation:
    """For a rate of 1, and with the decay of the others."""
    return optax.chain(
        optax.adafactor(1.0, multiply_by_parameter_scale=False),
        optax.add_decayed_weights(-DECAY, mask=IS_MATRIX),
        optax.scale(RATE),
    )


def muon() -> optax.GradientTransformation:
    """Of optax's own, whose part for vectors is Nesterov's; here it is AdamW."""
    matrices = contrib.muon(RATE, weight_decay=DECAY, consistent_rms=0.2)
    vectors = optax.adamw(RATE, 0.8, 0.95, 1e-6, weight_decay=0.0)
    return optax.partition({True: matrices, False: vectors}, IS_MATRIX)


OF_OPTAX = {
    "adamw": optax.adamw(RATE, 0.8, 0.95, 1e-6, weight_decay=DECAY, mask=IS_MATRIX),
    "adafactor": adafactor(),
    "muon": muon(),
    "lion": optax.lion(RATE, 0.8, 0.95, weight_decay=DECAY, mask=IS_MATRIX),
    "sgd": optax.chain(optax.add_decayed_weights(DECAY, mask=IS_MATRIX), optax.sgd(RATE)),
}


def moved(optimizer: optax.GradientTransformation, rate: float) -> dict[str, np.ndarray]:
    """What three steps change."""
    params, state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    for gradients in GRADIENTS:
        updates, state = update(gradients, state, params)
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    return {name: np.asarray(params[name] - PARAMS[name]) for name in params}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_is_optax_behind_a_clip(name):
    assert optax.tree.norm(GRADIENTS[1]) > CLIP > optax.tree.norm(GRADIENTS[0])
    ours = make_optimizer(name, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=DECAY, max_grad_norm=CLIP)
    found = moved(ours, -RATE)
    expected = moved(optax.chain(optax.clip_by_global_norm(CLIP), OF_OPTAX[name]), 1.0)
    for key in SHAPES:
        assert np.abs(expected[key]).max() > 1e-5, key
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-4, atol=1e-6, err_msg=key)
    # Each of the three is seen: with another decay, clip or name it would not be so.
    options = {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6}
    others = [make_optimizer(name, **options, weight_decay=0.0, max_grad_norm=CLIP)]
    if name not in ("adafactor", "muon", "lion"):  # of these a step depends little on the gradient's size
        others.append(make_optimizer(name, **options, weight_decay=DECAY, max_grad_norm=100.0))
    for other in others:
        assert not np.allclose(moved(other, -RATE)["small"], expected["small"], rtol=1e-3, atol=1e-6)


def test_muon_leaves_embeddings_to_adamw():
    """The state of the others is one momentum, and theirs two moments."""
    model = tiny_model()
    params = eqx.filter(model, eqx.is_inexact_array)
    state = make_optimizer("muon").init(params)
    sizes = sorted(x.size for x in jax.tree.leaves(state) if x.ndim >= 1)
    ids = {260 * 32}
    assert model.embedding.size in ids and model.unembedding is not None
    assert sum(size in ids for size in sizes) == 4  # two moments of each of the two
    down = model.blocks[0].mlp.down.weight
    assert sum(x.shape == down.shape for x in jax.tree.leaves(state)) == 2  # one momentum of each layer's


def test_bytes_of_state():
    model = tiny_model()
    params = eqx.filter(model, eqx.is_inexact_array)
    size = sum(x.size for x in jax.tree.leaves(params))
    found = {name: optimizer_bytes(make_optimizer(name), params) / size for name in OPTIMIZERS}
    assert found["adamw"] == pytest.approx(8, abs=0.01) and found["lion"] == pytest.approx(4, abs=0.01)
    assert found["sgd"] == 0 and 4 < found["muon"] < 8
    wide = {"weight": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    assert optimizer_bytes(make_optimizer("adafactor"), wide) == pytest.approx(8 * 1024, abs=64)
    shapes = jax.eval_shape(lambda: params)
    assert optimizer_bytes(make_optimizer("adamw"), shapes) == optimizer_bytes(make_optimizer("adamw"), params)


def test_bytes_in_the_documentation():
    """The table of docs/lora.md is what the shapes say."""
    config = TransformerConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_layers=28, num_heads=16, num_kv_heads=8,
        head_dim=128, max_position_embeddings=40960, qk_norm=True, tie_embeddings=True,
    )  # fmt: skip
    full = eqx.filter_eval_shape(Transformer, config, key=jr.key(0))
    adapters = eqx.filter_eval_shape(Adapters.fresh, config, 16, 32.0, ALL_LINEAR, key=jr.key(0))
    text = (Path(__file__).parents[1] / "docs" / "lora.md").read_text(encoding="utf-8")
    table = text.partition("<!-- optimizers: begin -->")[2].partition("<!-- optimizers: end -->")[0]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    sizes = {name: [optimizer_bytes(make_optimizer(name), part) for part in (full, adapters)] for name in OPTIMIZERS}
    assert found == [[f"`{name}`", *(f"{size / 1e9:.2f} GB" for size in both)] for name, both in sizes.items()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_adapters_and_checkpoints(tmp_path, name):
    """Each moves adapters, and its state comes back from a checkpoint to the bit."""
    adapters = Adapters.fresh(tiny_model().config, 2, 8.0, ALL_LINEAR, key=jr.key(0))
    params = eqx.filter(adapters, eqx.is_inexact_array)
    optimizer = make_optimizer(name, weight_decay=0.1)
    gradients = jax.tree.map(lambda x: 0.01 * jr.normal(jr.key(x.size), x.shape), params)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    assert all(jnp.isfinite(u).all() and jnp.abs(u).max() > 0 for u in jax.tree.leaves(updates))
    save_checkpoint(tmp_path, 1, {"state": state}, {})
    trees, _ = load_checkpoint(tmp_path / "checkpoints" / "step-000001", {"state": optimizer.init(params)})
    assert jax.tree.structure(trees["state"]) == jax.tree.structure(state)
    for saved, was in zip(jax.tree.leaves(trees["state"]), jax.tree.leaves(state), strict=True):
        assert saved.dtype == was.dtype and np.array_equal(saved, was)


def rates(*settings: str) -> np.ndarray:
    config = load_config(None, ["steps=10", "grpo.learning_rate=0.5", *settings])
    return np.array([learning_rate(config, step) for step in range(10)])


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_schedules_are_those_of_optax(warmup):
    steps, settings = np.arange(10), (f"grpo.warmup_steps={warmup}",)
    falling = 10 - warmup
    mains = {
        "constant": optax.constant_schedule(0.5),
        "constant_with_warmup": optax.constant_schedule(0.5),
        "linear": optax.linear_schedule(0.5, 0.0, falling),
        "cosine": optax.cosine_decay_schedule(0.5, falling),
    }
    for name, main in mains.items():
        expected = [0.5 * (step + 1) / warmup if step < warmup else float(main(step - warmup)) for step in steps]
        found = rates(f"grpo.lr_scheduler_type={name}", *settings)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert found.max() == pytest.approx(0.5) and found.min() > 0  # no step is without effect
    assert rates("grpo.lr_scheduler_type=cosine")[5] == pytest.approx(0.25)


def test_a_schedule_is_an_optax_schedule():
    schedule = rate_schedule(load_config(None, ["steps=10", "grpo.lr_scheduler_type=cosine", "grpo.warmup_steps=2"]))
    assert jax.eval_shape(schedule, jnp.int32(3)).shape == ()


@pytest.mark.parametrize(
    "settings, pattern",
    [
        (["grpo.optim=adam"], 'grpo.optim = "adam": it must be one of "adamw", "adafactor", "muon", "lion", "sgd"'),
        (["grpo.optim=sgd", "grpo.adam_beta1=0.5"], "grpo.adam_beta1 = 0.5 is no option of grpo.optim = 'sgd'"),
        (
            ["grpo.optim=lion", "grpo.adam_epsilon=1e-6"],
            "adam_epsilon = 1e-06 is no option of grpo.optim = 'lion'",
        ),
        (["grpo.lr_scheduler_type=cosin"], 'one of "constant", "constant_with_warmup", "linear", "cosine"'),
    ],
)
def test_what_does_not_fit(settings, pattern):
    with pytest.raises(ConfigError, match=pattern):
        load_config(None, settings)
    load_config(None, ["grpo.optim=lion", "grpo.adam_beta2=0.99"])


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_whole_model_is_moved(name):
    """By the library's own step, whose parameters are a module."""
    model = tiny_model(num_layers=1)
    optimizer = make_optimizer(name)
    params = eqx.filter(model, eqx.is_inexact_array)
    gradients = jax.tree.map(lambda x: 0.01 * jr.normal(jr.key(x.size), x.shape), params)
    before = jax.tree.map(np.asarray, params)
    moved, state = apply_gradients((optimizer, gradients, jnp.float32(1e-3)), model, optimizer.init(params))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(eqx.filter(moved, eqx.is_inexact_array)), strict=True):
        assert 0 < np.abs(new - old).max() < 0.1
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(params))
