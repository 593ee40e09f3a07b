"""Medusa heads (Cai et al. 2024, section 2.1)."""

from typing import Any

import jax
import jax.numpy as jnp
from equinox import field
from jaxtyping import Array, Float, PRNGKeyArray

from ..models import AbstractLanguageModel, Features, matmul
from ._base import AbstractDraft, Proposal, check_heads, pick_positions
from ._kind import DraftKind
from ._sampler import AbstractSampler
from ._vocabulary import AbstractDraftVocabulary, FullVocabulary

MedusaState = Float[Array, "rows hidden"]


class MedusaHeads(AbstractDraft[MedusaState]):
    """Head `k` predicts the token `k + 1` places after the one that the target itself predicts, from the same features.

    Each head is one residual block, `h + silu(W h + b)`, and all share the target's own unembedding in one product.
    With `W` and `b` zero a fresh head gives exactly the base head's prediction. The heads do not see each other's
    tokens, so the draft is the product of their distributions, exactly known.

    Trained: `weight` and `bias`. Frozen, and not part of the module: the target's unembedding.

    **Arguments:**

    - `weight`: `[draft, hidden, hidden]`.
    - `bias`: `[draft, hidden]`.
    - `vocabulary`: the tokens that it can say; see [`eqx_specgrpo.drafts.ReducedVocabulary`][].
    """

    weight: Float[Array, "draft hidden hidden"]
    bias: Float[Array, "draft hidden"]
    vocabulary: AbstractDraftVocabulary
    layers: tuple[int, ...] = field(static=True)

    def __init__(
        self,
        weight: Float[Array, "draft hidden hidden"],
        bias: Float[Array, "draft hidden"],
        vocabulary: AbstractDraftVocabulary | None = None,
    ):
        self.weight = weight
        self.bias = bias
        self.vocabulary = FullVocabulary() if vocabulary is None else vocabulary
        self.layers = ()

    @staticmethod
    def fresh(hidden_size: int, num_heads: int, vocabulary: AbstractDraftVocabulary | None = None) -> "MedusaHeads":
        """Heads that repeat the base head's prediction."""
        shape = (num_heads, hidden_size)
        return MedusaHeads(jnp.zeros((*shape, hidden_size)), jnp.zeros(shape), vocabulary)

    @property
    def max_length(self) -> int:
        return self.weight.shape[0]

    @property
    def train_length(self) -> int:
        return self.max_length

    def check(self, target: AbstractLanguageModel) -> None:
        check_heads("Medusa", self.weight.shape[-1], target)
        self.vocabulary.check(target)

    def init(self, target, features, tokens, lengths, capacity) -> MedusaState:
        del target, tokens, capacity
        return pick_positions(features.last, lengths - 1)

    @jax.named_scope("MedusaHeads.propose")
    def propose(self, target, state: MedusaState, last_token, sampler: AbstractSampler, length: int):
        del last_token  # newer than the features; these heads guess from the features alone
        logits = self.vocabulary.unembed(target, self._heads(state, length))
        return Proposal(*sampler.chain(logits, self.vocabulary.support)), state

    def commit(self, target, state: MedusaState, features, block, num_accepted) -> MedusaState:
        del target, state, block
        return pick_positions(features.last, num_accepted)

    def train_hidden(self, target, features: Features, tokens):
        del target, tokens
        return self._heads(features.last, self.max_length)

    def train_logits(self, target, hidden):
        return self.vocabulary.unembed(target, hidden)

    def provenance(self) -> dict[str, Any]:
        return {"hidden_size": self.weight.shape[-1], "num_heads": self.weight.shape[0]}

    def _heads(self, hidden: Float[Array, "*batch hidden"], length: int) -> Float[Array, "*batch draft hidden"]:
        size = hidden.shape[-1]
        flat = matmul(hidden, self.weight[:length].reshape(length * size, size))
        per_head = flat.reshape(*hidden.shape[:-1], length, size)
        return hidden[..., None, :] + jax.nn.silu(per_head + jnp.broadcast_to(self.bias[:length], per_head.shape))


def _fresh(target: AbstractLanguageModel, max_length: int, *, key: PRNGKeyArray) -> MedusaHeads:
    del key  # fresh heads are zero
    return MedusaHeads.fresh(target.hidden_size, max_length)


def _rebuild(settings: dict[str, Any]) -> MedusaHeads:
    return MedusaHeads.fresh(settings["hidden_size"], settings["num_heads"])


DRAFT = DraftKind(MedusaHeads, fresh=_fresh, rebuild=_rebuild, needs_learning=True)
