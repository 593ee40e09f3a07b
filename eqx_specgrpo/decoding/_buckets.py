"""The batches that rows are shrunk to as others finish: powers of two, so that few programs are compiled."""

import jax
import jax.numpy as jnp

from ..models import AbstractLanguageModel, matrix_dtype
from ..runtime import SMALL_HIDDEN_SIZE


def default_smallest_bucket(target: AbstractLanguageModel) -> int:
    """The smallest batch that is cheaper than one of twice its size: 1 or 2.

    In float32 on CPU a single row reads the weights faster than two do (SmolLM2-135M on two cores, one and two rows: 25
    and 41 ms a plain round, 41 and 58 with three guesses). In bfloat16 a single row of a plain round is computed as
    two, since its own product would be many times slower, and with guesses there is little between them either. On an
    accelerator one costs what two do.
    """
    in_float32_on_cpu = jax.default_backend() == "cpu" and matrix_dtype(target) == jnp.float32
    return 1 if in_float32_on_cpu and target.hidden_size > SMALL_HIDDEN_SIZE else 2


def bucket_for(active: int, smallest: int) -> int:
    """The batch that so many active rows need."""
    return max(1 << (active - 1).bit_length(), smallest)


def shrink_below(rows: int, smallest: int) -> int:
    """The number of active rows at which a smaller bucket becomes possible; 0 if there is none."""
    half = 1 << ((rows - 1).bit_length() - 1) if rows > 1 else 0
    return half if half >= smallest else 0
