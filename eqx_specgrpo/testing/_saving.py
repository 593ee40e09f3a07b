"""A draft comes back from disk as it was."""

import json
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

from ..drafts import draft_kind, load_draft, save_draft
from ..errors import CheckpointError, UserError
from ..files import read_tree
from ._errors import require
from ._pair import Pair


def check_saving(pair: Pair, kind: str | None = None) -> bool:
    """That `save_draft` and `load_draft` give the very same draft.

    **Arguments:**

    - `kind`: for a class of your own, how it is found, as for [`eqx_specgrpo.drafts.save_draft`][].

    **Returns:**

    Whether `load_draft` knows this kind by its name. Where it does not, the weights are read into the draft itself.

    **Raises:**

    `ConformanceError` if it can't be loaded, or comes back as something else.
    """
    draft = pair.draft
    require(
        json.dumps(draft.provenance()) == json.dumps(draft.provenance()),
        f"{pair.name}.provenance() says something else at every call: it has to say what the draft is made of",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_draft(folder, draft, pair.target, "target", kind)
        try:
            loaded, by_name = load_draft(folder, pair.target), True
        except CheckpointError as error:
            # A class in a script or a notebook, or one that wants other arguments, can't be made by its name.
            require(
                kind is None and ":" in draft_kind(draft) and isinstance(error.__cause__, UserError),
                f"{pair.name} was saved and can't be loaded again: {error}",
            )
            loaded, by_name = read_tree(folder / "draft.safetensors", draft, "Save the draft again")[0], False
    is_same = jax.tree.structure(loaded) == jax.tree.structure(draft) and all(
        not eqx.is_array(a)
        and a == b
        or eqx.is_array(a)
        and a.dtype == b.dtype
        and np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(draft), strict=True)
    )
    require(
        is_same,
        f"{pair.name} comes back from disk as another draft: does provenance() tell all that the constructor needs?",
    )
    return by_name
