from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ..models import AbstractLanguageModel
from ._base import AbstractDraft, Proposal
from ._kind import DraftKind


class NoDraft(AbstractDraft[tuple[()]]):
    """The draft that guesses nothing: plain decoding, one token per target pass. It is the reference for other
    drafts."""

    max_length: int = eqx.field(static=True, default=0)
    train_length: int = eqx.field(static=True, default=0)
    layers: tuple[int, ...] = eqx.field(static=True, default=())

    def check(self, target) -> None:
        del target

    def init(self, target, features, tokens, lengths, capacity) -> tuple[()]:
        del target, features, tokens, lengths, capacity
        return ()

    def propose(self, target, state, last_token, sampler, length):
        del target, sampler, length
        return Proposal(jnp.zeros((last_token.shape[0], 0), last_token.dtype), None), state

    def commit(self, target, state, features, block, num_accepted) -> tuple[()]:
        del target, features, block, num_accepted
        return state

    def train_hidden(self, target, features, tokens):
        del target, tokens
        return jnp.zeros((*features.last.shape[:-1], 0, features.last.shape[-1]))

    def train_logits(self, target, hidden):
        return target.unembed(hidden)

    def provenance(self) -> dict[str, Any]:
        return {}


def _fresh(target: AbstractLanguageModel, max_length: int, *, key: PRNGKeyArray) -> NoDraft:
    del target, max_length, key
    return NoDraft()


def _rebuild(settings: dict[str, Any]) -> NoDraft:
    del settings
    return NoDraft()


DRAFT = DraftKind(NoDraft, fresh=_fresh, rebuild=_rebuild, has_probabilities=False)
