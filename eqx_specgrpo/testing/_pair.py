"""A draft and a target side by side, with rows to try them on."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._types import Prompts
from ..drafts import AbstractDraft
from ..models import AbstractLanguageModel


class Pair(eqx.Module):
    """What is checked, and on what.

    **Arguments:**

    - `draft`, `target`: the pair.
    - `prompts`: of unequal lengths.
    """

    draft: AbstractDraft
    target: AbstractLanguageModel
    prompts: Prompts

    @property
    def name(self) -> str:
        return type(self.draft).__name__

    @property
    def rows(self) -> int:
        return len(self.prompts.lengths)


def make_pair(draft: AbstractDraft, target: AbstractLanguageModel, prompts: Sequence[Sequence[int]] | None) -> Pair:
    """With random prompts where none are given: unequal ones that repeat themselves, so that lookups find something."""
    if prompts is None:
        rng = np.random.default_rng(0)
        prompts = [
            np.resize(rng.integers(0, target.vocab_size, 2 + row), length).tolist()
            for row, length in enumerate((7, 2, 10, 5))
        ]
    if len({len(prompt) for prompt in prompts}) < min(len(prompts), 2):
        raise ValueError("all prompts are of one length: give some of other lengths, for that is where drafts fail")
    return Pair(draft, target, Prompts.from_lists(prompts))


def perturbed(draft: AbstractDraft, scale: float, seed: int = 0) -> AbstractDraft:
    """The draft with a little noise on every weight: a fresh one often holds zeros that hide what comes after them."""
    weights, rest = eqx.partition(draft, eqx.is_inexact_array)
    rng = np.random.default_rng(seed)
    return eqx.combine(
        jax.tree.map(lambda x: x + jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype), weights), rest
    )
