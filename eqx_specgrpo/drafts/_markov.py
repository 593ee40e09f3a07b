"""Heads that guess in parallel, and a low-rank term that tells each the token drafted before it."""

from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray
from pydantic import Field

from ..models import AbstractLanguageModel, Features, Linear, matmul, rms_normalize
from ._base import AbstractDraft, Proposal, check_heads, pick_positions
from ._confidence import AbstractConfidence, ConfidenceHead, NoConfidence
from ._kind import DraftKind
from ._sampler import AbstractSampler
from ._vocabulary import AbstractDraftVocabulary, FullVocabulary

MarkovState = Float[Array, "rows hidden"]


class MarkovHeads(AbstractDraft[MarkovState]):
    """Medusa's heads, told the last committed token, whose logits gain a low-rank function of the token before.

    All heads are one product, and so is their unembedding: `hidden_k = h + silu(W_k [h, e] + b_k)`, with `h` the
    target's hidden state and `e` the embedding of the last committed token, which the target has not been fed yet. What
    is drawn in turn is cheap: `z_k = silu(D e_k + C hidden_k + b)` has `rank` numbers, with `e_k` the embedding of the
    token before, and adds `z_k B` to the logits. `B` is the unembedding of `rank` learned directions, which a loop of
    rounds computes once. So a head knows what Hydra's knows, and a round costs about what Medusa's does.

    A fresh head adds zero: it repeats the target's own prediction. Embeddings are brought to unit root mean square.

    With `confidence`, `hidden_k` also says how likely the guess of each head is to be accepted. That is known before
    any of them is drawn, so that a [`eqx_specgrpo.drafts.FallbackDraft`][] may choose by it.

    Trained: all of it. Frozen, and not part of the module: the target's embedding and unembedding.

    ??? cite

        DSpark, [arXiv:2607.05147](https://arxiv.org/abs/2607.05147), for the low-rank term beside a parallel draft.
        There it depends on the token alone (`C` is zero), and the draft is a block of attention.

    **Arguments:**

    - `hidden_size`: the target's.
    - `num_heads`: the most tokens drafted.
    - `rank`: of the term.
    - `vocabulary`: the tokens that it can say; see [`eqx_specgrpo.drafts.ReducedVocabulary`][].
    - `confidence`: whether it says how likely its guesses are to be accepted.
    - `key`: for `D`.
    """

    weight: Float[Array, "draft hidden doubled"]
    bias: Float[Array, "draft hidden"]
    token: Linear
    context: Float[Array, "rank hidden"]
    directions: Float[Array, "rank hidden"]
    vocabulary: AbstractDraftVocabulary
    confidence: AbstractConfidence
    layers: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        rank: int = 64,
        vocabulary: AbstractDraftVocabulary | None = None,
        *,
        confidence: bool = False,
        key: PRNGKeyArray,
    ):
        self.weight = jnp.zeros((num_heads, hidden_size, 2 * hidden_size))
        self.bias = jnp.zeros((num_heads, hidden_size))
        self.token = Linear(hidden_size, rank, use_bias=True, key=key)
        self.context = jnp.zeros((rank, hidden_size))
        self.directions = jnp.zeros((rank, hidden_size))
        self.vocabulary = FullVocabulary() if vocabulary is None else vocabulary
        self.confidence = ConfidenceHead(num_heads, hidden_size) if confidence else NoConfidence()
        self.layers = ()

    @property
    def max_length(self) -> int:
        return self.weight.shape[0]

    @property
    def train_length(self) -> int:
        return self.max_length

    def check(self, target: AbstractLanguageModel) -> None:
        check_heads("Markov", self.bias.shape[-1], target)
        self.vocabulary.check(target)

    def init(self, target, features, tokens, lengths, capacity) -> MarkovState:
        del target, tokens, capacity
        return pick_positions(features.last, lengths - 1)

    @jax.named_scope("MarkovHeads.propose")
    def propose(self, target, state: MarkovState, last_token, sampler: AbstractSampler, length: int):
        hidden = self._heads(target, state, last_token, length)
        logits, context = self.vocabulary.unembed(target, hidden), matmul(hidden, self.context)
        basis = self._basis(target)
        token, steps = last_token, []
        for offset in range(length):
            gain = self._term(target, token, context[:, offset]) @ basis
            steps.append(sampler(logits[:, offset] + gain, offset, self.vocabulary.support))
            token = steps[-1][0]
        return Proposal.stack(steps), state

    def expected_acceptance(self, target, state: MarkovState, last_token, length: int):
        logits = self.confidence(self._heads(target, state, last_token, length))
        return None if logits is None else jax.nn.sigmoid(logits)

    def commit(self, target, state: MarkovState, features, block, num_accepted) -> MarkovState:
        del target, state, block
        return pick_positions(features.last, num_accepted)

    def train_hidden(self, target, features: Features, tokens):
        # At position i the features predict token i + 1; that token is the last committed one where they are used.
        hidden = self._heads(target, features.last, jnp.roll(tokens, -1, axis=1), self.max_length)
        context = matmul(hidden, self.context)
        terms = [
            self._term(target, jnp.roll(tokens, -(1 + offset), axis=1), context[:, :, offset])
            for offset in range(self.max_length)
        ]
        return jnp.concatenate([hidden, jnp.stack(terms, axis=2)], axis=-1)

    def train_logits(self, target, hidden):
        size = self.bias.shape[-1]
        return self.vocabulary.unembed(target, hidden[..., :size]) + hidden[..., size:] @ self._basis(target)

    def train_confidence(self, hidden):
        return self.confidence(hidden[..., : self.bias.shape[-1]])

    def provenance(self) -> dict[str, Any]:
        num_heads, hidden_size = self.bias.shape
        settings = {"hidden_size": hidden_size, "num_heads": num_heads, "rank": self.directions.shape[0]}
        return settings | {"confidence": isinstance(self.confidence, ConfidenceHead)}

    def _heads(
        self,
        target: AbstractLanguageModel,
        hidden: Float[Array, "*batch hidden"],
        last_token: Int[Array, "*batch"],
        length: int,
    ) -> Float[Array, "*batch draft hidden"]:
        size = hidden.shape[-1]
        inputs = jnp.concatenate([hidden, rms_normalize(target.embed(last_token))], axis=-1)
        flat = matmul(inputs, self.weight[:length].reshape(length * size, 2 * size))
        per_head = flat.reshape(*hidden.shape[:-1], length, size)
        return hidden[..., None, :] + jax.nn.silu(per_head + jnp.broadcast_to(self.bias[:length], per_head.shape))

    def _term(
        self, target: AbstractLanguageModel, before: Int[Array, "*batch"], context: Float[Array, "*batch rank"]
    ) -> Float[Array, "*batch rank"]:
        """The numbers that the token before, and what the head knows besides, amount to."""
        return jax.nn.silu(self.token(rms_normalize(target.embed(before))) + context)

    def _basis(self, target: AbstractLanguageModel) -> Float[Array, "rank vocab_or_size"]:
        """What each of the numbers adds to the logits."""
        return self.vocabulary.unembed(target, self.directions.astype(jnp.float32))


def _fresh(
    target: AbstractLanguageModel,
    max_length: int,
    *,
    rank: Annotated[int, Field(ge=1)] = 64,
    confidence: bool = False,
    key: PRNGKeyArray,
) -> MarkovHeads:
    """**Arguments:**

    - `rank`: numbers that a drafted token is told to the next head in
    - `confidence`: say how likely guesses are to be accepted; a lookup in front of the heads is chosen by it
    """
    return MarkovHeads(target.hidden_size, max_length, rank, confidence=confidence, key=key)


def _rebuild(settings: dict[str, Any]) -> MarkovHeads:
    # Drafts that were saved before there was a confidence do not name it.
    confidence = settings.get("confidence", False)
    return MarkovHeads(
        settings["hidden_size"], settings["num_heads"], settings["rank"], confidence=confidence, key=jr.key(0)
    )


DRAFT = DraftKind(MarkovHeads, fresh=_fresh, rebuild=_rebuild, needs_learning=True)
