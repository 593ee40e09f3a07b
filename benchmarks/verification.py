"""What a verdict costs: block verification over the draft's tokens, against the same sums over the whole vocabulary.

    python benchmarks/verification.py --rows 1,4,16 --lengths 1,2,3

No model is run: target and draft are random logits. Each case is timed in turn with the others, `--rounds` times. The
table has the median time of a call in milliseconds, and the least and the greatest.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from eqx_specgrpo.decoding import AbstractAcceptanceRule, AbstractVerifier, Block, Coupled, Rejection
from eqx_specgrpo.drafts import IndependentSampler, Proposal
from eqx_specgrpo.runtime import keep_freed_memory
from eqx_specgrpo.sampling import Sampling


class WholeVocabulary(AbstractAcceptanceRule):
    """Block verification as in the paper: every sum goes over the whole vocabulary."""

    def survival(self, target, proposal):
        length, vocab = proposal.tokens.shape[0], target.logits.shape[-1]
        chain = self._chain(target, proposal)
        draft_probs = [proposal.probs_at(jnp.int32(i), vocab) for i in range(1, length)] or [jnp.zeros(vocab)]
        left = chain[:-1, None] * target[1:length].probs() - jnp.stack(draft_probs)[: length - 1]
        left = jnp.sum(jnp.maximum(left, 0.0), axis=-1)
        denominator = left + 1.0 - chain[:-1]
        passes = jnp.where(denominator > 0, left / jnp.where(denominator > 0, denominator, 1.0), 1.0)
        return 1.0 - jax.lax.cumprod(1.0 - jnp.concatenate([passes, chain[-1:]]), reverse=True)

    def next_weights(self, target, proposal, num_accepted):
        target_probs = target[num_accepted].probs()
        chain = jnp.concatenate([jnp.ones(1), self._chain(target, proposal)])
        draft_probs = proposal.probs_at(num_accepted, target_probs.shape[-1])
        residual = jnp.maximum(chain[num_accepted] * target_probs - draft_probs, 0.0)
        return jnp.where(residual.sum() > 0, residual, target_probs)

    def _chain(self, target, proposal):
        ratios = jnp.exp(target[: proposal.tokens.shape[0]].logprob(proposal.tokens) - proposal.token_logprobs())
        kept, chain = jnp.ones(()), []
        for ratio in ratios:
            kept = jnp.minimum(1.0, kept * ratio)
            chain.append(kept)
        return jnp.stack(chain)


@eqx.filter_jit
def verify(verifier: AbstractVerifier, sampling: Sampling, logits, proposal: Proposal, keys, positions):
    """The verdict and the log-probabilities to report, as a round computes them."""
    distribution = sampling.distribution(logits)
    verdict = jax.vmap(verifier.verify)(distribution, proposal, keys, positions)
    emitted = jnp.pad(proposal.tokens, ((0, 0), (0, 1))).at[:, -1].set(verdict.next_token)
    return verdict, sampling.logprobs(logits, distribution, emitted)


@eqx.filter_jit
def only_normalise(sampling: Sampling, logits):
    """The part that every rule needs, and plain decoding too."""
    return sampling.distribution(logits).log_normalizer


@eqx.filter_jit
def guess(sampling: Sampling, logits, keys, support) -> Proposal:
    """Tokens drawn from random logits of a draft."""
    return Proposal(*IndependentSampler(sampling, keys).chain(logits, support))


def seconds_of(call, clock) -> float:
    """How long a call takes, its result included."""
    begin = clock()
    jax.block_until_ready(call())
    return clock() - begin


def measure(rows: int, length: int, vocab: int, support: int, rounds: int, clock) -> dict[str, list[float]]:
    """Seconds of each way, in turn."""
    sampling, keys = Sampling(1.0), jr.split(jr.key(0), rows)
    logits = 3.0 * jr.normal(jr.key(1), (rows, length + 1, vocab))
    ids = jr.permutation(jr.key(2), vocab)[:support].astype(jnp.int32) if support else None
    of_draft = logits[:, :length] if ids is None else logits[:, :length, ids]
    proposal = guess(sampling, of_draft + 0.5 * jr.normal(jr.key(3), of_draft.shape), keys, ids)
    positions = jnp.arange(rows, dtype=jnp.int32)
    rules = {"block, whole vocabulary": WholeVocabulary(), "block": Block(), "rejection": Rejection()}
    calls = {
        name: lambda rule=rule: verify(rule, sampling, logits, proposal, keys, positions)
        for name, rule in (rules | {"coupled": Coupled()}).items()
    }
    calls["normalising alone"] = lambda: only_normalise(sampling, logits)
    taken = {name: [] for name in calls}
    for call in calls.values():
        seconds_of(call, clock)
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(seconds_of(call, clock))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--lengths", default="1,2,3")
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--support", type=int, default=8192, help="tokens of the draft, 0 for all")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--cpu", action="store_true", help="processor time, for a machine that is busy with other work")
    parser.add_argument("--out", type=Path, help="file for all times, as JSON")
    arguments = parser.parse_args()
    found, clock = [], time.process_time if arguments.cpu else time.perf_counter
    print("| rows | guesses | rule | ms | least | greatest |\n| --- | --- | --- | --- | --- | --- |")
    for rows in map(int, arguments.rows.split(",")):
        for length in map(int, arguments.lengths.split(",")):
            taken = measure(rows, length, arguments.vocab, arguments.support, arguments.rounds, clock)
            for name, seconds in taken.items():
                ms = [1000 * second for second in seconds]
                median = statistics.median(ms)
                print(f"| {rows} | {length} | {name} | {median:.2f} | {min(ms):.2f} | {max(ms):.2f} |", flush=True)
                found.append({"rows": rows, "length": length, "rule": name, "ms": ms})
    if arguments.out is not None:
        about = {"processor": platform.processor(), "jax": jax.__version__, "vocab": arguments.vocab}
        arguments.out.write_text(json.dumps({**about, "support": arguments.support, "cases": found}) + "\n")


if __name__ == "__main__":
    keep_freed_memory()
    main()
