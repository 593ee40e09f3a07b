"""What completions of a prompt say of a policy, and how sure that is. Pure functions, on the host, in float64."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int


def pass_at_k(num_correct: Int[np.ndarray, " prompts"], samples: int, k: int) -> Float[np.ndarray, " prompts"]:
    """The probability that at least one of `k` completions is right, without bias: `1 - C(n - c, k) / C(n, k)`, where
    `c` of `n` completions are right.

    The quotient is the product of `(n - c - j) / (n - j)` for `j` below `k`. Each factor is between 0 and 1, so nothing
    overflows, as binomial coefficients of some hundred completions do.

    ??? cite

        Chen et al. 2021, "Evaluating large language models trained on code",
        [arXiv:2107.03374](https://arxiv.org/abs/2107.03374), equation 1.

    **Arguments:**

    - `num_correct`: of each prompt's completions, how many are right.
    - `samples`: completions of a prompt.
    - `k`: from 1 to `samples`.

    **Raises:**

    `ValueError` for a `k` that so many samples do not allow, or a count that is out of range.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} can't be known from {samples} samples of a prompt: k must be from 1 to {samples}")
    if num_correct.size and not (0 <= num_correct.min() and num_correct.max() <= samples):
        raise ValueError(f"num_correct is from {num_correct.min()} to {num_correct.max()}, but of {samples} samples")
    drawn = np.arange(k)
    wrong = (samples - num_correct)[:, None] - drawn
    return 1.0 - np.prod(np.maximum(wrong, 0) / (samples - drawn), axis=1)


def majority_value(answers: Sequence[Hashable | None], values: Float[np.ndarray, " samples"]) -> float:
    """The value of the answer that most completions of a prompt give (self-consistency).

    Completions without an answer, `None`, have no vote, unless none has one. Where answers have equally many votes, one
    of them is as good as another: the mean over them. An answer's value is the mean over the completions that give it.

    ??? cite

        Wang et al. 2022, "Self-consistency improves chain of thought reasoning in language models",
        [arXiv:2203.11171](https://arxiv.org/abs/2203.11171).

    **Arguments:**

    - `answers`: one a completion.
    - `values`: of the completions, 1 for a right one, say; NaN where there is none.

    **Returns:**

    NaN if no completion that counts has a value.
    """
    votes: dict[Hashable, list[float]] = defaultdict(list)
    for answer, value in zip(answers, values.tolist(), strict=True):
        votes[answer].append(value)
    if len(votes) > 1:
        votes.pop(None, None)
    most = max(len(of_answer) for of_answer in votes.values())
    winners = [nan_mean(np.array(of_answer)) for of_answer in votes.values() if len(of_answer) == most]
    return nan_mean(np.array(winners))


def bootstrap_intervals(
    values: Float[np.ndarray, "prompts metrics"], seed: int, resamples: int = 1000, level: float = 0.95
) -> tuple[Float[np.ndarray, " metrics"], Float[np.ndarray, " metrics"]]:
    """Percentile intervals of means over prompts, by drawing as many prompts anew with replacement.

    Prompts are drawn, and not completions: those of one prompt are alike, and would make it look surer than it is.

    ??? cite

        Efron 1979, "Bootstrap methods: another look at the jackknife",
        [doi:10.1214/aos/1176344552](https://doi.org/10.1214/aos/1176344552).

    **Arguments:**

    - `values`: of each prompt; all metrics are drawn together. NaN where a prompt has none: it is left out of the mean.
    - `seed`: the same seed gives the same intervals.
    - `resamples`: how often the prompts are drawn.
    - `level`: share of the resampled means inside the interval.

    **Returns:**

    The lower and the upper ends. NaN where no prompt has a value.
    """
    prompts = len(values)
    counts = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    known = ~np.isnan(values)
    sums, numbers = counts @ np.where(known, values, 0.0), counts @ known.astype(np.float64)
    means = np.divide(sums, numbers, out=np.full_like(sums, np.nan), where=numbers > 0)
    tail = (1 - level) / 2
    ends = np.full((2, values.shape[1]), np.nan)
    for metric in np.flatnonzero(known.any(axis=0)):
        ends[:, metric] = np.nanquantile(means[:, metric], [tail, 1 - tail])
    return ends[0], ends[1]


def nan_mean(values: Float[np.ndarray, "..."]) -> float:
    """The mean of what is not NaN; NaN if nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
