"""The batches that rows are shrunk to as others finish: powers of two, so that few programs are compiled."""

import jax.numpy as jnp

from ..models import AbstractLanguageModel, matrix_dtype, platform_of
from ..runtime import SMALL_HIDDEN_SIZE


def default_smallest_bucket(target: AbstractLanguageModel) -> int:
    """The smallest batch that is worth a program of its own: 1 or 2, and 16 for a very small model on a CPU.

    In float32 on CPU a single row reads the weights faster than two do (SmolLM2-135M on two cores, one and two rows: 25
    and 41 ms a plain round, 41 and 58 with three guesses). In bfloat16 a single row of a plain round is computed as
    two, since its own product would be many times slower, and with guesses there is little between them either. On an
    accelerator one costs what two do.

    A very small model decodes about as fast in larger batches (the embedded one, 32 rows of up to 128 tokens, two busy
    cores: 0.22 ms a token when shrunk down to 2, to 8 or not at all, 0.24 to 16), and each program takes seconds to
    compile.
    """
    if platform_of(target) != "cpu":
        return 2
    if target.hidden_size <= SMALL_HIDDEN_SIZE:
        return 16
    return 1 if matrix_dtype(target) == jnp.float32 else 2


def bucket_for(active: int, smallest: int) -> int:
    """The batch that so many active rows need."""
    return max(1 << (active - 1).bit_length(), smallest)


def shrink_below(rows: int, smallest: int) -> int:
    """The number of active rows at which a smaller bucket becomes possible; 0 if there is none."""
    half = 1 << ((rows - 1).bit_length() - 1) if rows > 1 else 0
    return half if half >= smallest else 0
