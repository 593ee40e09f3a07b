"""Sequentially dependent heads (Ankner et al. 2024, Hydra)."""

from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray
from pydantic import Field

from ..models import AbstractLanguageModel, Features, Linear, rms_normalize
from ._base import AbstractDraft, Proposal, check_heads, pick_positions
from ._kind import DraftKind
from ._sampler import AbstractSampler
from ._vocabulary import AbstractDraftVocabulary, FullVocabulary

HydraState = Float[Array, "rows hidden"]


class HydraHead(eqx.Module):
    """One step from what is known to what follows it: `h + down(silu(up([h, embedding of the newest token])))`.

    Both inputs are brought to unit root mean square: embeddings are often a hundred times smaller than hidden states.
    """

    up: Linear
    down: Linear

    def __init__(self, hidden_size: int, inner_size: int, *, key: PRNGKeyArray):
        up_key, down_key = jr.split(key)
        self.up = Linear(2 * hidden_size, inner_size, use_bias=True, key=up_key)
        down = Linear(inner_size, hidden_size, use_bias=True, key=down_key)
        self.down = eqx.tree_at(lambda linear: linear.weight, down, jnp.zeros((hidden_size, inner_size)))

    def __call__(
        self, hidden: Float[Array, "*batch hidden"], embedding: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch hidden"]:
        inputs = jnp.concatenate([rms_normalize(hidden), rms_normalize(embedding)], axis=-1)
        return hidden + self.down(jax.nn.silu(self.up(inputs)))


class HydraHeads(AbstractDraft[HydraState]):
    """Medusa's heads in a chain: each sees the hidden state of the head before it and the token drafted there.

    Head `k` turns the hidden state of head `k - 1` (the target's, for the first) and the embedding of the newest token
    (the last committed one, for the first) into a hidden state, which the target's own unembedding turns into logits.
    There is no draft cache: the hidden state is all that is carried. A fresh head adds zero, so that it repeats the
    prediction before it.

    At high entropy knowing the token that was drawn matters far more than anything else about a head.

    Trained: the heads. Frozen, and not part of the module: the target's embedding and unembedding.

    **Arguments:**

    - `hidden_size`: the target's.
    - `num_heads`: the most tokens drafted.
    - `inner_size`: width of each head's hidden layer; the target's hidden size if `None`.
    - `vocabulary`: the tokens that it can say; see [`eqx_specgrpo.drafts.ReducedVocabulary`][].
    - `key`: for the first layers' weights.
    """

    heads: tuple[HydraHead, ...]
    vocabulary: AbstractDraftVocabulary
    layers: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        inner_size: int | None = None,
        vocabulary: AbstractDraftVocabulary | None = None,
        *,
        key: PRNGKeyArray,
    ):
        inner_size = hidden_size if inner_size is None else inner_size
        self.heads = tuple(HydraHead(hidden_size, inner_size, key=k) for k in jr.split(key, num_heads))
        self.vocabulary = FullVocabulary() if vocabulary is None else vocabulary
        self.layers = ()

    @property
    def max_length(self) -> int:
        return len(self.heads)

    @property
    def train_length(self) -> int:
        return self.max_length

    def check(self, target: AbstractLanguageModel) -> None:
        check_heads("Hydra", self.heads[0].down.weight.shape[0], target)
        self.vocabulary.check(target)

    def init(self, target, features, tokens, lengths, capacity) -> HydraState:
        del target, tokens, capacity
        return pick_positions(features.last, lengths - 1)

    @jax.named_scope("HydraHeads.propose")
    def propose(self, target, state: HydraState, last_token, sampler: AbstractSampler, length: int):
        hidden, token, steps = state, last_token, []
        for offset, head in enumerate(self.heads[:length]):
            hidden = head(hidden, target.embed(token))
            logits = self.vocabulary.unembed(target, hidden)
            token, distribution = sampler(logits, offset, self.vocabulary.support)
            steps.append((token, distribution))
        return Proposal.stack(steps), state

    def commit(self, target, state: HydraState, features, block, num_accepted) -> HydraState:
        del target, state, block
        return pick_positions(features.last, num_accepted)

    def train_hidden(self, target, features: Features, tokens):
        hidden, outputs = features.last, []
        for offset, head in enumerate(self.heads):
            # At position i the features predict token i + 1; that token is what the first head is told.
            newest = jnp.roll(tokens, -(1 + offset), axis=1)
            hidden = head(hidden, target.embed(newest))
            outputs.append(hidden)
        return jnp.stack(outputs, axis=2)

    def train_logits(self, target, hidden):
        return self.vocabulary.unembed(target, hidden)

    def provenance(self) -> dict[str, Any]:
        inner_size, doubled = self.heads[0].up.weight.shape
        return {"hidden_size": doubled // 2, "num_heads": len(self.heads), "inner_size": inner_size}


def _fresh(
    target: AbstractLanguageModel,
    max_length: int,
    *,
    inner_size: Annotated[int, Field(ge=1)] | None = None,
    key: PRNGKeyArray,
) -> HydraHeads:
    """**Arguments:**

    - `inner_size`: width of each head's hidden layer; none: the target's hidden size
    """
    return HydraHeads(target.hidden_size, max_length, inner_size, key=key)


def _rebuild(settings: dict[str, Any]) -> HydraHeads:
    return HydraHeads(settings["hidden_size"], settings["num_heads"], settings["inner_size"], key=jr.key(0))


DRAFT = DraftKind(HydraHeads, fresh=_fresh, rebuild=_rebuild, needs_learning=True)
