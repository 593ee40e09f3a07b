"""LoRA: the adapters, what they are merged to, and their gradients."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import quick_compilation
from made_rollouts import make_rollouts
from tiny_run import tiny_model

from eqx_specgrpo.errors import UserError
from eqx_specgrpo.grpo import (
    LossNormalizer,
    LossSettings,
    adamw,
    compute_copy,
    make_update_batch,
    policy_forward,
    policy_gradients,
)
from eqx_specgrpo.models import (
    ALL_LINEAR,
    AdaptedTransformer,
    Adapters,
    LowRank,
    Transformer,
    TransformerConfig,
    adapted_layers,
    cast_weights,
    sequence_features,
)

RANK = 4
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def moved(adapters: Adapters, size: float = 0.1) -> Adapters:
    """As after some training: with fresh ones, half of the gradients are 0."""
    keys = iter(jr.split(jr.key(7), 2 * len(adapters.layers)))
    return jax.tree.map(lambda x: x + size * jr.normal(next(keys), x.shape), adapters)


@pytest.fixture(scope="module")
def policy() -> AdaptedTransformer:
    base = tiny_model()
    return AdaptedTransformer(base, moved(Adapters.fresh(base.config, RANK, 8.0, ALL_LINEAR, key=jr.key(1))))


def dense(policy: AdaptedTransformer, adapters: Adapters) -> Transformer:
    """The merge written out by hand, to be differentiated as it stands."""
    config, blocks = policy.base.config, []
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": 48, "up_proj": 48}
    for i, block in enumerate(policy.base.blocks):

        def update(name: str, layer: int = i) -> jax.Array:
            place = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            part = adapters.layers.get(f"model.layers.{layer}.{place}.{name}")
            zero = jnp.zeros((sizes.get(name, 32), 48 if name == "down_proj" else 32))
            return zero if part is None else adapters.scale * part.up @ part.down

        qkv, gate_up = block.attention.fused, block.mlp.fused

        blocks.append(
            eqx.tree_at(
                lambda b: (b.attention.qkv.weight, b.attention.output.weight, b.mlp.gate_up.weight, b.mlp.down.weight),
                block,
                (
                    block.attention.qkv.weight + qkv.joined([update(name) for name in ("q_proj", "k_proj", "v_proj")]),
                    block.attention.output.weight + update("o_proj"),
                    block.mlp.gate_up.weight + gate_up.joined([update(name) for name in ("gate_proj", "up_proj")]),
                    block.mlp.down.weight + update("down_proj"),
                ),
            )
        )
    return eqx.tree_at(lambda m: m.blocks, policy.base, tuple(blocks))


def step_inputs():
    """Four completions of two prompts, and what a loss needs besides them."""
    rng = np.random.default_rng(0)
    completions = [rng.integers(5, 250, length).tolist() for length in (8, 3, 6, 5)]
    rollouts = make_rollouts([[5, 9, 11], [7, 3, 2, 8]], [0, 0, 1, 1], completions)
    batch = make_update_batch(rollouts, np.array([1.0, -1.0, 0.5, -0.5], np.float32))
    return batch, LossNormalizer.from_mask(batch.completion_mask, 8), LossSettings(chunk=16)


@pytest.mark.parametrize("targets", [ALL_LINEAR, ["k_proj", "up_proj", "model.layers.1.mlp.down_proj"]])
def test_gradients_are_those_of_the_merge(policy, targets):
    """Of narrow products, against JAX's own derivative of the dense merge; some layers have adapters, or all."""
    if targets != ALL_LINEAR:
        policy = policy.with_adapters(moved(Adapters.fresh(policy.base.config, RANK, 8.0, targets, key=jr.key(2))))
    batch, normalizer, settings = step_inputs()
    weights = compute_copy(policy, "float32")
    ours, _ = policy_gradients(weights, batch, normalizer, settings, adapters=policy.adapters)

    @eqx.filter_jit
    def reference(adapters):
        grad = eqx.filter_grad(lambda a: policy_forward(dense(policy, a), batch, normalizer, settings)[0].loss)
        return grad(adapters)

    expected = reference(policy.adapters)
    assert ours.gradients.layers.keys() == expected.layers.keys()
    for name, part in expected.layers.items():
        for mine, theirs in zip(jax.tree.leaves(ours.gradients.layers[name]), jax.tree.leaves(part), strict=True):
            scale = float(jnp.abs(theirs).max())
            assert scale > 0
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def test_merging(policy):
    """The weights are the base plus the product; what has no adapter is the base's own array; a fresh adapter changes
    no bit; and the same twice is the same."""
    merged = policy.merged("float32")
    by_hand = dense(policy, policy.adapters)
    for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert merged.embedding is policy.base.embedding and merged.unembedding is policy.base.unembedding
    for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(policy.merged("float32")), strict=True):
        np.testing.assert_array_equal(one, other)
    fresh = Adapters.fresh(policy.base.config, RANK, 8.0, ALL_LINEAR, key=jr.key(1))
    for one, other in zip(
        jax.tree.leaves(policy.with_adapters(fresh).merged("float32")), jax.tree.leaves(policy.base), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_merging_in_bfloat16_is_rounded_once(policy):
    """Base and adapters are added in float32, whatever the base is held in, and the sum is what is rounded."""
    base = compute_copy(policy.base, "bfloat16")
    merged = AdaptedTransformer(base, policy.adapters).merged("bfloat16")
    exact = AdaptedTransformer(base, policy.adapters).merged("float32")
    one, other = merged.blocks[0].attention.qkv.weight, exact.blocks[0].attention.qkv.weight  # pyright: ignore
    assert one.dtype == jnp.bfloat16 and other.dtype == jnp.float32
    np.testing.assert_array_equal(one, other.astype(jnp.bfloat16))
    # Rounding the product before it is added gives something else.
    part = policy.adapters.layers["model.layers.0.self_attn.q_proj"]
    product = (policy.adapters.scale * part.up @ part.down).astype(jnp.bfloat16)
    order = base.blocks[0].attention.fused  # pyright: ignore
    queries, rounded_once = (order.parted(x)[0] for x in (base.blocks[0].attention.qkv.weight, one))  # pyright: ignore
    assert np.any(queries + product != rounded_once)


def test_full_rank_can_say_every_update(policy):
    """With a rank of min(out, in), factors of any dense update are found, and the model is the updated one."""
    base = policy.base
    keys = iter(jr.split(jr.key(3), 100))
    wanted = jax.tree.map(
        lambda x: x + 0.05 * jnp.std(x) * jr.normal(next(keys), x.shape) if x.ndim >= 2 else x, base.blocks
    )
    target = eqx.tree_at(lambda m: m.blocks, base, wanted)
    adapters = Adapters.fresh(base.config, 32, 32.0, ALL_LINEAR, key=jr.key(0))
    index = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "gate_proj": 0, "up_proj": 1}

    def exact(name: str, part: LowRank) -> LowRank:
        layer, word = int(name.split(".")[2]), name.split(".")[-1]
        place = {"o_proj": lambda b: b.attention.output, "down_proj": lambda b: b.mlp.down}.get(word)
        if place is None:
            place = (lambda b: b.attention.qkv) if word in ("q_proj", "k_proj", "v_proj") else lambda b: b.mlp.gate_up
        update = np.asarray(place(wanted[layer]).weight - place(base.blocks[layer]).weight, np.float64)
        if word in index:
            block = base.blocks[layer]
            order = block.attention.fused if "self_attn" in name else block.mlp.fused
            update = order.parted(update)[index[word]]
        left, values, right = np.linalg.svd(update, full_matrices=False)
        up, down = np.zeros(part.up.shape, np.float32), np.zeros(part.down.shape, np.float32)
        up[:, : len(values)], down[: len(values)] = left * np.sqrt(values), np.sqrt(values)[:, None] * right
        return eqx.tree_at(lambda p: (p.up, p.down), part, (jnp.asarray(up), jnp.asarray(down)))

    found = dataclasses.replace(adapters, layers={name: exact(name, part) for name, part in adapters.layers.items()})
    tokens = jnp.arange(24).reshape(2, 12)
    logits = [
        m.unembed(sequence_features(m, tokens).last) for m in (target, policy.with_adapters(found).merged("float32"))
    ]
    assert float(jnp.abs(logits[0] - base.unembed(sequence_features(base, tokens).last)).max()) > 0.1
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-3)


