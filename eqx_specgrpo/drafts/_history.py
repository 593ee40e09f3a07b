"""Drafts that look up what was said before, and what they are told between steps."""

from abc import abstractmethod
from typing import TypeVar

import jax
from jaxtyping import Array, Bool, Int

from .._types import Rollouts
from ..models import AbstractLanguageModel
from ._base import AbstractDraft, Proposal
from ._sampler import AbstractSampler
from ._vocabulary import AbstractDraftVocabulary

State = TypeVar("State")
Draft = TypeVar("Draft", bound=AbstractDraft)


class AbstractHistoryDraft(AbstractDraft[State]):
    """A draft that repeats what followed the same words before: in the row itself, in other rows, in earlier rollouts.

    What it proposes is a point mass, chosen without chance (`Proposal.distribution` is `None`), also where it has the
    very tokens and their old probabilities: the policy has been trained on those tokens since, so they are no draw from
    any distribution that a verifier could be given.
    """

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
    ) -> tuple[Proposal, Bool[Array, " rows"], State]:
        """As `propose`, and which rows have a match; what is proposed for the others is arbitrary.

        **Arguments:**

        - `target`, `state`, `last_token`, `length`: as for `propose`. There is no sampler: whether there is a match
            depends on committed tokens alone.
        """

    @abstractmethod
    def remember(self, rollouts: Rollouts) -> "AbstractHistoryDraft":
        """The draft with these rollouts in its memory. On the host, between decodings; shapes stay as they are."""


def remember(draft: Draft, rollouts: Rollouts) -> Draft:
    """Tells what remembers in a draft of new rollouts, however deep inside it: every history draft, and a reduced
    vocabulary. The rest stays as it is.

    For the training loop, once a step.

    **Arguments:**

    - `draft`: any draft.
    - `rollouts`: of the step; completions of prompts that will be met again are worth most.
    """

    def tell(part):
        return part.remember(rollouts) if isinstance(part, _WITH_MEMORY) else part

    return jax.tree.map(tell, draft, is_leaf=lambda part: isinstance(part, _WITH_MEMORY))


_WITH_MEMORY = (AbstractHistoryDraft, AbstractDraftVocabulary)
