"""How each parameter is divided over devices: one table by the end of its path, for two layouts.

A path has the names of fields, list positions and dictionary keys, joined by points, such as
`blocks.3.attention.qkv.weight`. The end of it tells the role of a parameter wherever it is: in a policy, in a draft
that has the same layers, in adapters, in gradients, and in the state of an optimizer, whose parts have the parameters'
own structure. What no rule names is whole over `model`; any layout gives the same numbers.
"""

import enum
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

DATA = "data"
MODEL = "model"
WHOLE = PartitionSpec()
ROWS = PartitionSpec(DATA)


class Layout(enum.Enum):
    """Where the pieces of a parameter are.

    - `MASTER`: divided over `data` as well, each device with its own part, where the optimizer works (Rajbhandari et
        al. 2020, "ZeRO", section 5; Zhao et al. 2023, "PyTorch FSDP", section 3).
    - `COPY`: whole in each shard of `data`, where rows are decoded; divided over `model` alone.
    """

    MASTER = "master"
    COPY = "copy"


class Rule(NamedTuple):
    """Parameters whose path ends so are divided over `model` along an axis, where the axis can be divided.

    **Arguments:**

    - `end`: whole names at the end of the path.
    - `axis`: which; negative ones count from the last.
    """

    end: str
    axis: int


# The first product of a pair has its outputs divided and the second its inputs, so that one sum over `model` follows
# each pair (Shoeybi et al. 2019, "Megatron-LM", section 3). Of adapters, the factor on the divided side follows.
RULES = (
    Rule("attention.qkv.weight", 0),
    Rule("attention.qkv.bias", 0),
    Rule("attention.output.weight", 1),
    Rule("mlp.gate_up.weight", 0),
    Rule("mlp.gate_up.bias", 0),
    Rule("mlp.down.weight", 1),
    Rule("embedding", 0),
    Rule("unembedding", 0),
    *(
        Rule(f"{layer}.up", 0)
        for layer in ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj")
    ),
    Rule("o_proj.down", 1),
    Rule("down_proj.down", 1),
)

# Elements; a smaller array is whole in every shard of `data`: to gather it would take longer than to keep it.
_SMALL = 2**10


def parameter_spec(path: str, shape: tuple[int, ...], data: int, model: int, layout: Layout) -> PartitionSpec:
    """How one array is divided.

    **Arguments:**

    - `path`: of it, names joined by points.
    - `shape`: of it, whole.
    - `data`, `model`: sizes of the mesh's axes.
    """
    axes: list[str | None] = [None] * len(shape)
    along = next((rule.axis for rule in RULES if _ends(path, rule.end)), None)
    if model > 1 and along is not None and -len(shape) <= along < len(shape) and shape[along] % model == 0:
        axes[along] = MODEL
    if layout is Layout.MASTER and data > 1 and math.prod(shape) >= _SMALL:
        free = [axis for axis, size in enumerate(shape) if axes[axis] is None and size % data == 0]
        if free:
            axes[max(free, key=lambda axis: shape[axis])] = DATA
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def parameter_specs(tree: PyTree, data: int, model: int, layout: Layout) -> PyTree:
    """As [`parameter_spec`][], of every array (or shape) of a tree; `None` for what is no array."""

    def spec(path: Any, leaf: Any) -> PartitionSpec | None:
        if not eqx.is_array(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct):
            return None
        return parameter_spec(path_name(path), leaf.shape, data, model, layout)

    return jax.tree_util.tree_map_with_path(spec, tree)


def path_name(path: Any) -> str:
    """A path as JAX gives it, in words: names and positions joined by points."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith("." + end)
