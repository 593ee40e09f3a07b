"""Are these draws from that law? With fixed keys, so that an answer never changes."""

import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import chi2
from jaxtyping import Float, Int


def chi_square_p_value(counts: Float[np.ndarray, " cells"], expected: Float[np.ndarray, " cells"]) -> float:
    """Pearson's chi-square test, the p-value; 0 if something was seen that has no probability.

    Cells too rare for the approximation are taken together.

    **Arguments:**

    - `counts`: how often each outcome was seen.
    - `expected`: how often it should have been; the two sums agree.
    """
    if counts[expected == 0].sum() > 0:
        return 0.0
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    if keep.sum() < 2:
        return 1.0  # one outcome alone, and it was seen
    statistic = np.sum((counts[keep] - expected[keep]) ** 2 / expected[keep])
    return float(chi2.sf(jnp.float32(statistic), jnp.float32(keep.sum() - 1)))


def law_p_value(tokens: Int[np.ndarray, "draws length"], law: np.ndarray) -> float:
    """Whether sequences have a joint law, which has one axis a token."""
    counts = np.zeros(law.shape)
    np.add.at(counts, tuple(tokens.T), 1)
    return chi_square_p_value(counts.ravel(), len(tokens) * law.astype(np.float64).ravel())


def uniform_p_value(numbers: Float[np.ndarray, "draws axes"], cells: int) -> float:
    """Whether points are uniform in the unit cube: independent of each other, too.

    **Arguments:**

    - `cells`: into how many each axis is cut.
    """
    index = np.clip((numbers * cells).astype(np.int64), 0, cells - 1)
    return law_p_value(index, np.full((cells,) * numbers.shape[1], float(cells) ** -numbers.shape[1]))
