"""LoRA: a frozen transformer with small trained factors beside its linear layers.

One policy has one set of weights. They are merged from the base and the factors, in float32, and then cast; rollouts
and updates use the same merged weights, which are thrown away when the factors have moved. Nothing is ever taken off
again: in bfloat16 that would not give the base back.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray, PyTree

from ..errors import UserError
from ._adapted_linear import AdaptedLinear, LowRank
from ._base import AbstractLanguageModel, Features
from ._cache import Cache
from ._config import TransformerConfig
from ._fused import Fused
from ._hf_families import FUSED
from ._hf_write import family_of
from ._linear import Linear
from ._transformer import Transformer
from ._weights import LinearSlot, linear_slots

ALL_LINEAR = "all-linear"


class Adapters(eqx.Module):
    """All that is trained of a policy with LoRA.

    **Arguments:**

    - `layers`: the factors, by the name of their layer in Hugging Face's model.
    - `rank`, `alpha`: the product of a layer's factors counts `alpha / rank`, unless `scale` says otherwise.
    """

    layers: dict[str, LowRank]
    rank: int = eqx.field(static=True)
    alpha: float = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(self, layers: dict[str, LowRank], rank: int, alpha: float, scale: float | None = None):
        self.layers, self.rank, self.alpha = layers, rank, alpha
        self.scale = alpha / rank if scale is None else scale

    @staticmethod
    def fresh(
        config: TransformerConfig, rank: int, alpha: float, targets: str | Sequence[str], *, key: PRNGKeyArray
    ) -> "Adapters":
        """Adapters that change nothing yet.

        **Arguments:**

        - `config`: the base's.
        - `rank`, `alpha`: see above.
        - `targets`: which layers, see [`eqx_specgrpo.models.adapted_layers`][].
        - `key`: for the random factors.

        **Raises:**

        `UserError` if the targets match nothing, or the rank is larger than any of the layers can use.
        """
        shapes = layer_shapes(config)
        names = adapted_layers(config, targets)
        most = max(min(shapes[name]) for name in names)
        if rank > most:
            raise UserError(
                f"lora.rank = {rank}, but the largest of the adapted layers can't have an update of a rank above "
                f"{most}: set lora.rank={most} or less (16 is usual)"
            )
        keys = jr.split(key, len(names))
        layers = {
            name: LowRank(shapes[name][1], shapes[name][0], rank, key=own)
            for name, own in zip(names, keys, strict=True)
        }
        return Adapters(layers, rank, alpha)


def slots_of(config: TransformerConfig) -> list[LinearSlot]:
    """The linear layers, in the parts that Hugging Face's model of the same configuration has."""
    return linear_slots(config, fused=family_of(config) in FUSED)


