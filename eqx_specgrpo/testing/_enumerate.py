"""The law of one round's output, by enumeration of everything that can happen in it.

A chain is drafted, some of it is kept, one more token is drawn. All chains, all numbers of kept tokens and all next
tokens are gone through with their probabilities, and where the round emitted less than the horizon, the target's own
law continues. If the joint law of the tokens up to the horizon is the target's, a round is lossless; and so is
decoding, by induction, since a round starts from what is committed and nothing else.
"""

import itertools as it

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..decoding import AbstractAcceptanceRule
from ..drafts import Proposal
from ..sampling import Categorical
from ._errors import require
from ._situations import Tree, joint_law, softmax

_ROUNDING = 1e-6


class Outcome(eqx.Module):
    """What a rule does in a batch of cases.

    **Arguments:**

    - `law`: of the first `length + 1` tokens, `[cases, vocab, ..., vocab]`.
    - `expected`: the target's.
    - `accepted`: expected number of drafted tokens kept, `[cases]`.
    - `names`: of the cases.
    """

    law: np.ndarray
    expected: np.ndarray
    accepted: np.ndarray
    names: tuple[str, ...]

    @property
    def errors(self) -> np.ndarray:
        """Largest difference between the two laws, `[cases]`."""
        return np.abs(self.law - self.expected).reshape(len(self.names), -1).max(1)


@eqx.filter_jit
def _enumerate(rule, target_logits, draft_logits, support, chains):
    """For all cases and chains: survival, and the next token's weights after every number of accepted tokens.

    The logits are those along a chain; `draft_logits` is `None` for point masses.
    """
    length = chains.shape[-1]

    def one(target_logits, draft_logits, chain):
        draft = None
        if draft_logits is not None:
            draft = Categorical.from_logits(draft_logits)
            if support is not None:
                ids = jnp.broadcast_to(support, draft_logits.shape)
                draft = Categorical(draft.logits, draft.log_normalizer, ids)
        target, proposal = Categorical.from_logits(target_logits), Proposal(chain, draft)
        next_weights = jax.vmap(lambda num: rule.next_weights(target, proposal, num))(jnp.arange(length + 1))
        return rule.survival(target, proposal), next_weights

    return jax.vmap(jax.vmap(one), in_axes=(0, 0, None))(target_logits, draft_logits, chains)


def _along(tree: Tree, chains: np.ndarray, depth: int) -> np.ndarray:
    """The distributions that are met along each chain, `[cases, chains, depth, vocab]`."""
    root = np.repeat(tree[0][:, None], len(chains), axis=1)
    return np.stack([root, *(tree[d][(slice(None), *chains[:, :d].T)] for d in range(1, depth))], axis=2)


def enumerate_rounds(
    rule: AbstractAcceptanceRule,
    target: Tree,
    draft: Tree | None,
    length: int,
    names: tuple[str, ...],
    support: np.ndarray | None = None,
) -> Outcome:
    """All that can happen when `length` tokens are drafted.

    **Arguments:**

    - `draft`: `None` for point masses: each chain is then a draft of its own, and a case of its own.
    - `support`: the draft's reduced vocabulary; its other tokens have no probability in `draft`.

    **Raises:**

    `ConformanceError` if survival increases or is no probability, or if a next token could not be drawn.
    """
    cases, vocab = target[0].shape
    chains = np.array(list(it.product(range(vocab), repeat=length)), np.int32)
    target_logits = _along(target, chains, length + 1)
    draft_logits = None if draft is None else _along(draft, chains, length)
    if draft_logits is not None and support is not None:
        draft_logits = draft_logits[..., support]
    survival, weights = _enumerate(rule, target_logits, draft_logits, support, chains)
    survival, weights = np.asarray(survival, np.float64), np.asarray(weights, np.float64)

    chain_probs = np.ones((cases, len(chains))) if draft is None else joint_law(draft, length).reshape(cases, -1)
    law = np.zeros((cases, len(chains), *[vocab] * (length + 1)))
    accepted = np.zeros((cases, len(chains)))
    for case, index in it.product(range(cases), range(len(chains))):
        if chain_probs[case, index] == 0:
            continue  # never drafted: what a rule makes of it does not matter
        chain = tuple(int(token) for token in chains[index])
        where = f"{names[case]}, {length} drafted: {chain}"
        _check_survival(survival[case, index], where)
        at_least = np.concatenate([[1.0], survival[case, index], [0.0]])
        for num in range(length + 1):
            _check_weights(weights[case, index, num], f"{where}, {num} of them kept")
            prob = chain_probs[case, index] * (at_least[num] - at_least[num + 1])
            if prob <= 0:
                continue
            emitted = prob * weights[case, index, num] / weights[case, index, num].sum()
            for logits in target[num + 1 :]:
                emitted = emitted[..., None] * softmax(logits[(case, *chain[:num])])
            law[(case, index, *chain[:num])] += emitted
            accepted[case, index] += num * prob
    expected = joint_law(target, length + 1)
    if draft is None:
        names = tuple(f"{name}, the point masses {tuple(chain.tolist())}" for name in names for chain in chains)
        expected = np.repeat(expected, len(chains), axis=0)
        return Outcome(law.reshape(-1, *law.shape[2:]), expected, accepted.reshape(-1), names)
    return Outcome(law.sum(1), expected, accepted.sum(1), names)


def _check_survival(survival: np.ndarray, where: str) -> None:
    require(
        bool(np.all((survival > -_ROUNDING) & (survival < 1 + _ROUNDING))),
        f"{where}: survival {survival.tolist()} is no list of probabilities",
    )
    require(
        bool(np.all(np.diff(survival) < _ROUNDING)),
        f"{where}: survival {survival.tolist()} increases, but more tokens can't be kept more often than fewer",
    )


def _check_weights(weights: np.ndarray, where: str) -> None:
    """Also where this verdict has no probability: after rounding it may have some."""
    require(
        bool(np.all(np.isfinite(weights)) and np.all(weights >= 0) and weights.sum() > 0),
        f"{where}: no next token can be drawn from the weights {weights.tolist()}; where the residual is zero "
        "everywhere, fall back to the target",
    )
