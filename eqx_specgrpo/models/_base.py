"""What the rest of the library needs from a language model."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from ._cache import Cache, KVCache


class Features(eqx.Module):
    """Hidden states of the target, as drafts and losses consume them. Float32.

    **Arguments:**

    - `last`: after the final norm, what `unembed` takes; row `i` predicts token `i + 1`.
    - `layers`: the residual stream after each layer that was asked for, in the order asked.
    """

    last: Float[Array, "batch seq hidden"]
    layers: tuple[Float[Array, "batch seq hidden"], ...] = ()


class AbstractLanguageModel(eqx.Module):
    """A causal language model whose hidden states and unembedding can be used separately.

    Subclasses implement four methods. Batches are explicit, because cursors, caches and shapes of a batch are exactly
    what decoding is about. Everything is position-based: no method knows about padding.
    """

    vocab_size: eqx.AbstractVar[int]
    hidden_size: eqx.AbstractVar[int]
    max_length: eqx.AbstractVar[int]

    @abstractmethod
    def init_cache(self, batch: int, capacity: int, dtype: DTypeLike) -> Cache:
        """An empty cache for `batch` rows of at most `capacity` positions."""

    @abstractmethod
    def no_cache(self) -> Cache:
        """Null caches: the block attends to itself."""

    @abstractmethod
    def hidden(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        cache: Cache,
        *,
        layers: tuple[int, ...] = (),
    ) -> tuple[Features, Cache]:
        """One forward over a block of tokens at consecutive absolute positions.

        **Arguments:**

        - `tokens`: token ids.
        - `positions`: absolute positions, counted from 0 at the row's first token.
        - `cache`: from `init_cache`, `no_cache`, or an earlier call.
        - `layers`: which layers' outputs to return in `Features.layers`.
        """

    @abstractmethod
    def unembed(
        self, hidden: Float[Array, "*batch hidden"], ids: Int[Array, " size"] | None = None
    ) -> Float[Array, "*batch vocab_or_size"]:
        """Float32 logits over the vocabulary, or of some of its tokens.

        **Arguments:**

        - `hidden`: as in `Features.last`.
        - `ids`: the tokens to compute logits for; all in order if `None`.
        """

    @abstractmethod
    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        """Token embeddings, float32; sequential drafts condition on them."""


def caches_can_grow(model: AbstractLanguageModel) -> bool:
    """Whether all of a model's layers keep their keys and values in a `KVCache` of as many slots as asked for.

    A model with another cache gets its whole capacity at once.
    """
    layers = eqx.filter_eval_shape(model.init_cache, 1, 2, jnp.float32)
    return all(type(layer) is KVCache and layer.values.shape[2] == 2 for layer in layers)
