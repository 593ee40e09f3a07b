class ConformanceError(AssertionError):
    """A draft or a verifier does not keep what the decoder relies on; the message names the case."""


def require(condition: bool, message: str) -> None:
    """Raises `ConformanceError` unless a condition holds."""
    if not condition:
        raise ConformanceError(message)
