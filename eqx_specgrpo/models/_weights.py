"""Which tensor of a Hugging Face checkpoint belongs where in a `Transformer`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, DTypeLike

from ..errors import CheckpointError
from ..files import TensorToWrite, on_host
from ._config import TransformerConfig
from ._fused import Fused, fused_gate_up, fused_qkv
from ._safetensors import StoredTensor, listing
from ._transformer import Transformer

# From an array's path in the model, names joined by points, and the array on the host to one on devices.
Place: TypeAlias = Callable[[str, np.ndarray], Array]

# Tables that older versions of transformers stored beside the weights; the model computes them itself.
_BUFFERS = ("rotary_emb.inv_freq",)
_EMBEDDING, _UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


def on_default_device(path: str, array: np.ndarray) -> Array:
    """Where JAX puts arrays."""
    del path
    return jnp.asarray(array)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """One array of the model, and the tensors that make it up; `order` as in `LinearSlot`."""

    where: Callable[[Transformer], Any]
    parts: dict[str, tuple[int, ...]]
    order: Fused | None = None


@dataclasses.dataclass(frozen=True)
class LinearSlot:
    """One linear layer of the model, and the layers of a checkpoint that make it up.

    **Arguments:**

    - `where`: from a `Transformer` to the layer.
    - `parts`: `(out, in)` of each, by the name of its module in Hugging Face's model.
    - `use_bias`: whether it has one.
    - `order`: of the model's outputs; a checkpoint has those of the layers one after the other, even where it calls
        them one layer. `None`: there is but one.
    """

    where: Callable[[Transformer], Any]
    parts: dict[str, tuple[int, int]]
    use_bias: bool
    order: Fused | None = None

    def layers_of(self, name: str) -> slice:
        """Which layers of `order` a part is: all where it is the only one."""
        if len(self.parts) == 1:
            return slice(None)
        index = list(self.parts).index(name)
        return slice(index, index + 1)


def linear_slots(config: TransformerConfig, *, fused: bool) -> list[LinearSlot]:
    """All linear layers but the unembedding, in order; `fused` as in `fill_model`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    gate_up = {"mlp.gate_proj": inner, "mlp.up_proj": inner}
    if fused:
        qkv, gate_up = {"self_attn.qkv_proj": queries + 2 * keys}, {"mlp.gate_up_proj": 2 * inner}

    def slot(
        i: int, module: Callable, use_bias: bool, in_size: int, parts: dict[str, int], order: Fused | None = None
    ) -> LinearSlot:
        names = {f"model.layers.{i}.{name}": (size, in_size) for name, size in parts.items()}
        return LinearSlot(lambda m: module(m.blocks[i]), names, use_bias, order)

    of_qkv, of_gate_up = fused_qkv(config.num_heads, config.num_kv_heads, config.head_dim), fused_gate_up(inner)

    return [
        one
        for i in range(config.num_layers)
        for one in (
            slot(i, lambda b: b.attention.qkv, config.qkv_bias, hidden, qkv, of_qkv),
            slot(i, lambda b: b.attention.output, config.output_bias, queries, {"self_attn.o_proj": hidden}),
            slot(i, lambda b: b.mlp.gate_up, config.mlp_bias, hidden, gate_up, of_gate_up),
            slot(i, lambda b: b.mlp.down, config.mlp_bias, inner, {"mlp.down_proj": hidden}),
        )
    ]


# What the norms of a block are called, by where it has them: before attention, after it, before the MLP, after it.
_NORMS = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "around": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


def _slots(config: TransformerConfig, fused: bool) -> list[_Slot]:
    hidden = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    slots = [
        _Slot(lambda m: m.embedding, {_EMBEDDING: (config.vocab_size, hidden)}),
        _Slot(lambda m: m.norm.weight, {"model.norm.weight": (hidden,)}),
    ]
    if not config.tie_embeddings:
        slots.append(_Slot(lambda m: m.unembedding, {_UNEMBEDDING: (config.vocab_size, hidden)}))

    def linear(one: LinearSlot) -> None:
        weights = {f"{name}.weight": shape for name, shape in one.parts.items()}
        slots.append(_Slot(lambda m: one.where(m).weight, weights, one.order))
        if one.use_bias:
            biases = {f"{name}.bias": shape[:1] for name, shape in one.parts.items()}
            slots.append(_Slot(lambda m: one.where(m).bias, biases, one.order))

    def norm(i: int, module: Callable, name: str, size: int) -> None:
        slots.append(_Slot(lambda m: module(m.blocks[i]).weight, {f"model.layers.{i}.{name}.weight": (size,)}))

    norms: tuple[Callable[[Any], Any], ...] = (
        lambda b: b.attention_norm,
        lambda b: b.attention_post_norm,
        lambda b: b.mlp_norm,
        lambda b: b.mlp_post_norm,
    )
    linears = iter(linear_slots(config, fused=fused))
    for i in range(config.num_layers):
        for module, name in zip(norms, _NORMS[config.norm_placement], strict=True):
            if name is not None:
                norm(i, module, name, hidden)
        linear(next(linears))
        linear(next(linears))
        if config.qk_norm:
            sizes = (queries, keys) if config.qk_norm_across_heads else (config.head_dim, config.head_dim)
            norm(i, lambda b: b.attention.query_norm, "self_attn.q_norm", sizes[0])
            norm(i, lambda b: b.attention.key_norm, "self_attn.k_norm", sizes[1])
        linear(next(linears))
        linear(next(linears))
    return slots


