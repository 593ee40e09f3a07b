"""A program as a function and shapes: it can be compiled for devices that are not there, and nothing is run."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import PyTree


class Program(NamedTuple):
    """What is handed to the compiler.

    **Arguments:**

    - `name`: to call it by.
    - `function`: as it is run, jitted by `eqx.filter_jit` or not.
    - `arguments`: of the function. Arrays are `jax.ShapeDtypeStruct`s, and all else is static.
    - `options`: by keyword, likewise.
    - `donated`: which of the arguments the function may overwrite.
    """

    name: str
    function: Callable[..., PyTree]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {}
    donated: tuple[int, ...] = ()

    def lower(
        self, place: Callable[[jax.ShapeDtypeStruct], jax.ShapeDtypeStruct] = lambda shape: shape
    ) -> jax.stages.Lowered:
        """The program before the compiler optimizes it; `.compile()` goes on.

        **Arguments:**

        - `place`: gives a shape the sharding that says where it lies. As they come, shapes lie on JAX's own device.
        """
        whole = (*self.arguments, self.options)
        dynamic, static = eqx.partition(whole, _is_shape)
        dynamic = jax.tree.map(place, dynamic)
        function = inspect.unwrap(self.function)

        def run(*dynamic: PyTree) -> PyTree:
            *arguments, options = eqx.combine(dynamic, static)
            return eqx.filter(function(*arguments, **options), eqx.is_array)

        return jax.jit(run, donate_argnums=self.donated).lower(*dynamic)


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)
