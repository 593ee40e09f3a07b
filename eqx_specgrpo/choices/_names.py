"""What a configuration chooses among by name: each name, and the file of its station that ends with its description.

A new draft, verifier, loss, task, reward or tracker is such a file, and a line here. Only text stands here, so that the
command line can list the names without waiting for JAX.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

DRAFTS: Mapping[str, str] = MappingProxyType(
    {
        "medusa": "_medusa",
        "hydra": "_hydra",
        "markov": "_markov",
        "eagle": "_eagle",
        "model": "_model",
        "layer_skip": "_layer_skip",
        "ngram": "_ngram",
        "none": "_none",
    }
)
VERIFIERS: Mapping[str, str] = MappingProxyType(
    {
        "rejection": "_rejection",
        "block": "_block",
        "coupled": "_coupled",
        "greedy": "_greedy_match",
    }
)
DRAFT_LOSSES: Mapping[str, str] = MappingProxyType(
    {
        "kl": "_forward_kl",
        "reverse_kl": "_reverse_kl",
        "tv": "_total_variation",
        "hybrid": "_lk_hybrid",
        "ce_tv": "_cross_entropy_tv",
        "e2e_tv": "_end_to_end_tv",
    }
)
TASKS: Mapping[str, str] = MappingProxyType(
    {
        "arithmetic": "_arithmetic",
        "FILE.jsonl": "_jsonl",
        "FILE.json": "_json",
        "FILE.csv": "_csv",
        "FILE.parquet": "_parquet",
        "FOLDER/": "_saved_dataset",
        "org/name": "_hub_dataset",
        "mixture": "_mixture",
        "reasoning_gym:NAME": "_reasoning_gym",
    }
)
REWARDS: Mapping[str, str] = MappingProxyType(
    {
        "arithmetic": "_arithmetic_reward",
        "running_totals": "_running_totals",
        "math": "_math_reward",
        "think_format": "_think_format",
        "soft_overlong(L, C)": "_soft_overlong",
    }
)
TRACKERS: Mapping[str, str] = MappingProxyType(
    {
        "tensorboard": "_tensorboard",
        "wandb": "_wandb",
        "trackio": "_trackio",
        "mlflow": "_mlflow",
    }
)


def listed(names: Iterable[str], last: str = "or") -> str:
    """The names in a row, as in "kl, tv or hybrid"."""
    *first, final = names
    return f"{', '.join(first)} {last} {final}" if first else final
