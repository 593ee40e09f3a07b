"""Any draft, drawn from at temperatures of its own."""

from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..models import AbstractLanguageModel
from ._base import AbstractDraft
from ._kind import DraftWrapper
from ._sampler import AbstractSampler

Inner = TypeVar("Inner", bound=AbstractDraft)
Draft = TypeVar("Draft", bound=AbstractDraft)

# Acceptance is flat around its best temperature: a finer grid than one of 4.4% would only follow noise.
STEPS_PER_DOUBLING = 16
MOST_STEPS = 2 * STEPS_PER_DOUBLING  # temperatures from 1/4 to 4


class TemperedDraft(AbstractDraft[Any], Generic[Inner]):
    """A draft whose logits at each draft position are divided by a temperature, besides the temperature of sampling.

    The distribution that imitates the target best is not the one that is accepted most: the further ahead a draft
    looks, the flatter it becomes. Any distribution is lossless, as long as the tokens are drawn from it, so that the
    temperature can be chosen freely. [`eqx_specgrpo.distill.fit_temperature`][] finds the one with the most acceptance.

    Trained and frozen parts are those of the draft. The temperatures are places on a grid, integers, which no optimizer
    touches; training does not see them.

    **Arguments:**

    - `draft`: any draft that gives its logits to the sampler.
    - `steps`: one integer per draft position; its temperature is `2 ** (steps / 16)`. By default 0, temperature 1.
    """

    draft: Inner
    steps: Int[Array, " draft"]

    def __init__(self, draft: Inner, steps: Int[Array, " draft"] | None = None):
        self.draft = draft
        self.steps = jnp.zeros(draft.max_length, jnp.int32) if steps is None else steps

    def __check_init__(self):
        if self.steps.shape != (self.draft.max_length,):
            raise ValueError(
                f"steps has shape {list(self.steps.shape)}, but the draft looks {self.draft.max_length} positions "
                "ahead: give one for each"
            )

    @property
    def temperature(self) -> Float[Array, " draft"]:
        """The temperature of each draft position."""
        return steps_to_temperature(self.steps)

    @property
    def max_length(self) -> int:
        return self.draft.max_length

    @property
    def train_length(self) -> int:
        return self.draft.train_length

    @property
    def layers(self) -> tuple[int, ...]:
        return self.draft.layers

    def check(self, target: AbstractLanguageModel) -> None:
        self.draft.check(target)

    def init(self, target, features, tokens, lengths, capacity):
        return self.draft.init(target, features, tokens, lengths, capacity)

    def begin(self, target, features, tokens, lengths, capacity, first):
        return self.draft.begin(target, features, tokens, lengths, capacity, first)

    def grow(self, state, capacity):
        return self.draft.grow(state, capacity)

    def propose(self, target, state, last_token, sampler: AbstractSampler, length: int):
        return self.draft.propose(target, state, last_token, TemperedSampler(sampler, self.temperature), length)

    def expected_acceptance(self, target, state, last_token, length):
        return self.draft.expected_acceptance(target, state, last_token, length)

    def commit(self, target, state, features, block, num_accepted):
        return self.draft.commit(target, state, features, block, num_accepted)

    def commit_active(self, target, state, features, block, num_accepted, active):
        return self.draft.commit_active(target, state, features, block, num_accepted, active)

    def train_hidden(self, target, features, tokens):
        return self.draft.train_hidden(target, features, tokens)

    def train_logits(self, target, hidden):
        """Computes the draft's own logits, before they are divided by the temperatures."""
        return self.draft.train_logits(target, hidden)

    def train_confidence(self, hidden):
        return self.draft.train_confidence(hidden)

    def provenance(self) -> dict[str, Any]:
        return {"draft": self.draft.provenance()}


class TemperedSampler(AbstractSampler):
    """A sampler that divides logits by a temperature per draft position, and then uses the sampler inside it.

    **Arguments:**

    - `sampler`: the sampler inside.
    - `temperature`: of each draft position, besides that of the sampler inside.
    """

    sampler: AbstractSampler
    temperature: Float[Array, " draft"]

    def __call__(self, logits, offset, support=None):
        return self.sampler(logits / self.temperature[offset], offset, support)


def steps_to_temperature(steps: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes temperatures from integer steps: `2 ** (steps / 16)`."""
    return 2.0 ** (steps / STEPS_PER_DOUBLING)


def tempered_part(draft: AbstractDraft) -> TemperedDraft | None:
    """Returns the `TemperedDraft` that a draft is or contains; `None` if there is none."""
    found = [part for part in jax.tree.leaves(draft, is_leaf=_is_tempered) if _is_tempered(part)]
    return found[0] if found else None


def with_temperature(draft: Draft, steps: Int[Array, " draft"]) -> Draft:
    """Returns the draft with other temperatures in its `TemperedDraft`."""

    def put(part):
        return eqx.tree_at(lambda tempered: tempered.steps, part, steps) if _is_tempered(part) else part

    return jax.tree.map(put, draft, is_leaf=_is_tempered)


def _is_tempered(part) -> bool:
    return isinstance(part, TemperedDraft)


WRAPPER = DraftWrapper(TemperedDraft, lambda draft: {"draft": draft.draft}, TemperedDraft)
