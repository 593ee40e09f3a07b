"""How long the completions of each prompt were when the run last met it."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..records import read_records
from ..tasks import Example


class PromptLengths:
    """The mean length of each prompt's newest completions, by a hash of the prompt.

    It is made of the run's own `completions.jsonl`, so it is in no checkpoint: that file is cut back to the checkpoint
    when a run is resumed, and what is read from it then is what the run knew.
    """

    def __init__(self):
        self._newest: dict[bytes, tuple[int, int, int]] = {}

    @staticmethod
    def of_run(path: Path) -> "PromptLengths":
        """From a run's `completions.jsonl`, which need not exist."""
        lengths = PromptLengths()
        lengths.add(read_records(path) if path.exists() else ())
        return lengths

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Takes in completions, the oldest first, as `completions.jsonl` has them."""
        for record in records:
            key, step = _key(record["prompt"]), record["step"]
            newest, count, tokens = self._newest.get(key, (step, 0, 0))
            if newest != step:
                count, tokens = 0, 0
            self._newest[key] = (step, count + 1, tokens + record["length"])

    def expected(self, examples: Sequence[Example]) -> list[float]:
        """Of each prompt; `nan` where it was never met."""
        found = [self._newest.get(_key(example.prompt)) for example in examples]
        return [math.nan if entry is None else entry[2] / entry[1] for entry in found]


def _key(prompt: Any) -> bytes:
    # As it is read back: half of a character that a prompt was broken off in is a question mark in the file.
    text = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
    return blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
