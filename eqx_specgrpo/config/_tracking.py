"""The names of trackers in a configuration."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from ..choices import TRACKERS
from ..errors import did_you_mean


def _from_text(value: Any) -> Any:
    """`--set tracking=wandb,tensorboard` needs no brackets."""
    if not isinstance(value, str):
        return value
    return [] if value == "none" else [name.strip() for name in value.split(",") if name.strip()]


def _known(names: list[str]) -> list[str]:
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"tracking names {name!r}: there is no such tracker.{did_you_mean(name, TRACKERS)}")
    return list(dict.fromkeys(names))


TrackerNames = Annotated[list[str], BeforeValidator(_from_text), AfterValidator(_known)]