def test_no_array_of_a_weights_size_in_the_backward():
    """The program of the gradients by adapters has no room for those by the weights."""
    config = TransformerConfig(
        vocab_size=64, hidden_size=128, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
        max_position_embeddings=32,
    )  # fmt: skip
    base = Transformer(config, key=jr.key(0))
    adapters = Adapters.fresh(config, 2, 8.0, ALL_LINEAR, key=jr.key(1))
    rollouts = make_rollouts([[5, 9, 11]], [0, 0], [[3, 4], [5, 6]])
    batch = make_update_batch(rollouts, np.array([1.0, -1.0], np.float32))
    normalizer, settings = LossNormalizer.from_mask(batch.completion_mask, 2), LossSettings(chunk=4)

    def bytes_of(**arguments) -> int:
        compiled = policy_gradients.lower(base, batch, normalizer, settings, **arguments).compile()
        memory = compiled.compiled.memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    weights = 4 * sum(x.size for x in jax.tree.leaves(base.blocks))
    assert bytes_of() > weights
    assert bytes_of(adapters=adapters) < weights / 2


def test_targets():
    config = tiny_model().config
    names = adapted_layers(config, ALL_LINEAR)
    attention, mlp = [f"self_attn.{name}" for name in NAMES[:4]], [f"mlp.{name}" for name in NAMES[4:]]
    assert names[:7] == [f"model.layers.0.{name}" for name in attention + mlp]
    assert len(names) == 14
    assert adapted_layers(config, ["q_proj", "v_proj"]) == [
        name for name in names if name.endswith(("q_proj", "v_proj"))
    ]
    assert adapted_layers(config, r".*layers\.1\.mlp\..*") == names[11:]
    for targets, message in (
        (["q_proj", "q"], "lora.targets has 'q', which matches no layer.*q_proj, k_proj, v_proj, o_proj, gate_proj"),
        ("q_proj", "lora.targets = 'q_proj' matches no layer.*model.layers.0.self_attn.q_proj"),
        ("(", "is no regular expression"),
    ):
        with pytest.raises(UserError, match=message):
            adapted_layers(config, targets)
    with pytest.raises(UserError, match="lora.rank = 33.*above 32: set lora.rank=32 or less"):
        Adapters.fresh(config, 33, 8.0, ALL_LINEAR, key=jr.key(0))