def layer_shapes(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """`(out, in)` of each layer that can be adapted, by its name in Hugging Face's model."""
    return {name: shape for slot in slots_of(config) for name, shape in slot.parts.items()}


def short_names(names: Iterable[str]) -> list[str]:
    """The last words of layers' names, each once: `q_proj` and so on."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def adapted_layers(config: TransformerConfig, targets: str | Sequence[str]) -> list[str]:
    """The layers that `targets` means, as in PEFT's `target_modules`.

    **Arguments:**

    - `targets`: `"all-linear"`, a regular expression for whole names, or a list of names or of their last parts.

    **Raises:**

    `UserError` if it, or one of the list, matches none; it has the names that there are.
    """
    names = list(layer_shapes(config))
    if targets == ALL_LINEAR:
        return names
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise UserError(
                f"lora.targets = {targets!r} is no regular expression: {error}. {_there_are(names)}"
            ) from None
        found = [name for name in names if pattern.fullmatch(name)]
        if not found:
            raise UserError(f"lora.targets = {targets!r} matches no layer. {_there_are(names)}")
        return found
    for target in targets:
        if not any(_is_meant(name, target) for name in names):
            raise UserError(f"lora.targets has {target!r}, which matches no layer. {_there_are(names)}")
    found = [name for name in names if any(_is_meant(name, target) for target in targets)]
    if not found:
        raise UserError(f"lora.targets is empty. {_there_are(names)}")
    return found


def _is_meant(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _there_are(names: Sequence[str]) -> str:
    return (
        f"Write a list of {', '.join(short_names(names))}, a regular expression for whole names such as {names[0]}, or "
        f'"{ALL_LINEAR}"'
    )


class AdaptedTransformer(AbstractLanguageModel):
    """A transformer that stands still, and adapters that learn.

    It is a language model like any other, whose weights are merged anew at each call. For more than one call, take
    the weights out with `merged`.

    **Arguments:**

    - `base`: its matrices are float32 or bfloat16.
    - `adapters`: float32.
    """

    base: Transformer
    adapters: Adapters

    def __init__(self, base: Transformer, adapters: Adapters):
        self.base, self.adapters = base, adapters

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.base.hidden_size

    @property
    def max_length(self) -> int:
        return self.base.max_length

    def init_cache(self, batch: int, capacity: int, dtype: DTypeLike) -> Cache:
        return self.base.init_cache(batch, capacity, dtype)

    def no_cache(self) -> Cache:
        return self.base.no_cache()

    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        cache: Cache,
        *,
        layers: tuple[int, ...] = (),
    ) -> tuple[Features, Cache]:
        return self.merged(self.base.embedding.dtype).hidden(tokens, positions, cache, layers=layers)

    def unembed(
        self, hidden: Float[Array, "*batch hidden"], ids: Int[Array, " size"] | None = None
    ) -> Float[Array, "*batch vocab_or_size"]:
        return self.base.unembed(hidden, ids)

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        return self.base.embed(tokens)

    def with_adapters(self, adapters: Adapters) -> "AdaptedTransformer":
        """The same base with others."""
        return AdaptedTransformer(self.base, adapters)

    def base_in(self, dtype: DTypeLike) -> Transformer:
        """The base with its matrices in `dtype`. Where they are so already, it is the base itself, and no copy."""
        return jax.tree.map(lambda x: x.astype(dtype) if _is_matrix(x) and x.dtype != dtype else x, self.base)

    def merged(self, dtype: DTypeLike) -> Transformer:
        """The policy's effective weights: the base's and the adapters', added up in float32 and cast to `dtype`.

        Matrices without adapters are the base's own arrays, where the dtype is the same. Equal arguments give equal
        bits.
        """
        dtype = jnp.dtype(dtype)
        slots = [slot for slot in slots_of(self.base.config) if set(slot.parts) & set(self.adapters.layers)]
        weights = []
        for slot in slots:  # One at a time: of one weight only there is a copy in float32.
            factors, order, layers = _of_slot(slot, self.adapters)
            weights.append(_merge(slot.where(self.base).weight, factors, order, layers, self.adapters.scale, dtype))
        adapted = eqx.tree_at(lambda m: [slot.where(m).weight for slot in slots], self.base, weights)
        return AdaptedTransformer(adapted, self.adapters).base_in(dtype)


def _is_matrix(x: Array) -> bool:
    return eqx.is_inexact_array(x) and x.ndim >= 2


def _of_slot(slot: LinearSlot, adapters: Adapters) -> tuple[tuple[LowRank, ...], Fused, tuple[tuple[int, int], ...]]:
    """The factors of the layers that make up one weight, the order of its outputs, and which layers of it each is."""
    order = Fused((sum(size for size, _ in slot.parts.values()),)) if slot.order is None else slot.order
    names = [name for name in slot.parts if name in adapters.layers]
    layers = tuple(slot.layers_of(name).indices(len(order.sizes))[:2] for name in names)
    return tuple(adapters.layers[name] for name in names), order, layers


@eqx.filter_jit
def _merge(
    weight: Float[Array, "out in"],
    factors: tuple[LowRank, ...],
    order: Fused,
    layers: tuple[tuple[int, int], ...],
    scale: float,
    dtype: jnp.dtype,
) -> Float[Array, "out in"]:
    merged = weight.astype(jnp.float32).reshape(order.groups, order.group_size, weight.shape[1])
    for part, (first, end) in zip(factors, layers, strict=True):
        ups = jnp.split(part.up, np.cumsum(order.sizes[first:end])[:-1])
        for up, (start, stop) in zip(ups, order.places()[first:end], strict=True):
            update = jnp.matmul(up, part.down, precision=lax.Precision.HIGHEST)
            merged = merged.at[:, start:stop].add(scale * update.reshape(order.groups, stop - start, -1))
    return merged.reshape(weight.shape).astype(dtype)


def with_low_rank_gradients(merged: Transformer, adapters: Adapters) -> Transformer:
    """The same function of the tokens, whose derivatives are by the adapters.

    **Arguments:**

    - `merged`: the weights, with the adapters in them.
    - `adapters`: those that were merged; what is to be differentiated by.
    """
    slots = [slot for slot in slots_of(merged.config) if set(slot.parts) & set(adapters.layers)]

    def adapted(slot: LinearSlot) -> AdaptedLinear:
        linear: Linear = slot.where(merged)
        return AdaptedLinear(linear.weight, linear.bias, *_of_slot(slot, adapters), adapters.scale)

    return eqx.tree_at(lambda m: [slot.where(m) for slot in slots], merged, [adapted(slot) for slot in slots])


def are_factors(tree: PyTree) -> PyTree:
    """Which leaves of a tree are adapters' factors: a tree of booleans of the same structure."""

    def of_part(part: Any) -> Any:
        return jax.tree.map(lambda _: isinstance(part, LowRank), part)

    return jax.tree.map(of_part, tree, is_leaf=lambda part: isinstance(part, LowRank))
