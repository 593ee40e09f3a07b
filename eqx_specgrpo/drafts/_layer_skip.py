"""The target's own first layers as the draft (Elhoushi et al. 2024, LayerSkip, section 4.3; Zhang et al. 2024, Draft &
Verify), with a small adapter in place of the layers that are skipped."""

from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from pydantic import Field

from ..models import AbstractLanguageModel, Features, Linear, Transformer
from ._autoregressive import AutoregressiveState, check_max_length, draft_chain, make_room, start, take_in
from ._base import AbstractDraft, DraftError
from ._kind import DraftKind, as_transformer
from ._model import next_positions
from ._sampler import AbstractSampler
from ._vocabulary import AbstractDraftVocabulary, FullVocabulary


class ExitAdapter(eqx.Module):
    """What stands for the skipped layers: `x + scale * down(silu(up(x / scale)))`, `scale` the root mean square of `x`.

    The residual stream's size differs by orders of magnitude between models and layers; relative to it, one learning
    rate serves all. With `down` zero it is the identity.
    """

    up: Linear
    down: Linear

    def __init__(self, hidden_size: int, inner_size: int, *, key: PRNGKeyArray):
        self.up = Linear(hidden_size, inner_size, use_bias=True, key=key)
        down = Linear(inner_size, hidden_size, use_bias=True, key=key)
        self.down = eqx.tree_at(lambda linear: linear.weight, down, jnp.zeros((hidden_size, inner_size)))

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        scale = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-12)
        return x + scale * self.down(jax.nn.silu(self.up(x / scale)))


