"""Keys under their old names, as configurations and run folders written before have them."""

from collections.abc import Mapping
from typing import Any

# Options of single kinds of drafts stood directly in [draft].
_NOW_OPTIONS = ("train_length", "num_layers", "model", "min_ngram")


def with_new_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with each key where it is today. What stands there already counts."""
    draft = tree.get("draft")
    if not isinstance(draft, dict):
        return dict(tree)
    options = draft.get("options", {})
    moved = {name: draft[name] for name in _NOW_OPTIONS if name in draft}
    if not moved or not isinstance(options, dict):
        return dict(tree)
    rest = {name: value for name, value in draft.items() if name not in moved}
    return {**tree, "draft": {**rest, "options": {**moved, **options}}}
