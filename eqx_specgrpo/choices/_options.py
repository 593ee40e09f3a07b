"""The options of what a configuration names: the keyword arguments of the function that makes it."""

import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from ..errors import UserError, did_you_mean
from ._words import permitted_values


@dataclass(frozen=True)
class Option:
    """One keyword argument.

    **Arguments:**

    - `name`: its name.
    - `annotation`: what it must be; `Any` where the function does not say.
    - `default`: what it is where it is not given; `inspect.Parameter.empty` where it has to be.
    - `description`: what the function's docstring says of it under **Arguments:**; empty where that is nothing.
    """

    name: str
    annotation: Any
    default: Any
    description: str

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty

    @property
    def may_be_unset(self) -> bool:
        """Whether `None` is a value of it, which a configuration writes as "none"."""
        return NoneType in get_args(self.annotation)

    @property
    def is_place(self) -> bool:
        """Whether it names a file or a folder, or may do so: `Path` is in its annotation."""
        return Path in (self.annotation, *get_args(self.annotation))


@dataclass(frozen=True)
class Options:
    """What a function takes besides what it is given anyway.

    **Arguments:**

    - `of`: what they are options of, for messages: "the task 'arithmetic'".
    - `prefix`: of the keys under which they are set, as in "task.".
    - `known`: the options that the function names.
    - `given`: arguments that are no options.
    - `open_ended`: whether it takes further ones, as `**options`, and checks them itself.
    """

    of: str
    prefix: str
    known: tuple[Option, ...]
    given: tuple[str, ...]
    open_ended: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Those that the function names."""
        return tuple(option.name for option in self.known)

    def read(self, values: Mapping[str, Any], *, complete: bool = True) -> dict[str, Any]:
        """The values as the function wants them: checked against its annotations, "none" as `None`.

        **Arguments:**

        - `values`: as TOML or JSON has them.
        - `complete`: also demand those without a default.

        **Raises:**

        `UserError` for an option that there is not, one that is missing, or a value of the wrong type or out of range.
        """
        known = {option.name: option for option in self.known}
        read = {}
        for name, value in values.items():
            if name in self.given:
                raise UserError(f"{name!r} is no option of {self.of}, it is given beside the options")
            if name not in known:
                if self.open_ended:
                    read[name] = value
                    continue
                hint = did_you_mean(name, known) or " It has no options."
                raise UserError(f"{self.of} has no option {name!r}.{hint}")
            read[name] = _read(known[name], value, self.of)
        missing = [option for option in self.known if option.is_required and option.name not in values]
        if missing and complete:
            option = missing[0]
            what = f" ({option.description})" if option.description else ""
            raise UserError(f"{self.of} needs its option {option.name!r}{what}: set {self.prefix}{option.name}")
        return read

    def with_absolute_places(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values, with the place of what is there made absolute in the options that name places."""
        places = {option.name for option in self.known if option.is_place}
        return {name: absolute_place(value) if name in places else value for name, value in values.items()}


def absolute_place(text: Any) -> Any:
    """The absolute path of a file or folder that is there. All else is returned as it is: the name of a model to be
    downloaded, for instance."""
    if not isinstance(text, str) or not text:
        return text
    try:
        path = Path(text).expanduser()
        return os.path.abspath(path) if path.exists() else text
    except (OSError, RuntimeError):  # no such home, or no path that the system takes: whoever opens it says so
        return text


def options_of(make: Callable[..., Any], of: str, prefix: str, *, given: Sequence[str] = (), first: int = 0) -> Options:
    """The options of what a function or class makes.

    **Arguments:**

    - `make`: the function or class.
    - `of`, `prefix`: as for `Options`.
    - `given`: names of arguments that are no options.
    - `first`: how many arguments from the first on are none either, whatever their names.
    """
    try:
        parameters = list(inspect.signature(make, eval_str=True).parameters.values())
    except NameError:
        # Postponed annotations that can't be evaluated here: nothing is known of the types.
        parameters = [
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in inspect.signature(make).parameters.values()
        ]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    beside = (*(parameter.name for parameter in parameters[:first] if parameter.kind not in variadic), *given)
    descriptions = _descriptions(make)
    own = [parameter for parameter in parameters if parameter.name not in beside and parameter.kind not in variadic]
    return Options(
        of,
        prefix,
        tuple(
            Option(
                parameter.name,
                Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation,
                parameter.default,
                descriptions.get(parameter.name, ""),
            )
            for parameter in own
        ),
        beside,
        any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters),
    )


# "- `a`, `b`: what they are", over several lines.
_ARGUMENT = re.compile(r"^- ((?:`\w+`(?:, )?)+): (.*(?:\n(?!- )[^\n]+)*)", re.MULTILINE)


def _descriptions(make: Callable[..., Any]) -> dict[str, str]:
    """What stands under **Arguments:** in the docstring, each on one line."""
    make = make.func if isinstance(make, functools.partial) else make
    texts = [inspect.getdoc(make) or ""]
    if inspect.isclass(make):
        texts.append(inspect.getdoc(make.__init__) or "")
    found = {}
    for text in texts:
        _, _, arguments = text.partition("**Arguments:**")
        arguments = re.split(r"\n\s*\*\*", arguments)[0]
        for names, description in _ARGUMENT.findall(arguments):
            for name in re.findall(r"\w+", names):
                found[name] = " ".join(description.split()).rstrip(".")
    return found


def _read(option: Option, value: Any, of: str) -> Any:
    import pydantic  # `specgrpo --help` imports this package, and does not wait for it

    if value == "none" and option.may_be_unset:
        return None
    config = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)
    try:
        # As JSON: there a list may be a tuple, and text a path, and yet "60" is no number.
        return pydantic.TypeAdapter(option.annotation, config=config).validate_json(json.dumps(value, default=str))
    except pydantic.ValidationError as error:
        words = permitted_values(option.annotation)
        reasons = " or ".join(dict.fromkeys(item["msg"] for item in error.errors()))
        raise UserError(
            f"the option {option.name!r} of {of} can't be {value!r}: {f'it must be {words}' if words else reasons}"
        ) from error
