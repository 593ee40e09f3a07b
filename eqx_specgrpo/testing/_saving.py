"""A draft comes back from disk as it was."""

import tempfile
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

from .._errors import CheckpointError
from .._tree_file import read_tree
from ..drafts import draft_kind, load_draft, save_draft
from ._errors import require
from ._pair import Pair


def check_saving(pair: Pair) -> bool:
    """That `save_draft` and `load_draft` give the very same draft.

    **Returns:**

    Whether `load_draft` knows this kind by its name. Where it does not, the weights are read into the draft itself.
    """
    draft = pair.draft
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_draft(folder, draft, pair.target, "target")
        try:
            loaded, by_name = load_draft(folder, pair.target), True
        except CheckpointError:
            if ":" not in draft_kind(draft):
                raise
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
