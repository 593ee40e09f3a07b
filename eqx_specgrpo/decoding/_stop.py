"""Ends of rows that only their text shows. The host looks for them between segments, and cuts what came after."""

from abc import abstractmethod
from collections.abc import Sequence

import equinox as eqx
import numpy as np
from jaxtyping import Int

from ..errors import UserError
from ..layout import ROWS, AbstractDeviceMesh
from ..models import Tokenizer
from ._state import DecodeState, cut

_ROUNDS = 8


class AbstractStop(eqx.Module):
    """A condition that ends a row, besides an end-of-sequence token and the length limit.

    It is a function of the row's tokens alone, and a row's random numbers are functions of its positions alone. So a
    row that is found to have ended some rounds ago is cut to what it would have been, and whether it was decoded
    speculatively makes no difference.

    - `most_rounds`: of a segment, so that not too much is decoded in vain; `None`: any number.
    """

    most_rounds: eqx.AbstractVar[int | None]

    @abstractmethod
    def end(self, tokens: Sequence[int]) -> int | None:
        """How many of a row's tokens there are up to its end, the last one included; `None` where it goes on."""


class NoStop(AbstractStop):
    """The condition that never ends a row."""

    most_rounds: int | None = None

    def end(self, tokens: Sequence[int]) -> int | None:
        del tokens
        return None


class StopStrings(AbstractStop):
    """Ends a row at the first token with which its decoded text contains one of these strings.

    **Arguments:**

    - `tokenizer`: gives the text, special tokens left out, as rewards see it.
    - `strings`: none of them empty.
    - `most_rounds`: after so many at the latest the host looks. A row that has ended goes on until then, in vain.
    """

    tokenizer: Tokenizer
    strings: tuple[str, ...]
    most_rounds: int | None

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str], most_rounds: int = _ROUNDS):
        if isinstance(strings, str) or not strings or not all(strings):
            raise UserError(f"the stop strings are {strings!r}: give a list of at least one, and none without a text")
        self.tokenizer, self.strings, self.most_rounds = tokenizer, tuple(strings), most_rounds

    def end(self, tokens: Sequence[int]) -> int | None:
        if not self._is_in(tokens):
            return None
        # The fewest tokens whose text has one of them.
        low, high = 1, len(tokens)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_in(tokens[:middle]) else (middle + 1, high)
        return low

    def _is_in(self, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode(tokens)
        return any(string in text for string in self.strings)


def make_stop(strings: Sequence[str], tokenizer: Tokenizer) -> AbstractStop:
    """Makes the condition that ends a row at one of these texts; `NoStop` without any."""
    return StopStrings(tokenizer, strings) if strings else NoStop()


class StopWatch:
    """Looks at the rows that have grown, once for each length that they are seen at.

    **Arguments:**

    - `stop`: what ends a row.
    - `rows`: of the whole decoding.
    - `mesh`: where they are.
    """

    def __init__(self, stop: AbstractStop, rows: int, mesh: AbstractDeviceMesh):
        self._stop, self._mesh = stop, mesh
        self._seen = np.zeros(rows, np.int32)

    def look(self, row_ids: Int[np.ndarray, " rows"], state: DecodeState) -> DecodeState:
        """The state with the rows cut that have ended; the same object where there is none.

        **Arguments:**

        - `row_ids`: of the rows in it.
        """
        if isinstance(self._stop, NoStop):
            return state
        lengths, tokens = self._mesh.fetch((state.num_new, state.tokens))
        ended, ends = np.zeros(len(lengths), bool), np.ones(len(lengths), np.int32)
        for place in np.flatnonzero(lengths > self._seen[row_ids]):
            end = self._stop.end(tokens[place, : lengths[place]].tolist())
            self._seen[row_ids[place]] = lengths[place]
            if end is not None:
                ended[place], ends[place] = True, end
        return cut(state, *self._mesh.put((ended, ends), ROWS)) if ended.any() else state