def size_of(tree) -> float:
    """GB of arrays, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)) / 1e9


def test_memory_in_the_documentation():
    """The table of docs/lora.md is what the shapes say."""
    optimizer = adamw(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, max_grad_norm=1.0)
    columns = []
    for sizes in (
        dict(hidden_size=2048, intermediate_size=6144, num_layers=28, num_heads=16, tie_embeddings=True),
        dict(hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32, tie_embeddings=False),
    ):
        config = TransformerConfig(
            vocab_size=151936, num_kv_heads=8, head_dim=128, max_position_embeddings=40960, qk_norm=True, **sizes
        )
        full = eqx.filter_eval_shape(Transformer, config, key=jr.key(0))
        base = eqx.filter_eval_shape(lambda m: cast_weights(m, jnp.bfloat16), full)
        adapters = eqx.filter_eval_shape(Adapters.fresh, config, 16, 32.0, ALL_LINEAR, key=jr.key(0))
        merged = eqx.filter_eval_shape(lambda b, a: AdaptedTransformer(b, a).merged("bfloat16"), base, adapters)
        for trained, held, copied in ((full, 0.0, size_of(base)), (adapters, size_of(base), size_of(merged.blocks))):
            arrays = eqx.filter(trained, lambda x: isinstance(x, jax.ShapeDtypeStruct))
            moments = size_of(jax.eval_shape(optimizer.init, arrays))
            rows = [size_of(trained), size_of(trained), moments, held, copied]
            columns.append([*rows, sum(rows)])
    text = (Path(__file__).parents[1] / "docs" / "lora.md").read_text(encoding="utf-8")
    table = text.partition("<!-- memory: begin -->")[2].partition("<!-- memory: end -->")[0]
    for row, line in enumerate(table.strip().splitlines()[2:]):
        cells = [cell.strip().removesuffix(" GB") for cell in line.strip("|").split("|")[1:]]
        assert [float(cell or 0) for cell in cells] == pytest.approx([column[row] for column in columns], abs=0.006), (
            line
        )
    assert columns[1][-1] < 0.22 * columns[0][-1] and columns[3][-1] < 0.22 * columns[2][-1]
