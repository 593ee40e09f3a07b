"""The proofs that a verifier can be put through."""

from collections.abc import Sequence

import equinox as eqx
import numpy as np

from ..decoding import AbstractAcceptanceRule, AbstractVerifier
from ..sampling import GreedySampling
from ._enumerate import enumerate_rounds
from ._errors import require
from ._one_of import verifier_name
from ._rounds import SMALLEST_P_VALUE, draw_rounds, first_difference_from_plain, tables, verdict_p_value
from ._situations import VOCAB, only, situations, softmax, transform


class VerifierReport(eqx.Module):
    """What was found of a verifier that passed; printed, it says so, line by line.

    **Arguments:**

    - `name`: its class.
    - `law_error`: by how much the law of a round's output is off at most, over all cases that were enumerated; `None`
        where a verifier does not state its law.
    - `num_laws`: how many cases were enumerated.
    - `p_value`: the least of the chi-square tests of what `verify` draws, with fixed keys.
    - `draft_invariant`: whether every chain of drafted tokens led to the tokens of plain decoding, exactly.
    - `acceptance`: how often one drafted token is kept, mean over the cases.
    - `optimal_acceptance`: the most that any lossless rule could reach there, `1 - TV`.
    """

    name: str
    law_error: float | None
    num_laws: int
    p_value: float
    draft_invariant: bool
    acceptance: float
    optimal_acceptance: float

    def __repr__(self) -> str:
        law = "not stated" if self.law_error is None else f"worst error {self.law_error:.1e} of {self.num_laws} cases"
        return "\n".join(
            [
                f"{self.name} passed every check: it keeps the target's distribution.",
                f"  its law, enumerated: {law}",
                f"  statistics of what it draws: least p-value {self.p_value:.3f}",
                f"  tokens are plain decoding's, whatever was drafted: {'yes' if self.draft_invariant else 'no'}",
                f"  one drafted token is kept with probability {self.acceptance:.3f}, of at most "
                f"{self.optimal_acceptance:.3f} for any rule",
            ]
        )


def check_verifier(
    verifier: AbstractVerifier,
    *,
    greedy_only: bool = False,
    draft_invariant: bool | None = None,
    lengths: Sequence[int] = (1, 2, 3),
    tolerance: float = 1e-6,
) -> VerifierReport:
    """Proves, as far as a machine can, that a verifier keeps the target's distribution.

    A rule that states its law ([`eqx_specgrpo.decoding.AbstractAcceptanceRule`][]) is enumerated: all chains, all
    numbers of kept tokens, all next tokens, for targets and drafts that are diffuse, sharp, truncated, greedy, equal,
    nearly equal or of disjoint supports, for point masses, and for a draft of a reduced vocabulary. Any other verifier
    is judged by what it draws: rounds with its own sampler on chains of tokens whose law is known, with fixed keys.

    **Arguments:**

    - `verifier`: the verifier.
    - `greedy_only`: it is meant for `GreedySampling` alone, as `GreedyMatch` is.
    - `draft_invariant`: `True` demands that the tokens be those of plain decoding whatever was drafted, as `Coupled`'s
        are; `None` finds out.
    - `lengths`: of the chains, among 1, 2 and 3.
    - `tolerance`: for enumerated laws.

    **Returns:**

    The worst that was found.

    **Raises:**

    `ConformanceError`, naming the case, if the verifier fails.
    """
    name = verifier_name(verifier)
    for length in lengths:
        if length not in VOCAB:
            raise ValueError(
                f"lengths are among {sorted(VOCAB)}, not {length}: longer chains take too long to enumerate"
            )
    law_error, num_laws, acceptances, p_values = None, 0, [], []
    if isinstance(verifier, AbstractAcceptanceRule):
        for length in lengths:
            error, laws, acceptance = _check_law(verifier, name, length, greedy_only, tolerance)
            law_error, num_laws = max(error, law_error or 0.0), num_laws + laws
            acceptances.extend(acceptance)
        p_values.append(verdict_p_value(verifier))
        require(
            p_values[-1] > SMALLEST_P_VALUE,
            f"{name}: verify() does not draw what survival() and next_weights() say (p = {p_values[-1]:.1e})",
        )

    cases = tables(greedy_only)
    difference = first_difference_from_plain(verifier, cases, max(lengths), keys=16)
    require(not (draft_invariant and difference), f"{name} was said to be draft-invariant, but is not. {difference}")
    if greedy_only:
        cases = eqx.tree_at(lambda c: c.draft, cases, transform([cases.draft], GreedySampling())[0])
    for length in sorted({min(lengths), max(lengths)}):
        drawn = draw_rounds(verifier, cases, length)
        p_values.append(float(drawn.p_values.min()))
        require(
            p_values[-1] > SMALLEST_P_VALUE,
            f"{name}, {cases.names[int(drawn.p_values.argmin())]}, {length} drafted a round: the tokens do not have "
            f"the target's law (p = {p_values[-1]:.1e})",
        )
        if not isinstance(verifier, AbstractAcceptanceRule) or 1 not in lengths:
            acceptances.extend(zip(drawn.acceptance, drawn.optimal, strict=True))
    accepted, optimal = np.mean(acceptances, axis=0)
    return VerifierReport(name, law_error, num_laws, min(p_values), difference is None, float(accepted), float(optimal))


def _check_law(
    rule: AbstractAcceptanceRule, name: str, length: int, greedy_only: bool, tolerance: float
) -> tuple[float, int, list[tuple[float, float]]]:
    """The largest error, the number of cases, and acceptances beside the best possible where one token is drafted."""
    cases = situations(length)
    target, draft = cases.target, cases.draft
    if greedy_only:
        target = transform(target, GreedySampling())
    # A draft that knows all tokens but the first, in an order of its own.
    support = np.roll(np.arange(1, VOCAB[length], dtype=np.int32), 1)
    reduced = only(draft, support.tolist())
    # Where truncation has left it nothing to draft, there is no such draft.
    something = [np.isfinite(logits).any(-1).reshape(len(logits), -1).all(1) for logits in reduced]
    proper = np.flatnonzero(np.all(something, axis=0))
    outcomes = [
        enumerate_rounds(rule, target, draft, length, cases.names),
        enumerate_rounds(rule, target, None, length, cases.names),
    ]
    if length <= 2:  # all that a support changes is where a probability is looked up
        names = tuple(f"{cases.names[index]} of a reduced vocabulary" for index in proper)
        few, its_draft = ([logits[proper] for logits in tree] for tree in (target, reduced))
        outcomes.append(enumerate_rounds(rule, few, its_draft, length, names, support))
    for outcome in outcomes:
        worst = int(outcome.errors.argmax())
        require(
            bool(outcome.errors[worst] < tolerance),
            f"{name}, {outcome.names[worst]}, {length} drafted: the law of the output is off by "
            f"{outcome.errors[worst]:.1e} (allowed are {tolerance:.0e})",
        )
    acceptance = []
    if length == 1:
        p, q = softmax(target[0]), softmax(draft[0])
        optimal = np.minimum(p, q).sum(-1)
        excess = outcomes[0].accepted - optimal
        require(
            bool(excess.max() < tolerance),
            f"{name}, {cases.names[int(excess.argmax())]}: keeps the token more often than any lossless rule can",
        )
        acceptance = list(zip(outcomes[0].accepted.tolist(), optimal.tolist(), strict=True))
    return (
        max(float(outcome.errors.max()) for outcome in outcomes),
        sum(map(len, (o.names for o in outcomes))),
        acceptance,
    )
