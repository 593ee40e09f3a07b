"""What a configuration can name as a verifier."""

from dataclasses import dataclass

from ._verify import AbstractVerifier


@dataclass(frozen=True)
class VerifierKind:
    """Description of a verifier, by which a configuration can name it. Each verifier's file ends with one, `VERIFIER`.

    **Arguments:**

    - `verifier`: the verifier.
    - `summary`: how it checks guesses, in a few words.
    - `greedy_only`: it is lossless at temperature 0 only, so that measurements can choose it, but runs cannot.
    - `draft_invariant`: the tokens are those of plain decoding, whatever was drafted; `None` where it claims neither.
    """

    verifier: AbstractVerifier
    summary: str
    greedy_only: bool = False
    draft_invariant: bool | None = None
