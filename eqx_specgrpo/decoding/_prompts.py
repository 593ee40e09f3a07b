"""Where the keys and values of prompts are while rows are decoded: in each row's cache, or once for all its rows."""

from abc import abstractmethod
from typing import cast

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Int

from ..models import AbstractLanguageModel, Cache, KVCache, SharedPromptCache, Transformer, platform_of, take_rows


class AbstractPromptStore(eqx.Module):
    """What of the caches is not the rows' own. It does not change while rows are decoded."""

    @abstractmethod
    def attach(self, cache: Cache) -> Cache:
        """What the target's pass takes, from the rows' own part."""

    @abstractmethod
    def detach(self, cache: Cache) -> Cache:
        """The rows' own part of what the target's pass returned."""

    @abstractmethod
    def take(self, cache: Cache, rows: Int[Array, " kept"], slots: int) -> Cache:
        """Whole caches of some of the rows, prompts included.

        **Arguments:**

        - `slots`: of a whole cache.
        """

    @abstractmethod
    def slots(self, new: int, whole: int) -> int:
        """Of the rows' own part, which has `new` slots behind its prompt, or `whole` with it."""


class PromptsInRows(AbstractPromptStore):
    """Each row's cache begins with its prompt."""

    def attach(self, cache):
        return cache

    def detach(self, cache):
        return cache

    def take(self, cache, rows, slots):
        del slots
        return take_rows(cache, rows)

    def slots(self, new, whole):
        del new
        return whole


class PromptsOnce(AbstractPromptStore):
    """Each prompt is stored, and read, once for all of its rows, which are consecutive and as many for each.

    **Arguments:**

    - `prompts`: a cache a layer, a row a prompt.
    - `lengths`: of the prompts.
    """

    prompts: tuple[KVCache, ...]
    lengths: Int[Array, " prompts"]

    def attach(self, cache):
        layers = zip(self.prompts, cast(tuple[KVCache, ...], cache), strict=True)
        return tuple(SharedPromptCache(prompts, self.lengths, rows) for prompts, rows in layers)

    def detach(self, cache):
        return tuple(layer.rows for layer in cast(tuple[SharedPromptCache, ...], cache))

    def take(self, cache, rows, slots):
        layers = cast(tuple[SharedPromptCache, ...], self.attach(cache))
        return tuple(layer.unshared(rows).with_slots(slots) for layer in layers)

    def slots(self, new, whole):
        del whole
        return new


# On an accelerator attention to prompts that are stored once takes about four kernels a layer more: 8 µs, in which 2 to
# 5 TB/s of memory bandwidth read so many bytes. An estimate from the compiled programs, not a measurement.
_CHEAP_COPIES = 16 << 20


def share_prompts(
    target: AbstractLanguageModel,
    *,
    prompts: int,
    width: int,
    samples: int,
    waiting: int,
    cache_dtype: DTypeLike,
) -> bool:
    """Whether prompts are stored once for all of their rows.

    They can be where each has several rows, all of which start at once, and the target is a `Transformer`, whose layers
    leave it to the cache how to attend. A CPU reads less so. An accelerator has more to launch, so there copies that
    are read quickly are preferred.

    **Arguments:**

    - `prompts`, `width`: how many there are, and their padded length.
    - `samples`: rows of a prompt.
    - `waiting`: rows that start later.
    - `cache_dtype`: of keys and values.
    """
    if samples == 1 or waiting > 0 or not isinstance(target, Transformer):
        return False
    config = target.config
    copied = (samples - 1) * prompts * width * 2 * config.num_kv_heads * config.head_dim
    return platform_of(target) == "cpu" or copied * jnp.dtype(cache_dtype).itemsize > _CHEAP_COPIES
