"""What top-k, top-p and min-p may be."""

from jaxtyping import Scalar

from ..errors import UserError


def check_truncation(
    top_k: int | None, top_p: float | int | Scalar | None, min_p: float | int | Scalar | None = None
) -> None:
    """Raises `UserError` for a number that is out of range. (What is traced can't be looked at.)"""
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}, but must be at least 1, or None to keep the whole vocabulary")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if isinstance(value, int | float) and not 0 < value <= 1:
            raise UserError(f"{name} is {value}, but must be above 0 and at most 1; leave it out to keep everything")
