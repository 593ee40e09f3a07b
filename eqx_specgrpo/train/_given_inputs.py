"""Fingerprints of what a script has handed over, which is in no file that a resume could compare."""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ..config import Given, RunConfig, is_given
from ..models import AbstractLanguageModel, Tokenizer

GIVEN_WEIGHTS = "handed over, its weights"
_GIVEN_TOKENIZER = "handed over, its tokenizer"
_NUMBERS = 64  # of each array


def given_inputs(config: RunConfig, given: Given) -> dict[str, dict[str, Any]]:
    """By name, as `run_inputs` has them: of functions that no name leads to, if their source can be read, and of the
    policy."""
    inputs = {}
    for number, (name, function) in enumerate(zip(config.reward.functions, given.rewards or (), strict=False), 1):
        source = _source(function) if is_given(name) and not isinstance(function, str) else None
        if source is not None:
            inputs[f"reward {number}"] = {"path": "handed over", "digest": _digest(source.encode("utf-8", "replace"))}
    if given.policy is not None:
        model, tokenizer = given.policy
        inputs[f"model: {GIVEN_WEIGHTS}"] = {"path": "the model that was handed over", "digest": _of_weights(model)}
        inputs[f"model: {_GIVEN_TOKENIZER}"] = {
            "path": "the tokenizer that was handed over",
            "digest": _of_tokenizer(tokenizer),
        }
    return inputs


def _source(function: Callable[..., Any]) -> str | None:
    """The text of a function or of an object's class; `None` where there is none to be read."""
    try:
        return inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):
        return None


def _of_weights(model: AbstractLanguageModel) -> str:
    """Some numbers of every array, evenly spread, in float32."""
    digest = hashlib.blake2b(digest_size=16)
    for array in jax.tree.leaves(eqx.filter(model, eqx.is_array)):
        some = array.reshape(-1)[:: max(array.size // _NUMBERS, 1)]
        digest.update(str(array.shape).encode() + np.asarray(some, np.float32).tobytes())
    return digest.hexdigest()


def _of_tokenizer(tokenizer: Tokenizer) -> str:
    return _digest(repr((tokenizer.backend.to_str(), tokenizer.chat_template, tokenizer.eos_ids)).encode())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
