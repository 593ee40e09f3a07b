"""Drafts that look up what was said before, and what they are told between steps."""

from abc import abstractmethod
from typing import TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, Int

from .._types import Rollouts
from ..models import AbstractLanguageModel
from ._base import AbstractDraft, Proposal
from ._sampler import AbstractSampler
from ._vocabulary import AbstractDraftVocabulary

State = TypeVar("State")
Draft = TypeVar("Draft", bound=AbstractDraft)


class AbstractHistoryDraft(AbstractDraft[State]):
    """A draft that repeats what followed the same tokens before: in the row itself, in other rows, in earlier rollouts.

    Its proposals are point masses: they are chosen without chance, and `Proposal.distribution` is `None`. This also
    holds where it remembers tokens with their old probabilities. The policy has been trained on those tokens since, so
    they are not a draw from any distribution that a verifier could be given.

    Subclasses have, besides what `AbstractDraft` has:

    - `match_classes`: number of classes of match that are told apart, for instance by how long they are. For each of
        them a `FallbackDraft` keeps count of what was accepted.
    """

    match_classes: eqx.AbstractVar[int]

    def propose(
        self,
        target: AbstractLanguageModel,
        state: State,
        last_token: Int[Array, " rows"],
        sampler: AbstractSampler,
        length: int,
    ) -> tuple[Proposal, State]:
        del sampler
        proposal, _, state = self.propose_matches(target, state, last_token, length)
        return proposal, state

    @abstractmethod
    def propose_matches(
        self,
        target: AbstractLanguageModel,
        state: State,
        last_token: Int[Array, " rows"],
        length: int,
    ) -> tuple[Proposal, Int[Array, " rows"], State]:
        """Proposes as `propose` does, and says of which class each row's match is: from 1 to `match_classes`, and 0
        where there is none. The proposal of a row without a match is arbitrary.

        **Arguments:**

        - `target`, `state`, `last_token`, `length`: as for `propose`. There is no sampler: whether there is a match
            depends on committed tokens alone.
        """

    @abstractmethod
    def remember(self, rollouts: Rollouts) -> "AbstractHistoryDraft":
        """Returns the draft with these rollouts in its memory. It runs on the host, between decodings. Shapes do not
        change."""


def remember(draft: Draft, rollouts: Rollouts) -> Draft:
    """Hands new rollouts to every part of a draft that remembers rollouts: history drafts and a reduced vocabulary,
    also inside other drafts. Other parts do not change.

    The training loop calls it once per step.

    **Arguments:**

    - `draft`: any draft.
    - `rollouts`: of the step. Completions of prompts that come again are the most useful.
    """

    def tell(part):
        return part.remember(rollouts) if isinstance(part, _WITH_MEMORY) else part

    return jax.tree.map(tell, draft, is_leaf=lambda part: isinstance(part, _WITH_MEMORY))


_WITH_MEMORY = (AbstractHistoryDraft, AbstractDraftVocabulary)
