"""What a verifier draws, round after round, on chains of tokens whose law is a small table."""

import itertools as it

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from ..decoding import AbstractVerifier
from ..drafts import Proposal
from ..sampling import Categorical, GreedySampling, Sampling
from ._errors import require
from ._situations import only, softmax, transform
from ._statistics import chi_square_p_value, law_p_value

_VOCAB, _HORIZON, _DRAWS, _START = 4, 3, 1024, 7

# A verifier's least p-value over a few dozen tests with fixed keys.
SMALLEST_P_VALUE = 1e-5


class Tables(eqx.Module):
    """Logits of a token given the one before: first-order chains, `[cases, vocab, vocab]`."""

    names: tuple[str, ...]
    target: np.ndarray
    draft: np.ndarray


def tables(greedy: bool) -> Tables:
    """The cases: as for enumeration, though fewer."""
    rng = np.random.default_rng(0)

    def table(scale: float) -> np.ndarray:
        return scale * rng.standard_normal((1, _VOCAB, _VOCAB)).astype(np.float32)

    def top_k(x):
        return transform([x], Sampling(1.0, top_k=2))[0]

    diffuse, sharp = table(0.8), table(4.0)
    pairs = {
        "diffuse target, diffuse draft": (diffuse, table(0.8)),
        "sharp target, diffuse draft": (sharp, diffuse),
        "diffuse target, sharp draft": (diffuse, sharp),
        "top-k target, whole draft": (top_k(diffuse), table(1.0)),
        "whole target, top-k draft": (table(1.0), top_k(table(1.0))),
        "equal target and draft": (diffuse, diffuse),
        "equal target and draft, with zeros": (top_k(diffuse), top_k(diffuse)),
        "disjoint supports": (only([diffuse], [0, 1])[0], only([table(1.0)], [2, 3])[0]),
    }
    target, draft = (np.concatenate(x) for x in zip(*pairs.values(), strict=True))
    if greedy:
        target = transform([target], GreedySampling())[0]
    return Tables(tuple(pairs), target, draft)


@eqx.filter_jit
def _round(verifier, target_table, draft_table, cases, last, keys, positions, length):
    """One round for every row, drafted with the verifier's own sampler: verdicts and the tokens emitted."""
    # The tables are what is left after any truncation; a greedy target is a table of point masses.
    sampler, token, steps = verifier.sampler(Sampling(1.0), keys, positions), last, []
    for offset in range(length):
        token, distribution = sampler(draft_table[cases, token], offset)
        steps.append((token, distribution))
    proposal = Proposal.stack(steps) if steps else Proposal(jnp.zeros((last.shape[0], 0), jnp.int32), None)
    return _emit(verifier, target_table, cases, last, proposal, keys, positions)


@eqx.filter_jit
def _verify_chains(verifier, target_table, cases, last, chains, keys, positions):
    """The same with given chains of tokens, drawn from no distribution that is known."""
    return _emit(verifier, target_table, cases, last, Proposal(chains, None), keys, positions)


def _emit(verifier, target_table, cases, last, proposal, keys, positions):
    block = jnp.concatenate([last[:, None], proposal.tokens], axis=1)
    target = Categorical.from_logits(target_table[cases[:, None], block])
    verdict = jax.vmap(verifier.verify)(target, proposal, keys, positions)
    guesses = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    is_guess = jnp.arange(block.shape[1])[None] < verdict.num_accepted[:, None]
    return verdict.num_accepted, jnp.where(is_guess, guesses, verdict.next_token[:, None])


class Drawn(eqx.Module):
    """What was drawn.

    **Arguments:**

    - `p_values`: of the tokens' law, one a case.
    - `acceptance`: how often the first drafted token was kept in a first round, one a case.
    - `optimal`: how often any rule could have kept it.
    """

    p_values: np.ndarray
    acceptance: np.ndarray
    optimal: np.ndarray


def draw_rounds(verifier: AbstractVerifier, cases: Tables, length: int) -> Drawn:
    """Decodes many rows by rounds until each has a few tokens, and compares their law with the target's.

    Later rounds start at other positions in other rows, so that a random number used twice shows as well.
    """
    rows = len(cases.names) * _DRAWS
    case_of_row = np.repeat(np.arange(len(cases.names)), _DRAWS)
    keys = jr.split(jr.key(length), rows)
    tokens = np.zeros((rows, _HORIZON + 4), np.int32)
    count, last, first_accepted = np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.zeros(rows, bool)
    while count.min() < _HORIZON:
        positions = np.int32(_START) + count
        num_accepted, emitted = _round(verifier, cases.target, cases.draft, case_of_row, last, keys, positions, length)
        num_accepted, emitted = np.asarray(num_accepted), np.asarray(emitted)
        require(
            bool(np.all((num_accepted >= 0) & (num_accepted <= length) & (emitted >= 0).all(1))),
            f"{length} drafted: a verdict keeps {num_accepted.min()} to {num_accepted.max()} tokens",
        )
        require(bool(np.all(emitted < _VOCAB)), f"{length} drafted: token {emitted.max()} is not in the vocabulary")
        if not count.any():
            first_accepted = num_accepted > 0
        active = count < _HORIZON
        for offset in range(length + 1):
            is_emitted = active & (offset <= num_accepted)
            tokens[is_emitted, count[is_emitted] + offset] = emitted[is_emitted, offset]
        added = np.where(active, num_accepted + 1, 0)
        last = np.where(active, emitted[np.arange(rows), num_accepted], last).astype(np.int32)
        count = count + added
    p, q = softmax(cases.target[:, 0]), softmax(cases.draft[:, 0])
    by_case = tokens[:, :_HORIZON].reshape(len(cases.names), _DRAWS, _HORIZON)
    laws = [_chain_law(softmax(table)) for table in cases.target]
    return Drawn(
        np.array([law_p_value(found, law) for found, law in zip(by_case, laws, strict=True)]),
        np.mean(first_accepted.reshape(len(cases.names), _DRAWS), axis=1),
        np.minimum(p, q).sum(-1),
    )


