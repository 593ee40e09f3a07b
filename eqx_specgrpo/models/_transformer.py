"""One decoder-only transformer for Llama, SmolLM, Mistral, Qwen, Gemma, Phi, OLMo 2 and Granite."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from ._base import AbstractLanguageModel, Features
from ._cache import AbstractLayerCache, Cache, KVCache
from ._config import TransformerConfig
from ._fused import Fused, fused_gate_up, fused_qkv
from ._linear import AbstractLinear, Linear, gather, matmul
from ._norm import RMSNorm
from ._prefix import NoCache
from ._rope import RopeTable, apply_rope, rope_tables

Module = TypeVar("Module")


class Attention(eqx.Module):
    """Causal self-attention. One product computes queries, keys and values; `fused` gives the order of its outputs."""

    qkv: AbstractLinear
    output: AbstractLinear
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    config: TransformerConfig = eqx.field(static=True)
    sliding_window: int | None = eqx.field(static=True)
    rope: int | None = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, layer: int = 0, *, key: PRNGKeyArray):
        qkv_key, output_key = jr.split(key)
        self.config = config
        # Not the layer's number: layers that are alike in these are the same function, and compiled as one.
        self.sliding_window = config.window(layer)
        self.rope = config.rope(layer)
        self.qkv = _fused_linear(config.hidden_size, self.fused, use_bias=config.qkv_bias, key=qkv_key)
        self.output = Linear(
            config.num_heads * config.head_dim, config.hidden_size, use_bias=config.output_bias, key=output_key
        )
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            heads = (config.num_heads, config.num_kv_heads) if config.qk_norm_across_heads else (1, 1)
            self.query_norm, self.key_norm = (
                RMSNorm(count * config.head_dim, config.norm_eps, config.norm_offset) for count in heads
            )

    @property
    def fused(self) -> Fused:
        """The order of the outputs of `qkv`."""
        return fused_qkv(self.config.num_heads, self.config.num_kv_heads, self.config.head_dim)

    @jax.named_scope("Attention")
    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        positions: Int[Array, "batch seq"],
        ropes: tuple[RopeTable, ...],
        cache: AbstractLayerCache,
    ) -> tuple[Float[Array, "batch seq hidden"], AbstractLayerCache]:
        queries, keys, values = self.project(x, ropes)
        cap = self.config.attn_logit_softcapping
        mixed, cache = cache.attend(queries, keys, values, positions, self.sliding_window, cap)
        return self.output(mixed), cache

    def project(
        self, x: Float[Array, "batch seq hidden"], ropes: tuple[RopeTable, ...]
    ) -> tuple[
        Float[Array, "batch seq heads head_dim"],
        Float[Array, "batch kv_heads seq head_dim"],
        Float[Array, "batch kv_heads seq head_dim"],
    ]:
        """Computes queries, keys and values of a block, with rotary embeddings applied to the first two."""
        config = self.config
        batch, seq, _ = x.shape
        group = config.num_heads // config.num_kv_heads
        heads = self.qkv(x).reshape(batch, seq, config.num_kv_heads, group + 2, config.head_dim)
        queries = heads[:, :, :, :group].reshape(batch, seq, config.num_heads, config.head_dim)
        keys, values = heads[:, :, :, group], heads[:, :, :, group + 1]
        if self.query_norm is not None and self.key_norm is not None:
            if config.qk_norm_across_heads:
                queries, keys = _normalize_heads(self.query_norm, queries), _normalize_heads(self.key_norm, keys)
            else:
                # One reduction for both, whose epsilon is the same. What follows is elementwise, and on a GPU a part of
                # the kernels that turn queries and write keys.
                scale = self.query_norm.scale(heads[:, :, :, : group + 1])
                queries = self.query_norm.scaled(queries, scale[:, :, :, :group].reshape(batch, seq, -1, 1))
                keys = self.key_norm.scaled(keys, scale[:, :, :, group])
        if self.rope is not None:
            queries, keys = apply_rope(queries, ropes[self.rope]), apply_rope(keys, ropes[self.rope])
        if config.attention_multiplier is not None:
            # Attention itself divides by the root of the head's size.
            queries = queries * (config.attention_multiplier * math.sqrt(config.head_dim))
        return queries, keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)


def _normalize_heads(
    norm: RMSNorm, x: Float[Array, "batch seq heads head_dim"]
) -> Float[Array, "batch seq heads head_dim"]:
    """Each head by itself, or all of them at once, by the size of the norm."""
    size = norm.weight.shape[0]
    return norm(x.reshape(*x.shape[:2], -1, size)).reshape(x.shape)


def _fused_linear(in_size: int, fused: Fused, *, use_bias: bool, key: PRNGKeyArray) -> Linear:
    """Random: that of the layers one after the other, in the order of `fused`."""
    linear = Linear(in_size, sum(fused.sizes), use_bias=use_bias, key=key)
    return eqx.tree_at(lambda m: m.weight, linear, fused.joined(jnp.split(linear.weight, np.cumsum(fused.sizes)[:-1])))


def with_grouped_outputs(tree: Module) -> Module:
    """Converts weights of files that were written before outputs were grouped. In those files the outputs of the layers
    that one product computes follow one another.

    **Arguments:**

    - `tree`: a model, or anything that has such layers in it: an optimizer's state.
    """

    def grouped(part):
        if not isinstance(part, Attention | MLP):
            return part
        sizes = part.fused.sizes
        where = (lambda m: m.qkv) if isinstance(part, Attention) else (lambda m: m.gate_up)

        def one(x):  # Of an optimizer's factors of a matrix, only those by its outputs have their number.
            of_outputs = eqx.is_array(x) and x.shape[:1] == (sum(sizes),)
            return part.fused.joined(jnp.split(x, np.cumsum(sizes)[:-1])) if of_outputs else x

        return eqx.tree_at(where, part, jax.tree.map(one, where(part)))

    return jax.tree.map(grouped, tree, is_leaf=lambda part: isinstance(part, Attention | MLP))


def _times(factor: float, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
    return x if factor == 1 else factor * x


class MLP(eqx.Module):
    """SwiGLU or GeGLU (Shazeer 2020). One product computes the gate and up projections; `fused` gives the order of its
    outputs."""

    gate_up: AbstractLinear
    down: AbstractLinear
    activation: Literal["silu", "gelu_tanh"] = eqx.field(static=True)
    fused: Fused = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        gate_up_key, down_key = jr.split(key)
        self.activation = config.activation
        self.fused = fused_gate_up(config.intermediate_size)
        self.gate_up = _fused_linear(config.hidden_size, self.fused, use_bias=config.mlp_bias, key=gate_up_key)
        self.down = Linear(config.intermediate_size, config.hidden_size, use_bias=config.mlp_bias, key=down_key)

    @jax.named_scope("MLP")
    def __call__(self, x: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        gate_up = self.gate_up(x)
        if self.activation == "silu":
            return self.down(_swiglu(self.fused, gate_up))
        gate, up = self.fused.split(gate_up)
        return self.down(jax.nn.gelu(gate, approximate=True) * up)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(fused: Fused, gate_up: Float[Array, "batch seq both"]) -> Float[Array, "batch seq intermediate"]:
    """`silu(gate) * up`. The backward keeps its argument alone, where autodiff keeps three arrays more."""
    gate, up = fused.split(gate_up)
    return jax.nn.silu(gate) * up


def _swiglu_fwd(fused, gate_up):
    return _swiglu(fused, gate_up), gate_up


def _swiglu_bwd(fused, gate_up, cotangent):
    gate, up = fused.split(gate_up)
    # The logistic function, written otherwise than in the forward: else XLA takes it for the same value, and keeps it.
    opened = 0.5 * (1.0 + jnp.tanh(0.5 * gate))
    d_gate = cotangent * up * opened * (1.0 + gate * (1.0 - opened))
    return (fused.merge([d_gate, cotangent * gate * opened]),)


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


class Block(eqx.Module):
    """Residual block, with norms before attention and MLP, after them, or both."""

    attention_norm: RMSNorm | eqx.nn.Identity
    attention: Attention
    attention_post_norm: RMSNorm | eqx.nn.Identity
    mlp_norm: RMSNorm | eqx.nn.Identity
    mlp: MLP
    mlp_post_norm: RMSNorm | eqx.nn.Identity
    residual_multiplier: float = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, layer: int = 0, *, key: PRNGKeyArray):
        attention_key, mlp_key = jr.split(key)

        def norm(wanted: bool) -> RMSNorm | eqx.nn.Identity:
            return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset) if wanted else eqx.nn.Identity()

        before, after = config.norm_placement != "after", config.norm_placement != "before"
        self.attention_norm, self.attention_post_norm = norm(before), norm(after)
        self.attention = Attention(config, layer, key=attention_key)
        self.mlp_norm, self.mlp_post_norm = norm(before), norm(after)
        self.mlp = MLP(config, key=mlp_key)
        self.residual_multiplier = config.residual_multiplier

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        positions: Int[Array, "batch seq"],
        ropes: tuple[RopeTable, ...],
        cache: AbstractLayerCache,
    ) -> tuple[Float[Array, "batch seq hidden"], AbstractLayerCache]:
        attended, cache = self.attention(self.attention_norm(x), positions, ropes, cache)
        x = x + _times(self.residual_multiplier, self.attention_post_norm(attended))
        return x + _times(self.residual_multiplier, self.mlp_post_norm(self.mlp(self.mlp_norm(x)))), cache


class Transformer(AbstractLanguageModel):
    """Decoder-only transformer.

    Layers are a tuple of modules, with arrays of their own. Stacked weights would be sliced, and so copied, at every
    decoding step. A freshly constructed model has random weights; `load_model` fills one from a checkpoint.

    **Arguments:**

    - `config`: sizes and options.
    - `key`: for the random weights.
    """

    embedding: Float[Array, "vocab hidden"]
    blocks: tuple[Block, ...]
    norm: RMSNorm
    unembedding: Float[Array, "vocab hidden"] | None
    config: TransformerConfig = eqx.field(static=True)

    def __init__(self, config: TransformerConfig, *, key: PRNGKeyArray):
        embedding_key, unembedding_key, *block_keys = jr.split(key, config.num_layers + 2)
        shape = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = 0.02 * jr.normal(embedding_key, shape)
        self.blocks = tuple(Block(config, layer, key=block_key) for layer, block_key in enumerate(block_keys))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
        self.unembedding = None if config.tie_embeddings else 0.02 * jr.normal(unembedding_key, shape)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def max_length(self) -> int:
        return self.config.max_length

    def init_cache(self, batch: int, capacity: int, dtype: DTypeLike) -> Cache:
        config = self.config
        return tuple(KVCache.empty(batch, config.num_kv_heads, capacity, config.head_dim, dtype) for _ in self.blocks)

    def no_cache(self) -> Cache:
        return tuple(NoCache() for _ in self.blocks)

    def first_layers(self, num_layers: int) -> "Transformer":
        """Returns a transformer of the first `num_layers` layers, with the same embedding, final norm and unembedding.

        Nothing is copied: the two share their arrays.
        """
        config = dataclasses.replace(self.config, num_layers=num_layers)
        shapes = eqx.filter_eval_shape(Transformer, config, key=jr.key(0))
        return eqx.tree_at(
            lambda m: (m.embedding, m.blocks, m.norm, m.unembedding),
            shapes,
            (self.embedding, self.blocks[:num_layers], self.norm, self.unembedding),
            is_leaf=lambda x: x is None,
        )

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        return _times(self.config.embedding_multiplier, gather(self.embedding, tokens))

    @jax.named_scope("Transformer.hidden")
    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        cache: Cache,
        *,
        layers: tuple[int, ...] = (),
    ) -> tuple[Features, Cache]:
        ropes = rope_tables(positions, self.config)
        x = self.embed(tokens)
        outputs, new_cache = [], []
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x, layer_cache = _apply_block(block, x, positions, ropes, layer_cache)
            outputs.append(x)
            new_cache.append(layer_cache)
        features = Features(last=self.norm(x), layers=tuple(outputs[layer] for layer in layers))
        return features, tuple(new_cache)

    @jax.named_scope("Transformer.unembed")
    def unembed(
        self, hidden: Float[Array, "*batch hidden"], ids: Int[Array, " size"] | None = None
    ) -> Float[Array, "*batch vocab_or_size"]:
        weight = self.embedding if self.unembedding is None else self.unembedding
        if ids is not None:
            # In a loop XLA takes this look-up out, so that it is made once a segment; see tests/test_vocabulary.py.
            weight = gather(weight, ids).astype(weight.dtype)
        logits = matmul(hidden, weight)
        logits = logits if self.config.logits_scaling == 1 else logits / self.config.logits_scaling
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)


@eqx.filter_jit
def _apply_block(
    block: Callable[..., tuple[Array, AbstractLayerCache]],
    x: Float[Array, "batch seq hidden"],
    positions: Int[Array, "batch seq"],
    ropes: tuple[RopeTable, ...],
    cache: AbstractLayerCache,
) -> tuple[Float[Array, "batch seq hidden"], AbstractLayerCache]:
    """A block as a function of its own: JAX traces, differentiates and lowers it once for all layers that are alike.
    XLA puts it back where it is called, so that what runs is the same."""
    return block(x, positions, ropes, cache)


def cast_weights(model: Module, dtype: DTypeLike) -> Module:
    """Returns the model (or draft) with its matrices in `dtype`. Norms and biases stay float32, which costs nothing.

    Take one such copy a step and decode with it: the dtype of a matrix is the dtype of its products.
    """

    def cast(x):
        return x.astype(dtype) if eqx.is_inexact_array(x) and x.ndim >= 2 else x

    return jax.tree.map(cast, model)


def sequence_features(
    model: AbstractLanguageModel, tokens: Int[Array, "batch seq"], *, layers: tuple[int, ...] = ()
) -> Features:
    """Computes the hidden states of whole, right-padded sequences without a cache, for training and scoring."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=tokens.dtype)[None], tokens.shape)
    features, _ = model.hidden(tokens, positions, model.no_cache(), layers=layers)
    return features
