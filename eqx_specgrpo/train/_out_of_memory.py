"""What to say when the device's memory does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from ..errors import UserError


@contextmanager
def out_of_memory_advice() -> Iterator[None]:
    """Makes a `UserError` that says what takes less of what XLA says when an array finds no room."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the device's memory does not suffice. For the update: grpo.max_tokens_per_micro_batch=8192 (or less), "
            "grpo.gradient_checkpointing=true. For rollouts: grpo.max_rows. For both: model.dtype=bfloat16, fewer "
            f"grpo.prompts_per_step, a shorter grpo.max_completion_length. XLA says: {str(error).splitlines()[0]}"
        ) from error