def fill_model(
    config: TransformerConfig,
    tensors: dict[str, StoredTensor],
    origin: Path,
    dtype: DTypeLike,
    *,
    fused: bool = False,
    place: Place = on_default_device,
) -> Transformer:
    """A `Transformer` whose every array comes from `tensors`, and which uses all of them.

    **Arguments:**

    - `tensors`: under their names in Hugging Face checkpoints.
    - `origin`: the file or folder, for messages.
    - `dtype`: of the matrices. Norms and biases are float32 always.
    - `fused`: queries, keys and values are one tensor, and so are gate and up (Phi-3).
    - `place`: see [`eqx_specgrpo.models.load_model`][]. One array at a time is whole on the host.

    **Raises:**

    `CheckpointError` that names the tensors which are missing, unexpected, or of another shape than `config` says.
    """
    slots = _slots(config, fused)
    expected = {name: shape for slot in slots for name, shape in slot.parts.items()}
    _check_tensors(config, expected, tensors, origin)

    def read(slot: _Slot) -> np.ndarray:
        parts = [tensors[name].read() for name in slot.parts]
        leaf_dtype = dtype if parts[0].ndim >= 2 else jnp.float32
        parts = [part.astype(leaf_dtype, copy=False) for part in parts]
        if slot.order is None:
            return parts[0]
        if len(parts) == 1:
            parts = np.split(parts[0], np.cumsum(slot.order.sizes)[:-1])
        return np.asarray(slot.order.joined(parts))

    # Only shapes of the random model are computed, so nothing is allocated that the checkpoint then replaces.
    skeleton = eqx.filter_eval_shape(Transformer, config, key=jr.key(0))
    paths = {id(leaf): name for name, leaf in _named_leaves(skeleton)}
    shapes = [slot.where(skeleton).shape for slot in slots]
    arrays = [place(paths[id(slot.where(skeleton))], read(slot)) for slot in slots]
    assert shapes == [array.shape for array in arrays]
    model = eqx.tree_at(lambda m: [slot.where(m) for slot in slots], skeleton, arrays)
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(model))
    return model


def _check_tensors(
    config: TransformerConfig,
    expected: dict[str, tuple[int, ...]],
    tensors: dict[str, StoredTensor],
    origin: Path,
) -> None:
    problems = []
    missing = [name for name in expected if name not in tensors]
    if missing:
        problems.append(f"{len(missing)} missing: {listing(missing)}")
    surplus = [name for name in tensors if name not in expected and not name.endswith(_BUFFERS)]
    if config.tie_embeddings and _UNEMBEDDING in surplus and not missing:
        # Some writers store the shared matrix twice. Two different ones would make the file contradict config.json.
        if not np.array_equal(tensors[_UNEMBEDDING].read(), tensors[_EMBEDDING].read()):
            problems.append(
                f"{_UNEMBEDDING} differs from {_EMBEDDING}, although tie_word_embeddings says that they are one: set "
                "it to false in config.json if the file is right"
            )
        surplus.remove(_UNEMBEDDING)
    if surplus:
        problems.append(f"{len(surplus)} unexpected: {listing(surplus)}")
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of the wrong shape: {listing(wrong)}")
    if problems:
        raise CheckpointError(
            f"the tensors in {origin} are not those that its configuration asks for: {'; '.join(problems)}"
        )


def _named_leaves(model: Transformer) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def model_tensors(model: Transformer, dtype: np.dtype, *, fused: bool = False) -> list[TensorToWrite]:
    """The model's arrays, split up and named as in Hugging Face checkpoints. Each comes to the host when it is written.

    **Arguments:**

    - `dtype`: to store what has two or more axes in; the others are stored as they are.
    - `fused`: as in `fill_model`.
    """
    tensors = []
    for slot in _slots(model.config, fused):
        array = slot.where(model)
        stored = dtype if array.ndim >= 2 else np.dtype(array.dtype)
        for number, (name, shape) in enumerate(slot.parts.items()):
            make = partial(_part, array, slot.order, number, len(slot.parts))
            tensors.append(TensorToWrite(name, stored, shape, make))
    return tensors


def _part(array: Array, order: Fused | None, number: int, count: int) -> np.ndarray:
    if order is None:
        return on_host(array)
    parts = order.parted(on_host(array))
    return parts[number] if count == len(parts) else np.concatenate(parts)
