"""What a configuration can name as a verifier."""

from dataclasses import dataclass

from ._verify import AbstractVerifier


@dataclass(frozen=True)
class VerifierKind:
    """A verifier that a configuration can name. It stands as `VERIFIER` at the end of the verifier's file.

    **Arguments:**

    - `verifier`: it itself.
    - `summary`: how it checks guesses, in a few words.
    - `greedy_only`: it is lossless at temperature 0 alone, so that no run can choose it, only a measurement.
    - `draft_invariant`: the tokens are those of plain decoding, whatever was drafted; `None` where it claims neither.
    """

    verifier: AbstractVerifier
    summary: str
    greedy_only: bool = False
    draft_invariant: bool | None = None
