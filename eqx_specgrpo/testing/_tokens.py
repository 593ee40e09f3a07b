"""Decoding with a draft beside plain decoding, token by token."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Key

from .._types import Prompts, Rollouts
from ..decoding import Coupled, DecodeProgress, FixedLength, decode, teacher_forced_logprobs
from ..drafts import AbstractDraft
from ..models import AbstractLanguageModel, sequence_features
from ..sampling import AbstractSampling, Categorical, GreedySampling, Sampling, exponential_noise
from ._errors import require


class GreedyOrNot(AbstractSampling):
    """One program for both.

    **Arguments:**

    - `is_greedy`: whether this is `GreedySampling` or `sampling`.
    - `sampling`: the other.
    """

    is_greedy: Bool[Array, ""]
    sampling: Sampling

    def distribution(self, logits):
        greedy, other = GreedySampling().distribution(logits), self.sampling.distribution(logits)
        return Categorical(
            jnp.where(self.is_greedy, greedy.logits, other.logits),
            jnp.where(self.is_greedy, greedy.log_normalizer, other.log_normalizer),
        )

    def logprobs(self, logits, distribution, tokens):
        plain = Categorical.from_logits(logits).logprob(tokens)
        return jnp.where(self.is_greedy, plain, distribution.logprob(tokens))


class Difference(eqx.Module):
    """The first token of a row in which the two ways differ.

    **Arguments:**

    - `row`, `position`: of the completion.
    - `plain`, `speculative`: the token ids.
    - `gap`: by how much the scores of the two tokens differ in a fresh forward: logits, less the logarithm of the noise
        where tokens are sampled.
    - `behind`: by how much the worse of them is behind the best of all tokens.
    """

    row: int
    position: int
    plain: int
    speculative: int
    gap: float
    behind: float


class TokenComparison(eqx.Module):
    """Plain decoding and decoding with a draft, which ought to say the same.

    **Arguments:**

    - `tokens`: how many tokens plain decoding said.
    - `equal`: how many of them are the same, at the same place.
    - `differences`: where rows part; what comes after that in a row can't be compared.
    - `acceptance_length`: tokens a pass of the target, with the draft.
    - `logprob_gap_mean`, `logprob_gap_max`: between the log-probabilities that the decoder reported with the draft, and
        those of a fresh forward over the same tokens.
    """

    tokens: int
    equal: int
    differences: tuple[Difference, ...]
    acceptance_length: float
    logprob_gap_mean: float
    logprob_gap_max: float

    @property
    def share(self) -> float:
        return self.equal / self.tokens

    @property
    def largest_gap(self) -> float:
        """The largest gap at a difference; 0 where there is none."""
        return max((difference.behind for difference in self.differences), default=0.0)

    def summary(self) -> str:
        """One line."""
        ties = "".join(
            f"; row {d.row} parts at token {d.position}, a near tie of {d.behind:.1e}" for d in self.differences
        )
        return (
            f"{self.equal} of {self.tokens} equal ({self.share:.2%}){ties}; acceptance length "
            f"{self.acceptance_length:.2f}"
        )

    def require_near_ties(self, name: str, near_tie: float) -> None:
        """Raises `ConformanceError` if two tokens differ that were no near tie."""
        for difference in self.differences:
            require(
                difference.behind <= near_tie,
                f"{name}: row {difference.row} says token {difference.speculative} at position {difference.position}, "
                f"where plain decoding says {difference.plain}, and that is no near tie: a fresh forward puts "
                f"{difference.behind:.1e} between the worse of them and the best token (allowed are {near_tie:.0e})",
            )

    def require_logprobs(self, name: str, tolerance: float) -> None:
        """Raises `ConformanceError` if a reported log-probability is not that of a fresh forward."""
        require(
            self.logprob_gap_max <= tolerance,
            f"{name}: a reported log-probability is off by {self.logprob_gap_max:.1e} from a fresh forward (allowed "
            f"are {tolerance:.0e})",
        )


def compare_tokens(
    draft: AbstractDraft,
    target: AbstractLanguageModel,
    prompts: Prompts | Sequence[Sequence[int]],
    *,
    greedy: bool,
    key: Key[Array, ""],
    max_new_tokens: int,
    temperature: float = 1.0,
    length: int = 3,
    samples: int = 1,
    eos_ids: Sequence[int] = (),
    on_progress: Callable[[DecodeProgress], None] | None = None,
) -> TokenComparison:
    """Decodes twice, with the draft and without, and shows every difference to be a near tie, or not.

    The verifier is [`eqx_specgrpo.decoding.Coupled`][], which draws the same tokens with any draft but for rounding,
    and of a greedy distribution the most likely one.

    **Arguments:**

    - `draft`, `target`: the pair.
    - `greedy`: take the most likely tokens; else they are sampled at `temperature`.
    - `prompts`, `key`, `max_new_tokens`, `samples`, `eos_ids`, `on_progress`: see
        [`eqx_specgrpo.decoding.decode`][].
    - `length`: tokens drafted a round, or the draft's most if that is smaller.
    """
    prompts = prompts if isinstance(prompts, Prompts) else Prompts.from_lists(prompts)
    sampling = GreedyOrNot(jnp.array(greedy), Sampling(temperature))

    def say(draft: AbstractDraft | None) -> Rollouts:
        return decode(
            target,
            prompts,
            draft=draft,
            verifier=Coupled(),
            length=FixedLength(length),
            sampling=sampling,
            key=key,
            max_new_tokens=max_new_tokens,
            samples=samples,
            eos_ids=eos_ids,
            # No shrinking: every bucket is another program to compile.
            smallest_bucket=len(prompts.lengths) * samples,
            cache_dtype=jnp.float32,
            on_progress=on_progress,
        )

    plain, found = say(None), say(draft)
    offsets = np.arange(max_new_tokens)[None]
    # A row that ends early differs where the other goes on.
    known, also_known = offsets < plain.lengths[:, None], offsets < found.lengths[:, None]
    equal = known & also_known & (plain.tokens == found.tokens)
    parts = (known | also_known) & ~equal
    differences = []
    for row in np.flatnonzero(parts.any(1)):
        position = int(np.argmax(parts[row]))
        differences.append(_difference(target, sampling, plain, found, key, int(row), position))
    gaps = np.abs(teacher_forced_logprobs(target, sampling, found) - found.logprobs)[also_known]
    return TokenComparison(
        int(known.sum()),
        int(equal.sum()),
        tuple(differences),
        found.statistics.acceptance_length,
        float(gaps.mean()),
        float(gaps.max()),
    )


def _difference(
    target: AbstractLanguageModel,
    sampling: GreedyOrNot,
    plain: Rollouts,
    found: Rollouts,
    key: Key[Array, ""],
    row: int,
    position: int,
) -> Difference:
    prompt = plain.prompts.tokens[plain.group[row], : plain.prompts.lengths[plain.group[row]]]
    width = plain.prompts.tokens.shape[1] + plain.tokens.shape[1]
    sequence = np.zeros(width, np.int32)
    known = [*prompt.tolist(), *plain.tokens[row, :position].tolist()]
    sequence[: len(known)] = known
    scores = np.asarray(_scores(target, sampling, sequence, np.int32(len(known)), jr.fold_in(key, row)), np.float64)
    tokens = int(plain.tokens[row, position]), int(found.tokens[row, position])
    of_tokens = scores[list(tokens)]
    return Difference(
        row, position, *tokens, float(np.abs(of_tokens[0] - of_tokens[1])), float(scores.max() - of_tokens.min())
    )


@eqx.filter_jit
def _scores(target, sampling, sequence, length, key):
    """What the decoder takes the largest of, for the token at `length`, from one forward without a cache."""
    logits = target.unembed(sequence_features(target, sequence[None]).last[0, length - 1])
    distribution = sampling.sampling.distribution(logits)
    noise = exponential_noise(jr.fold_in(key, length), jnp.arange(logits.shape[-1]))
    raced = distribution.logits - distribution.log_normalizer - jnp.log(noise)
    return jnp.where(sampling.is_greedy, logits, raced)
