"""One decoder layer over the target's features (Li et al. 2024, EAGLE; Li et al. 2025, EAGLE-3)."""

from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray
from pydantic import Field

from ..models import (
    AbstractLanguageModel,
    Features,
    KVCache,
    Transformer,
    TransformerConfig,
    default_cache_dtype,
)
from ._base import AbstractDraft, DraftError, Proposal, pick_positions
from ._eagle_layer import EagleLayer
from ._kind import DraftKind, as_transformer
from ._sampler import AbstractSampler
from ._vocabulary import AbstractDraftVocabulary, FullVocabulary


class EagleState(eqx.Module):
    """What the draft knows of each row.

    The newest features stand at `positions`. The cache holds the entries of all positions before it, each made from the
    features there and the token after it. The token after the newest features comes with the next round, and until then
    their entry can't be made: they wait.

    **Arguments:**

    - `cache`: keys and values; at and beyond `positions` it holds anything.
    - `fused`: the newest features, fused.
    - `last`: the target's last hidden state there, which predicted the last committed token.
    - `positions`: absolute.
    """

    cache: KVCache
    fused: Float[Array, "rows width"]
    last: Float[Array, "rows hidden"]
    positions: Int[Array, " rows"]


class EagleDraft(AbstractDraft[EagleState]):
    """A decoder layer that reads the target's features and embeddings and goes on from its own outputs.

    At a position it is told the target's features, of several layers and fused into one vector, and the token that
    follows; from these, and from all positions before by attention, it predicts the token after that. From the second
    drafted token on its own output stands in for the features. Its correction is added to the hidden state that
    predicted the token before, as in [`eqx_specgrpo.drafts.HydraHeads`][]: a fresh draft corrects nothing, so that it
    repeats the target's own prediction.

    Entries of its cache that come from its own outputs are replaced by true ones, from the target's features, when the
    round is committed, whether it drafted or not. One layer's keys and values need no attention, so that this costs two
    small products a position.

    It learns from its own outputs, unrolled for `train_length` steps from every position with the attention that
    decoding has (EAGLE-3, section 3.2, "training-time test"). Steps share all weights, so that it can draft more.

    Trained: everything in the module. Frozen, and not part of it: the target's embedding and unembedding.

    **Arguments:**

    - `hidden_size`: the target's.
    - `layers`: the target's layers whose outputs are fused with its last hidden state, counted from 0.
    - `max_length`: the most tokens drafted, 1 to 8.
    - `train_length`: the steps that training unrolls, at most `max_length`; by default 3 or fewer.
    - `width`: of the layer; by default `hidden_size`.
    - `num_heads`, `num_kv_heads`, `head_dim`: of its attention; by default heads of about 64, with keys of their own.
    - `intermediate_size`: of its MLP; by default 8/3 of the width, in 16s.
    - `rope_theta`: of its rotary embedding.
    - `vocabulary`: the tokens that it can say; see [`eqx_specgrpo.drafts.ReducedVocabulary`][].
    - `key`: for the weights.
    """

    layer: EagleLayer
    vocabulary: AbstractDraftVocabulary
    layers: tuple[int, ...] = eqx.field(static=True)
    max_length: int = eqx.field(static=True)
    train_length: int = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        *,
        layers: tuple[int, ...] = (),
        max_length: int = 4,
        train_length: int | None = None,
        width: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        rope_theta: float = 10000.0,
        vocabulary: AbstractDraftVocabulary | None = None,
        key: PRNGKeyArray,
    ):
        train_length = min(max_length, 3) if train_length is None else train_length
        if not 1 <= train_length <= max_length <= 8:
            raise ValueError(
                f"max_length is {max_length} and train_length {train_length}: an Eagle draft takes "
                "1 <= train_length <= max_length <= 8; longer chains lose more in verification than they gain"
            )
        if any(layer < 0 for layer in layers):
            raise ValueError(f"layers is {layers}: count the target's layers from 0")
        width = hidden_size if width is None else width
        if num_heads is None:
            num_heads = max(width // (64 if head_dim is None else head_dim), 1)
        config = TransformerConfig(
            vocab_size=1,
            hidden_size=width,
            intermediate_size=-(-width // 6) * 16 if intermediate_size is None else intermediate_size,
            num_layers=1,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=2 * max(width // (2 * num_heads), 1) if head_dim is None else head_dim,
            max_position_embeddings=1,
            rope_theta=rope_theta,
        )
        self.layer = EagleLayer(config, hidden_size, len(layers) + 1, key=key)
        self.vocabulary = FullVocabulary() if vocabulary is None else vocabulary
        self.layers = tuple(layers)
        self.max_length = max_length
        self.train_length = train_length

    @staticmethod
    def for_target(
        target: Transformer, *, max_length: int = 4, train_length: int | None = None, key: PRNGKeyArray
    ) -> "EagleDraft":
        """A fresh draft with the sizes of one of the target's layers, over a low, a middle and a high one of them."""
        config = target.config
        depth = config.num_layers
        return EagleDraft(
            config.hidden_size,
            layers=tuple(sorted({depth // 8, depth // 2, max(depth - 3, 0)})),
            max_length=max_length,
            train_length=train_length,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            rope_theta=config.rope_theta,
            key=key,
        )

    def check(self, target: AbstractLanguageModel) -> None:
        if self._hidden_size != target.hidden_size:
            raise DraftError(
                f"this Eagle draft takes hidden states of size {self._hidden_size}, but the target's have size "
                f"{target.hidden_size}: use a draft that was trained for this target, or a fresh one"
            )
        if isinstance(target, Transformer) and max(self.layers, default=0) >= target.config.num_layers:
            raise DraftError(
                f"this Eagle draft reads the target's layers {self.layers}, counted from 0, but the target has "
                f"{target.config.num_layers}: use a draft that was trained for this target, or a fresh one"
            )
        self.vocabulary.check(target)

    def begin(self, target, features, tokens, lengths, capacity, first) -> EagleState:
        del capacity
        return self.init(target, features, tokens, lengths, first)

    def grow(self, state: EagleState, capacity: int) -> EagleState:
        return EagleState(state.cache.with_slots(capacity), state.fused, state.last, state.positions)

    def init(self, target, features, tokens, lengths, capacity) -> EagleState:
        config = self.layer.block.attention.config
        fused = self._fused(features)
        cache = KVCache.empty(
            tokens.shape[0], config.num_kv_heads, capacity, config.head_dim, default_cache_dtype(self.layer)
        )
        cache = self.layer.absorb(cache, fused, target.embed(jnp.roll(tokens, -1, axis=1)), jnp.zeros_like(lengths))
        newest = lengths - 1
        return EagleState(cache, pick_positions(fused, newest), pick_positions(features.last, newest), newest)

    @jax.named_scope("EagleDraft.propose")
    def propose(self, target, state: EagleState, last_token, sampler: AbstractSampler, length: int):
        if length > self.max_length:
            raise ValueError(f"{length} tokens were asked of an Eagle draft with a max_length of {self.max_length}")
        cache, hidden, step_state, token, steps = state.cache, state.last, state.fused, last_token, []
        for offset in range(length):
            step_state, cache = self.layer.step(cache, step_state, target.embed(token), state.positions + offset)
            hidden = self.layer.correct(hidden, step_state)
            logits = self.vocabulary.unembed(target, hidden)
            token, distribution = sampler(logits, offset, self.vocabulary.support)
            steps.append((token, distribution))
        return Proposal.stack(steps), EagleState(cache, state.fused, state.last, state.positions)

    @jax.named_scope("EagleDraft.commit")
    def commit(self, target, state: EagleState, features, block, num_accepted) -> EagleState:
        # Each token of the block follows the features one position before it, the first those that have waited. What
        # follows a rejected token lies beyond the new cursor.
        fused = self._fused(features)
        followed = jnp.concatenate([state.fused[:, None], fused[:, :-1]], axis=1)
        cache = self.layer.absorb(state.cache, followed, target.embed(block), state.positions)
        # Finished rows are committed to until the batch shrinks. They must not walk out of the cache.
        last_start = cache.keys.shape[2] - (self.max_length + 1)
        return EagleState(
            cache,
            pick_positions(fused, num_accepted),
            pick_positions(features.last, num_accepted),
            jnp.minimum(state.positions + 1 + num_accepted, last_start),
        )

    @jax.named_scope("EagleDraft.train_hidden")
    def train_hidden(self, target, features: Features, tokens):
        # At position i the features predict token i + 1; that token is what the first step is told.
        newest = [target.embed(jnp.roll(tokens, -(1 + offset), axis=1)) for offset in range(self.train_length)]
        hidden, outputs = features.last, []
        for state in self.layer.unroll(self._fused(features), newest):
            hidden = self.layer.correct(hidden, state)
            outputs.append(hidden)
        return jnp.stack(outputs, axis=2)

    def train_logits(self, target, hidden):
        return self.vocabulary.unembed(target, hidden)

    def provenance(self) -> dict[str, Any]:
        config = self.layer.block.attention.config
        return {
            "hidden_size": self._hidden_size,
            "layers": list(self.layers),
            "max_length": self.max_length,
            "train_length": self.train_length,
            "width": config.hidden_size,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.intermediate_size,
            "rope_theta": config.rope_theta,
        }

    @property
    def _hidden_size(self) -> int:
        return self.layer.leave.weight.shape[0]

    def _fused(self, features: Features) -> Float[Array, "rows seq width"]:
        if len(features.layers) != len(self.layers):
            raise DraftError(
                f"this Eagle draft reads the target's layers {self.layers}, but the features hold the outputs of "
                f"{len(features.layers)} layers: ask the target for `layers=draft.layers`"
            )
        return self.layer.fused(features)


def _fresh(
    target: AbstractLanguageModel,
    max_length: int,
    *,
    train_length: Annotated[int, Field(ge=1, le=8)] | None = None,
    key: PRNGKeyArray,
) -> EagleDraft:
    """**Arguments:**

    - `train_length`: steps unrolled in training; none: 3, or max_length if that is less
    """
    transformer = as_transformer(target, "eagle")
    return EagleDraft.for_target(transformer, max_length=max_length, train_length=train_length, key=key)


def _rebuild(settings: dict[str, Any]) -> EagleDraft:
    rest = {name: value for name, value in settings.items() if name != "layers"}
    return EagleDraft(layers=tuple(settings["layers"]), **rest, key=jr.key(0))


def _check(max_length: int, train_length: int | None = None) -> None:
    if train_length is not None and train_length > max_length:
        raise ValueError(
            f"draft.options.train_length = {train_length} is more than draft.max_length = {max_length}: nothing that "
            "far ahead is ever drafted"
        )


DRAFT = DraftKind(EagleDraft, fresh=_fresh, rebuild=_rebuild, check=_check, needs_learning=True)
