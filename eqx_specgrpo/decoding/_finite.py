"""What is said where logits are not finite numbers. The device only keeps a flag a row; the rest is found here."""

import numpy as np
from jaxtyping import Int

from ..errors import UserError
from ..layout import AbstractDeviceMesh
from ._state import DecodeState


class NonFiniteLogits(UserError):
    """Raised where logits are not finite numbers, so that no token can be drawn from them.

    **Attributes:**

    - `of_draft`: whether the logits are the draft's; else they are the model's.
    - `what`: which of them.
    """

    of_draft: bool
    what: str

    def __init__(self, what: str, advice: str, *, of_draft: bool):
        super().__init__(f"the {'draft' if of_draft else 'model'}'s {what}. {advice}")
        self.of_draft = of_draft
        self.what = what


def require_finite(
    mesh: AbstractDeviceMesh, state: DecodeState, row_ids: Int[np.ndarray, " rows"], samples: int
) -> None:
    """Raises `NonFiniteLogits` if a row was drawn from logits that were no finite numbers, the model's or the draft's.

    **Arguments:**

    - `mesh`: where the state is.
    - `row_ids`: of the state's rows.
    - `samples`: completions a prompt, which tells the prompt of a row.
    """
    finite = mesh.fetch(state.finite)
    if finite.all():
        return
    logprobs, num_new = mesh.fetch((state.logprobs, state.num_new))
    place = int(np.argmin(finite))
    row = int(row_ids[place])
    where = f"completion {row % samples} of prompt {row // samples} (counted from 0)"
    broken = ~np.isfinite(logprobs[place, : num_new[place]])
    if broken.any():
        token = int(np.argmax(broken))
        raise NonFiniteLogits(
            f"logits for token {token} of {where} are not finite numbers, so no token can be drawn",
            "Weights that are NaN or infinite do that (is the checkpoint damaged? get it anew), and so do numbers too "
            "large for the dtype computed in (use float32)",
            of_draft=False,
        )
    raise NonFiniteLogits(
        f"logits in {where} are not finite numbers, so its guesses can't be checked",
        "Is the saved draft damaged? Train it anew, or decode without it",
        of_draft=True,
    )
