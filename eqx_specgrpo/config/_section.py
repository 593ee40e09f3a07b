"""What every section of the configuration has in common."""

from pydantic import BaseModel, BeforeValidator, ConfigDict

# TOML has no null, so that an optional key is unset with the word "none".
NoneWord = BeforeValidator(lambda value: None if value in ("none", "None") else value)


class Section(BaseModel):
    """A frozen table of typed keys."""

    # `strict`: "60" is not a number, and `true` is not 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
