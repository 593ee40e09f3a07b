"""Losslessness, third tier: the law of what the whole decoder says, by statistics with a fixed key.

The target is a table over the last two tokens, so the law of its completions is known exactly. The decoder draws some
thousands of completions; two joint laws of three tokens, at the start and where rounds have long lost their step, are
compared with the exact ones by chi-square. The same test must see through each of the broken verifiers.
"""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    BROKEN,
    PointMassDraft,
    TabularDraft,
    quick_compilation,
    sequence_law,
    tabular_model,
)

from eqx_specgrpo._types import Rollouts
from eqx_specgrpo.decoding import (
    Block,
    Coupled,
    FixedLength,
    Rejection,
    Sampling,
    TruncatedSampling,
    decode,
    teacher_forced_logprobs,
)
from eqx_specgrpo.testing import OneOf, verifier_name
from eqx_specgrpo.testing._statistics import law_p_value

ROWS, NEW, LENGTH, VOCAB = 2048, 6, 2, 4
PROMPT = [3, 1]
TARGET = tabular_model(seed=0, vocab=VOCAB, scale=1.0)
_PLAIN = Sampling(1.0)
# Related to the target, as drafts are, but not the same.
TABLE = TARGET.table[0] + np.random.default_rng(1).standard_normal((VOCAB, VOCAB)).astype(np.float32)
DRAFT = TabularDraft(TABLE, LENGTH)


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compilation():
        yield


def _decode(draft, verifier, sampling, length=LENGTH) -> Rollouts:
    return decode(
        TARGET,
        [PROMPT],
        draft=draft,
        verifier=verifier,
        length=FixedLength(length),
        sampling=sampling,
        key=jr.key(7),
        max_new_tokens=NEW,
        samples=ROWS,
        smallest_bucket=ROWS,
    )


def _p_values(rollouts: Rollouts, sampling) -> tuple[float, float]:
    """Of the first three tokens, and of the last three."""
    law = sequence_law(TARGET, sampling, PROMPT, NEW)
    return (
        law_p_value(rollouts.tokens[:, :3], law.sum((3, 4, 5))),
        law_p_value(rollouts.tokens[:, 3:], law.sum((0, 1, 2))),
    )


# One program for all.
_REJECTION = OneOf((Rejection(), *BROKEN), 0)


@pytest.mark.parametrize(
    "draft, verifier, sampling",
    [
        (DRAFT, _REJECTION, Sampling(1.4)),
        (DRAFT, Rejection(), Sampling(1.0, top_k=3, top_p=1.0)),
        (DRAFT, Rejection(), Sampling(1.2, top_k=3, top_p=0.7)),
        (TabularDraft(TABLE, LENGTH, Sampling(0.5)), Rejection(), Sampling(1.0, top_k=2)),
        (DRAFT, Block(), TruncatedSampling(1.2, max_support=3, top_p=0.8, min_p=0.1)),
        (DRAFT, Coupled(), TruncatedSampling(1.2, max_support=3, top_p=0.8, min_p=0.1)),
        (PointMassDraft(jnp.argmax(TABLE, axis=-1).astype(jnp.int32), LENGTH), Rejection(), _PLAIN),
    ],
    ids=[
        "temperature",
        "top-k",
        "top-k and top-p",
        "draft by other settings",
        "recorded, block",
        "recorded, coupled",
        "point mass",
    ],
)
def test_the_law_of_rollouts_is_the_targets(draft, verifier, sampling):
    rollouts = _decode(draft, verifier, sampling)
    assert min(_p_values(rollouts, sampling)) > 1e-3
    assert 0.1 < rollouts.statistics.acceptance_rate < 0.95
    logprobs = teacher_forced_logprobs(TARGET, sampling, rollouts)
    np.testing.assert_allclose(rollouts.logprobs, logprobs, atol=1e-5)


def test_the_statistics_tell_one_law_from_another():
    """Rollouts at one temperature are not taken for those at another."""
    rollouts = _decode(DRAFT, _REJECTION, Sampling(1.4))
    assert max(_p_values(rollouts, _PLAIN)) < 1e-6


def test_rows_of_one_prompt_are_independent():
    """Pairs of rows: the joint law of their first tokens is the product."""
    tokens = _decode(DRAFT, _REJECTION, _PLAIN).tokens
    first = sequence_law(TARGET, _PLAIN, PROMPT, 1)
    pairs = np.stack([tokens[0::2, 0], tokens[1::2, 0]], axis=1)
    assert law_p_value(pairs, first[:, None] * first) > 1e-3


@pytest.mark.parametrize("index", range(len(BROKEN)), ids=map(verifier_name, BROKEN))
def test_statistics_catch_broken_verifiers(index):
    verifier = OneOf(_REJECTION.rules, 1 + index)
    assert min(_p_values(_decode(DRAFT, verifier, _PLAIN), _PLAIN)) < 1e-6
