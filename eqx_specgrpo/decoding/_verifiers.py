"""The verifiers by name."""

from collections.abc import Mapping

from ..choices import VERIFIERS, described
from ..errors import UserError, did_you_mean
from ._verifier_kind import VerifierKind
from ._verify import AbstractVerifier

# By what a configuration calls them; each is described at the end of its file.
VERIFIER_KINDS: Mapping[str, VerifierKind] = described(__package__ or "", VERIFIERS, "VERIFIER", VerifierKind)


def make_verifier(name: str) -> AbstractVerifier:
    """Returns the verifier with this name. `greedy` is lossless at temperature 0 only.

    **Raises:**

    `UserError` if there is no such verifier.
    """
    if name not in VERIFIER_KINDS:
        raise UserError(f"there is no verifier {name!r}.{did_you_mean(name, VERIFIER_KINDS)}")
    return VERIFIER_KINDS[name].verifier
