"""What a process is given by its surroundings, looked at before anything is computed."""

import os
from collections.abc import Iterator

from ..errors import UserError

# What these say when they are not set. Everything here is float32 and int32 by design, mixed as JAX does by default.
_NUMBERS = {"JAX_ENABLE_X64": ("", "0", "false"), "JAX_NUMPY_DTYPE_PROMOTION": ("", "standard")}


def set_aside_number_settings() -> Iterator[str]:
    """For a program of ours, before JAX is imported: takes settings out of the environment that ask for other numbers
    than ours, and says which."""
    for name, harmless in _NUMBERS.items():
        if os.environ.get(name, "").lower() not in harmless:
            value = os.environ.pop(name)
            yield f"{name}={value} is set aside: this program computes in float32 (or bfloat16, by model.dtype)"


def check_jax() -> None:
    """Looks at the JAX that is about to be used.

    **Raises:**

    `UserError` if it computes with other numbers than this library's, or finds no device to compute on.
    """
    # Here, so that a program can set up its process before JAX reads the environment.
    import jax
    import jax.numpy as jnp

    if jnp.result_type(float) != jnp.float32:
        raise UserError(
            "JAX is set to 64 bits (JAX_ENABLE_X64 or jax_enable_x64), but this library computes in float32 and int32: "
            "unset it, or call the library under `with jax.enable_x64(False):`"
        )
    try:
        jnp.promote_types(jnp.int32, jnp.float32)
    except ValueError:
        raise UserError(
            "JAX refuses to mix dtypes (JAX_NUMPY_DTYPE_PROMOTION=strict), which this library relies on: unset it, or "
            'call the library under `with jax.numpy_dtype_promotion("standard"):`'
        ) from None
    try:
        jax.devices()
    except Exception as error:  # assertions among them
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        wanted = os.environ.get("JAX_PLATFORMS", "")
        way_out = (
            f"JAX_PLATFORMS is {wanted!r}: unset it to take what is there, or install the JAX of that device"
            if wanted
            else "set JAX_PLATFORMS=cpu to compute on the processor"
        )
        raise UserError(f"JAX finds no device to compute on ({reason}). {way_out}") from error


def as_typed(text: str) -> str:
    """An argument of the command line as it was typed. Under a locale that knows ASCII only, Python hands other
    characters on as bytes in disguise.

    **Raises:**

    `UserError` if it is no UTF-8.
    """
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise UserError(f"{text!r} is not text in UTF-8: check the encoding of the terminal or of the script") from None
