"""What is done before memory runs out, and what to say when the device's has."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from ..decoding import AbstractCompiler
from ..errors import UserError
from ..records import RunProgress
from ..runtime import ProgramMemory


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


def bound_programs(programs: ProgramMemory, compiler: AbstractCompiler, progress: RunProgress) -> None:
    """Between steps: a run of uneven completions meets new shapes for long, and each of its programs stays in memory.
    Says so where they are dropped, and tells the compiler of the rollouts."""
    dropped = programs.look()
    if dropped is not None:
        compiler.forget()
        progress.note(
            f"dropped compiled programs, which held {dropped / 1e9:.1f} GB: those that are needed again are read from "
            "JAX's cache, or compiled"
        )
