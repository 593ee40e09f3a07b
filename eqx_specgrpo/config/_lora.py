"""`[lora]`: adapters in place of full weights, and the policy that a run starts with."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray
from pydantic import Field, field_validator

from ..errors import CheckpointError, UserError
from ..files import user_path
from ..models import (
    ALL_LINEAR,
    AbstractLanguageModel,
    AdaptedTransformer,
    Adapters,
    Tokenizer,
    Transformer,
    TransformerConfig,
    describe_adapter,
    load_adapter,
)
from ._section import Section

_ADAPTER_WEIGHTS = 0x6C6F7261  # apart from the steps' keys, which are folded in by small numbers
_FULL_RATE, _RATIO = 1e-6, 10


class LoRAConfig(Section):
    """Low-rank adapters, which are trained in place of the model's weights; see `docs/lora.md`. Names are PEFT's."""

    rank: int = Field(default=0, ge=0, description="rank of the adapters; 0: no adapters, all weights are trained")
    alpha: float = Field(
        default=32.0, gt=0, description="scale of the adapters: their product is multiplied by alpha / rank"
    )
    targets: str | list[Annotated[str, Field(min_length=1)]] = Field(
        default=ALL_LINEAR,
        description='layers with adapters: "all-linear", a list such as ["q_proj", "v_proj"], or a regular expression '
        "for "
        "whole names",
    )
    dropout: float = Field(
        default=0.0, description="only 0 is supported, because rollouts and updates use the same weights"
    )
    save_merged: bool = Field(
        default=False,
        description="write the merged model into policy/ as well, as a folder that loads without its base",
    )

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout != 0:
            raise ValueError(
                f"lora.dropout = {dropout}: only 0 is supported, because rollouts and updates have the same merged "
                "weights: leave it out"
            )
        return dropout

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, targets: str | list[str]) -> str | list[str]:
        if not targets:
            raise ValueError(f'lora.targets is empty: name layers, such as ["q_proj", "v_proj"], or "{ALL_LINEAR}"')
        return targets

    def fresh(self, config: TransformerConfig, *, key: PRNGKeyArray) -> Adapters:
        """Makes new adapters. Their product is zero, so that the model computes what it computes without them.

        **Raises:**

        `UserError` if the targets match nothing, or the rank is too large.
        """
        return Adapters.fresh(config, self.rank, self.alpha, self.targets, key=key)


def with_saved_adapter(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Completed by what a saved adapter says of itself: without a `lora.rank`, it is trained on."""
    adapter, lora = tree.get("model", {}).get("adapter"), tree.get("lora", {})
    if not isinstance(adapter, str) or adapter in ("none", "None") or "rank" in lora:
        return dict(tree)
    try:
        return {**tree, "lora": {**describe_adapter(user_path(adapter)), **lora}}
    except CheckpointError:
        return dict(tree)  # Whoever loads it says what is wrong.


Load: TypeAlias = Callable[[str], tuple[Transformer, Tokenizer]]


def starting_policy(
    load: Load, adapter: str | None, lora: LoRAConfig, base_dtype: str, seed: int
) -> tuple[AbstractLanguageModel, Tokenizer]:
    """What a run trains, and its tokenizer.

    **Arguments:**

    - `load`: the model with its matrices in a dtype, and its tokenizer.
    - `adapter`: a folder to start from, or `None`.
    - `lora`: with a rank of 0, an adapter is merged into the weights, and all of them are trained.
    - `base_dtype`: of the base's matrices, if there are adapters to train.
    - `seed`: for fresh adapters.

    **Raises:**

    `UserError` if the model or the adapter can't be loaded, or does not fit.
    """
    if lora.rank == 0:
        return merged_policy(load, adapter)
    base, tokenizer = load(base_dtype)
    if adapter is None:
        key = jr.fold_in(jr.key(seed), _ADAPTER_WEIGHTS)
        return AdaptedTransformer(base, lora.fresh(base.config, key=key)), tokenizer
    check_saved_adapter(adapter, lora)
    return AdaptedTransformer(base, load_adapter(user_path(adapter), base)), tokenizer


def merged_policy(load: Load, adapter: str | None) -> tuple[Transformer, Tokenizer]:
    """A model, with an adapter merged into it where one is named, and its tokenizer. Float32."""
    model, tokenizer = load("float32")
    if adapter is not None:
        adapters = load_adapter(user_path(adapter), model)
        model = AdaptedTransformer(model, adapters).merged(jnp.float32)
    return model, tokenizer


def check_saved_adapter(adapter: str, lora: LoRAConfig) -> None:
    """Raises `UserError` if there is no adapter in the folder, or another than the configuration says. Reads no
    tensors."""
    saved = describe_adapter(user_path(adapter))
    stated = {"rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets}
    for name in saved if lora.rank else ():
        same = _as_set(saved[name]) == _as_set(stated[name])
        if not same and not (name == "targets" and lora.targets == ALL_LINEAR):
            raise UserError(
                f"the adapter in {adapter} has {name} {saved[name]}, but lora.{name} is {stated[name]}: leave out the "
                "keys of [lora] to train it on, or set lora.rank=0 to merge it and train all weights"
            )


def _as_set(value: Any) -> Any:
    return set(value) if isinstance(value, list) else value


def lora_advice(lora: LoRAConfig, learning_rate: float) -> str | None:
    """Returns a note for a run that trains adapters at the default learning rate of full weights; else `None`.

    ??? cite

        Schulman et al. 2025, "LoRA without regret", [thinkingmachines.ai/blog/lora](https://thinkingmachines.ai/blog/lora).
    """
    if lora.rank == 0 or learning_rate != _FULL_RATE:
        return None
    return (
        f"grpo.learning_rate is {_FULL_RATE:g}, TRL's default for full weights; adapters learn best at about "
        f"{_RATIO} times the rate of full weights: --set grpo.learning_rate={_RATIO * _FULL_RATE:g}"
    )