class EarlyExit(AbstractLanguageModel):
    """A transformer that is left after its last layer through an adapter.

    **Arguments:**

    - `model`: the layers, final norm and unembedding; see `Transformer.first_layers`.
    - `adapter`: between the last layer and the final norm.
    """

    model: Transformer
    adapter: ExitAdapter

    def __init__(self, model: Transformer, adapter: ExitAdapter):
        self.model = model
        self.adapter = adapter

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.model.hidden_size

    @property
    def max_length(self) -> int:
        return self.model.max_length

    def init_cache(self, batch, capacity, dtype):
        return self.model.init_cache(batch, capacity, dtype)

    def no_cache(self):
        return self.model.no_cache()

    def hidden(self, tokens, positions, cache, *, layers=()):
        last = len(self.model.blocks) - 1
        features, cache = self.model.hidden(tokens, positions, cache, layers=(*layers, last))
        *asked, residual = features.layers
        return Features(self.exit(residual), tuple(asked)), cache

    def exit(self, residual: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """From the residual stream after the last layer to what `unembed` takes."""
        return self.model.norm(self.adapter(residual))

    def unembed(self, hidden, ids=None):
        return self.model.unembed(hidden, ids)

    def embed(self, tokens):
        return self.model.embed(tokens)


class LayerSkipDraft(AbstractDraft[AutoregressiveState]):
    """Drafts token by token with the target's own first layers, leaving through an adapter to its norm and unembedding.

    There is no second model, and nothing of the target is part of the module: a draft step costs the share of layers
    that are not skipped, and the unembedding. It has a cache of its own for those layers. A fresh adapter adds zero:
    the pure early exit.

    Trained: `adapter`. Frozen, and not part of the module: the target's layers, norm and unembedding.

    **Arguments:**

    - `hidden_size`: the target's.
    - `num_layers`: how many of the target's layers to use.
    - `max_length`: the most tokens drafted, 1 to 8.
    - `inner_size`: width of the adapter's hidden layer; the target's hidden size if `None`.
    - `vocabulary`: the tokens that it can say; see [`eqx_specgrpo.drafts.ReducedVocabulary`][].
    - `key`: for the adapter's first weights.
    """

    adapter: ExitAdapter
    vocabulary: AbstractDraftVocabulary
    num_layers: int = eqx.field(static=True)
    max_length: int = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        max_length: int,
        inner_size: int | None = None,
        vocabulary: AbstractDraftVocabulary | None = None,
        *,
        key: PRNGKeyArray,
    ):
        self.vocabulary = FullVocabulary() if vocabulary is None else vocabulary
        check_max_length("LayerSkipDraft", max_length)
        self.adapter = ExitAdapter(hidden_size, hidden_size if inner_size is None else inner_size, key=key)
        self.num_layers = num_layers
        self.max_length = max_length

    @property
    def train_length(self) -> int:
        return 1

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer after which the draft leaves: its adapter learns from the target's own forward."""
        return (self.num_layers - 1,)

    def check(self, target: AbstractLanguageModel) -> None:
        if not isinstance(target, Transformer):
            raise DraftError(
                f"a LayerSkipDraft needs the layers of a Transformer, but the target is a {type(target).__name__}: use "
                "another kind of draft"
            )
        hidden_size = self.adapter.down.weight.shape[0]
        if hidden_size != target.hidden_size:
            raise DraftError(
                f"this LayerSkipDraft's adapter takes hidden states of size {hidden_size}, but the target's have size "
                f"{target.hidden_size}: use an adapter that was trained for this target, or a fresh one"
            )
        if not 1 <= self.num_layers <= len(target.blocks):
            raise DraftError(
                f"this LayerSkipDraft uses the first {self.num_layers} layers, but the target has "
                f"{len(target.blocks)}: choose num_layers from 1 to {len(target.blocks)}"
            )
        self.vocabulary.check(target)

    def begin(self, target, features, tokens, lengths, capacity, first) -> AutoregressiveState:
        del capacity
        return self.init(target, features, tokens, lengths, first)

    def grow(self, state: AutoregressiveState, capacity: int) -> AutoregressiveState:
        return make_room(state, capacity)

    def init(self, target, features, tokens, lengths, capacity) -> AutoregressiveState:
        del features
        return start(self._model(target), tokens, lengths, capacity)

    @jax.named_scope("LayerSkipDraft.propose")
    def propose(self, target, state: AutoregressiveState, last_token, sampler: AbstractSampler, length: int):
        return draft_chain(self._model(target), self.vocabulary, state, last_token, sampler, length)

    def commit(self, target, state: AutoregressiveState, features, block, num_accepted) -> AutoregressiveState:
        del target, features
        return take_in(state, block, num_accepted)

    def train_hidden(
        self, target, features: Features, tokens: Int[Array, "rows seq"]
    ) -> Float[Array, "rows seq 1 hidden"]:
        """The early exit of the target's residual stream: at position `i` that of `i + 1`, which predicts `i + 2`."""
        del tokens
        return next_positions(self._model(target).exit(lax.stop_gradient(features.layers[0])))

    def train_logits(self, target, hidden):
        return self.vocabulary.unembed(lax.stop_gradient(target), hidden)

    def provenance(self) -> dict[str, Any]:
        inner_size, hidden_size = self.adapter.up.weight.shape
        return {
            "hidden_size": hidden_size,
            "num_layers": self.num_layers,
            "max_length": self.max_length,
            "inner_size": inner_size,
        }

    def _model(self, target: AbstractLanguageModel) -> EarlyExit:
        assert isinstance(target, Transformer)  # `check` has said so in a sentence
        return EarlyExit(lax.stop_gradient(target.first_layers(self.num_layers)), self.adapter)


def _fresh(
    target: AbstractLanguageModel,
    max_length: int,
    *,
    num_layers: Annotated[int, Field(ge=1)] | None = None,
    inner_size: Annotated[int, Field(ge=1)] | None = None,
    key: PRNGKeyArray,
) -> LayerSkipDraft:
    """**Arguments:**

    - `num_layers`: how many of the target's first layers draft; none: a quarter of them
    - `inner_size`: width of the adapter's hidden layer; none: the target's hidden size
    """
    depth = as_transformer(target, "layer_skip").config.num_layers
    num_layers = max(1, depth // 4) if num_layers is None else num_layers
    return LayerSkipDraft(target.hidden_size, num_layers, max_length, inner_size, key=key)


def _rebuild(settings: dict[str, Any]) -> LayerSkipDraft:
    return LayerSkipDraft(
        settings["hidden_size"],
        settings["num_layers"],
        settings["max_length"],
        settings["inner_size"],
        key=jr.key(0),
    )


DRAFT = DraftKind(LayerSkipDraft, fresh=_fresh, rebuild=_rebuild)
