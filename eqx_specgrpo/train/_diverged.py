"""What to say when a policy or a draft has diverged, and decoding is where it shows."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..decoding import NonFiniteLogits
from ..errors import UserError


@contextmanager
def naming_the_step(step: int) -> Iterator[None]:
    """Around the rollouts of a step, counted from 1: says what helps in training of logits that are not finite."""
    try:
        yield
    except NonFiniteLogits as error:
        if step == 1:
            raise  # the starting model's, or a draft's that was just made
        raise UserError(
            f"step {step}: the {'draft' if error.of_draft else 'policy'}'s {error.what}. A lower learning rate or a "
            "smaller max_grad_norm usually helps; in bfloat16, try float32"
        ) from error
