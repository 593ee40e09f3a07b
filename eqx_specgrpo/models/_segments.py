"""What rows of queries attend to in training: runs of keys at consecutive positions, each of a length of its own."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Extent(eqx.Module):
    """Where the positions of each row lie.

    **Arguments:**

    - `start`: the absolute position of the first.
    - `length`: how many there are; what is right of them is padding.
    """

    start: Int[Array, " batch"]
    length: Int[Array, " batch"]

    def positions(self, size: int) -> Int[Array, "batch size"]:
        """Absolute positions of all places; those of padding are beyond any row's end."""
        place = jnp.arange(size, dtype=self.start.dtype)[None]
        beyond = jnp.iinfo(self.start.dtype).max
        return jnp.where(place < self.length[:, None], self.start[:, None] + place, beyond)


class Segment(eqx.Module):
    """Keys and values at consecutive positions.

    **Arguments:**

    - `keys`, `values`: stored once, however many rows of queries read them.
    - `row`: which of the stored rows each row of queries reads; `None` if each has its own.
    - `extent`: where they lie, for each row of queries.
    """

    keys: Float[Array, "stored kv_heads slots head_dim"]
    values: Float[Array, "stored kv_heads slots head_dim"]
    row: Int[Array, " batch"] | None
    extent: Extent

    def of_each_row(
        self,
    ) -> tuple[Float[Array, "batch kv_heads slots head_dim"], Float[Array, "batch kv_heads slots head_dim"]]:
        """Keys and values with a copy for each row of queries."""
        return (self.keys, self.values) if self.row is None else (self.keys[self.row], self.values[self.row])