def _chain_law(table: np.ndarray) -> np.ndarray:
    law = table[0]
    for _ in range(_HORIZON - 1):
        law = law[..., None] * table
    return law


def first_difference_from_plain(verifier: AbstractVerifier, cases: Tables, length: int, keys: int) -> str | None:
    """Whether every chain of drafted tokens leads to the tokens of plain decoding, exactly; if not, where it does not.

    **Arguments:**

    - `length`: of the chains; all of them are tried.
    - `keys`: how many keys to try, with every case.
    """
    starts = [(case, key) for case in range(len(cases.names)) for key in range(keys)]
    row_keys = jr.split(jr.key(99), len(starts))
    case_of_row = np.array([case for case, _ in starts])
    last, plain = np.zeros(len(starts), np.int32), []
    for offset in range(length + 1):
        nothing, positions = np.zeros((len(starts), 0), np.int32), np.full(len(starts), _START + offset, np.int32)
        _, emitted = _verify_chains(verifier, cases.target, case_of_row, last, nothing, row_keys, positions)
        last = np.asarray(emitted)[:, 0].astype(np.int32)
        plain.append(last)
    plain = np.stack(plain, axis=1)
    chains = np.array(list(it.product(range(_VOCAB), repeat=length)), np.int32)
    repeats = len(chains)
    num_accepted, emitted = _verify_chains(
        verifier,
        cases.target,
        np.repeat(case_of_row, repeats),
        np.zeros(len(starts) * repeats, np.int32),
        np.tile(chains, (len(starts), 1)),
        row_keys[np.repeat(np.arange(len(starts)), repeats)],
        np.full(len(starts) * repeats, _START, np.int32),
    )
    counts = np.arange(length + 1)[None] <= np.asarray(num_accepted)[:, None]
    differs = (np.asarray(emitted) != np.repeat(plain, repeats, axis=0)) & counts
    if not differs.any():
        return None
    row = int(np.argmax(differs.any(1)))
    return (
        f"{cases.names[case_of_row[row // repeats]]}: with the chain {tuple(chains[row % repeats].tolist())} drafted, "
        f"{np.asarray(emitted)[row, counts[row]].tolist()} is emitted, but plain decoding says "
        f"{plain[row // repeats].tolist()}"
    )


def verdict_p_value(rule, draws: int = 8000) -> float:
    """Whether `verify` draws what `survival` and `next_weights` say, on one chain where every verdict is likely."""
    with np.errstate(divide="ignore"):
        target_logits = np.log(np.array([[4, 3, 2, 1], [0, 5, 3, 2], [1, 2, 3, 4], [2, 3, 4, 1]], np.float32))
        draft_logits = np.log(np.array([[6, 2, 1, 1], [2, 1, 5, 2], [2, 1, 1, 6]], np.float32))
    chain = np.array([0, 2, 3], np.int32)
    verdict, survival, weights = _verdicts(rule, target_logits, draft_logits, chain, jr.split(jr.key(5), draws))
    at_least = np.concatenate([[1.0], np.asarray(survival, np.float64), [0.0]])
    weights = np.asarray(weights, np.float64)
    expected = (at_least[:-1] - at_least[1:])[:, None] * weights / weights.sum(-1, keepdims=True)
    # A next token of no probability is none after any number of kept ones.
    counts = np.zeros_like(expected)
    np.add.at(counts, (np.asarray(verdict.num_accepted), np.asarray(verdict.next_token)), 1)
    return chi_square_p_value(counts.ravel(), draws * np.maximum(expected, 0.0).ravel())


@eqx.filter_jit
def _verdicts(rule, target_logits, draft_logits, chain, keys):
    target = Categorical.from_logits(target_logits)
    proposal = Proposal(chain, Categorical.from_logits(draft_logits))
    verdict = jax.vmap(lambda key: rule.verify(target, proposal, key, jnp.int32(0)))(keys)
    weights = jax.vmap(lambda num: rule.next_weights(target, proposal, num))(jnp.arange(len(chain) + 1))
    return verdict, rule.survival(target, proposal), weights
