"""Which of two drafts has been right more often, for each row and each class of match."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# What was offered that many rounds ago counts 1/e. A draft that is not used slowly becomes unknown again, so that it is
# tried every hundred rounds or so.
_MEMORY = 32.0


class TrackRecord(eqx.Module):
    """Tokens that two drafts have offered and that were accepted, for each row and each class of match.

    A row prefers the draft with the larger share of accepted tokens where the match is of this class. Both shares begin
    at 1, as if one token had been offered and accepted, so that each draft is tried. Old rounds are forgotten.

    The record holds verdicts of finished rounds alone. It does not depend on other rows, nor on tokens that were
    rejected.

    **Arguments:**

    - `accepted`, `offered`: tokens, the newer the more they weigh.
    - `match`: class of the match of the round under way, 0 where there is none.
    - `prefers_first`: whether the first draft guesses in the round under way.
    """

    accepted: Float[Array, "rows classes 2"]
    offered: Float[Array, "rows classes 2"]
    match: Int[Array, " rows"]
    prefers_first: Bool[Array, " rows"]

    @staticmethod
    def empty(rows: int, classes: int) -> "TrackRecord":
        """Makes the record of rows in which nothing was offered.

        **Arguments:**

        - `rows`: number of rows.
        - `classes`: number of classes of match, besides that there is none.
        """
        nothing = jnp.zeros((rows, classes, 2))
        return TrackRecord(nothing, nothing, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool))

    def choose(self, match: Int[Array, " rows"], expected: Float[Array, "rows draft"] | None = None) -> "TrackRecord":
        """Decides who guesses in each row: the first draft where it has a match and was not right less often.

        **Arguments:**

        - `match`: class of the first draft's match, from 1; 0 where it has none.
        - `expected`: what the second draft expects of each of its guesses if those before it are accepted, in place of
            its record; `None` if it does not know.
        """
        share = (self.accepted + 1) / (self.offered + 1)
        ours = jnp.take_along_axis(share, jnp.maximum(match - 1, 0)[:, None, None], axis=1)[:, 0]
        others = ours[:, 1] if expected is None else jnp.cumprod(expected, axis=1).mean(1)
        prefers_first = (match > 0) & (ours[:, 0] >= others)
        return dataclasses.replace(self, match=match, prefers_first=prefers_first)

    def judge(self, num_accepted: Int[Array, " rows"], length: int) -> "TrackRecord":
        """Takes in the verdict on the round under way.

        **Arguments:**

        - `num_accepted`: number of drafted tokens that were kept.
        - `length`: number of tokens that were drafted.
        """
        if length == 0:
            return self
        is_class = jax.nn.one_hot(self.match - 1, self.offered.shape[1])[..., None]  # nothing at all for class 0
        is_draft = jax.nn.one_hot(jnp.where(self.prefers_first, 0, 1), 2)[:, None]
        kept = 1 - is_class / _MEMORY
        new = is_class * is_draft
        return dataclasses.replace(
            self,
            accepted=kept * self.accepted + new * num_accepted[:, None, None],
            offered=kept * self.offered + new * length,
        )
