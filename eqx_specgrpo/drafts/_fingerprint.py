"""Which model a draft was trained for, as far as a few of its weights can tell."""

import jax.numpy as jnp
import numpy as np
from ml_dtypes import bfloat16

from ..models import AbstractLanguageModel

_TOKENS, _COORDINATES = 32, 8
# Unrelated models of equal sizes are near 0, and one model is at 1 with itself after any rounding of its weights. RL
# moves them little: the embedded model is at 0.9999 with itself after 80 steps at a learning rate of 2e-4.
SAME_MODEL = 0.9


def fingerprint(target: AbstractLanguageModel) -> str:
    """Some coordinates of some token embeddings, evenly spread, in bfloat16, as hexadecimal digits.

    The same whether the model was loaded in float32 or bfloat16. Embeddings say which token an id stands for as well:
    two vocabularies of the same size differ in them.
    """
    ids = np.linspace(0, target.vocab_size - 1, _TOKENS).astype(np.int32)
    coordinates = np.linspace(0, target.hidden_size - 1, _COORDINATES).astype(np.int32)
    return np.asarray(target.embed(jnp.asarray(ids)))[:, coordinates].astype(bfloat16).tobytes().hex()


def similarity(one: str, other: str) -> float:
    """Cosine of the angle between two fingerprints: 1 for the same model, near 0 for unrelated ones.

    Equality would be too much to ask: a policy moves at every step, and its draft goes with it.
    """
    a, b = (np.frombuffer(bytes.fromhex(text), bfloat16).astype(np.float64) for text in (one, other))
    if a.shape != b.shape:
        raise ValueError(f"fingerprints of {a.size} and {b.size} numbers can't be compared")
    norms = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norms) if norms > 0 else float(np.array_equal(a, b))
