"""What a loss lets its user choose: stated in the loss's own file, read by the configuration and its documentation."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

_KEY = "loss_option"


@dataclasses.dataclass(frozen=True)
class LossOption:
    """One option of a loss. Its name is that of the field, and TRL's where TRL has it.

    **Arguments:**

    - `default`: `None` for one that is off, or follows from another.
    - `description`: a phrase for the table of keys.
    - `gt`, `ge`, `le`: bounds.
    - `complaint`: given the value and all options of the loss by name, what is wrong between them, or `None`.
    """

    default: float | None
    description: str
    gt: float | int | None = None
    ge: float | int | None = None
    le: float | int | None = None
    complaint: Callable[[float, Mapping[str, float | None]], str | None] | None = None

    @property
    def bounds(self) -> dict[str, float | int]:
        """Those that there are, by name."""
        named = (("gt", self.gt), ("ge", self.ge), ("le", self.le))
        return {name: bound for name, bound in named if bound is not None}


def option(
    default: float | None,
    description: str,
    *,
    gt: float | int | None = None,
    ge: float | int | None = None,
    le: float | int | None = None,
    complaint: Callable[[float, Mapping[str, float | None]], str | None] | None = None,
) -> Any:
    """A field of a loss that its user may set: an array, so that another value is no other program.

    **Arguments:** see [`eqx_specgrpo.grpo.losses.LossOption`][].
    """
    stated = LossOption(default, description, gt, ge, le, complaint)
    return eqx.field(default=default, converter=_array, metadata={_KEY: stated})


def options_of(loss: type[eqx.Module]) -> dict[str, LossOption]:
    """The options that a loss states, by name."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(loss) if _KEY in field.metadata}


def _array(x: Float[ArrayLike, ""] | Int[ArrayLike, ""] | None) -> Float[Array, ""] | None:
    return None if x is None else jnp.asarray(x, jnp.float32)
