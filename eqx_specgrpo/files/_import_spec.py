"""From `package.module:name` or `path/to/file.py:name`, as users write it, to the object."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UserError, did_you_mean
from ._module_file import OwnFileLoader, import_from, load_module_file, stay_importable
from ._paths import user_path


def is_import_spec(text: str) -> bool:
    """Whether this is written as `package.module:name`, `file.py:name` or `/folder/package.module:name`."""
    source, colon, name = text.rpartition(":")
    return bool(colon) and name.isidentifier() and (source.endswith(".py") or _module_in(source) is not None)


def absolute_spec(spec: str) -> str:
    """The same, found from any working directory: a file by its absolute path, and a module that lies in the folder
    started in, and is not found without it, with that folder in front."""
    source, _, name = spec.rpartition(":")
    if source.endswith(".py"):
        return f"{os.path.abspath(user_path(source))}:{name}"
    folder, module = _module_in(source) or ("", "")
    if folder:
        return spec
    here = Path.cwd()
    lies_here = any((here / f"{module.replace('.', '/')}{end}").is_file() for end in (".py", "/__init__.py"))
    if module and lies_here and not _is_found_without(here, module.partition(".")[0]):
        return f"{(here / module).as_posix()}:{name}"
    return spec


def import_callable(spec: str, what: str, must_be: str) -> Callable[..., Any]:
    """The function or class that `spec` names. Its file is run, or its module imported; once, unless it has changed.

    **Arguments:**

    - `spec`: `package.module:name`, where the module is one that Python finds or that lies in the folder started in;
        `/folder/package.module:name`, where it lies in that folder; or `file.py:name`.
    - `what`: what it is to be, for messages: "reward".
    - `must_be`: "function", for messages.

    **Raises:**

    `UserError` if there is no such file, module or name, if importing it raises, or if it cannot be called.
    """
    source, _, name = spec.rpartition(":")
    module = _load_file(source, what) if source.endswith(".py") else _load_module(source, what, must_be)
    names = vars(module)
    if name not in names:
        callables = {name: value for name, value in names.items() if callable(value) and not name.startswith("_")}
        # What a package imports it offers; what a file imports it uses.
        from_file = source.endswith(".py")
        choices = [name for name, value in callables.items() if not from_file or _is_own(value, module)]
        raise UserError(f"{source} has no {must_be} {name!r}.{did_you_mean(name, choices)}")
    if not callable(names[name]):
        raise UserError(f"{spec!r} is of type {type(names[name]).__name__}, but a {what} must be a {must_be}")
    return names[name]


def import_spec_of(named: Callable[..., Any]) -> str:
    """How `import_callable` finds a class or function again, in another process too: `package.module:Name`, or
    `file.py:Name` if it came from a file, or is defined in the script that is being run."""
    module = sys.modules.get(named.__module__)
    source = named.__module__
    if module is not None:
        found_by = _spec(module)
        if found_by is not None and not isinstance(found_by.loader, OwnFileLoader):
            source = found_by.name  # of `python -m package.module` too, which calls itself __main__
        elif "__file__" in vars(module):
            source = str(Path(inspect.getfile(module)).resolve())
    return absolute_spec(f"{source}:{named.__qualname__}")


_MODULE = re.compile(r"\w+(\.\w+)*")


def _module_in(source: str) -> tuple[str, str] | None:
    """The folder that a module is to be looked for in, empty where none is named, and the module."""
    folder, slash, module = source.rpartition("/")
    if not _MODULE.fullmatch(module) or (slash and not os.path.isabs(f"{folder}/")):
        return None
    return f"{folder}/" if slash else "", module


def _is_found_without(folder: Path, package: str) -> bool:
    """Whether Python finds a package elsewhere than in a folder."""
    before = list(sys.path)
    sys.path[:] = [place for place in before if place and Path(place).resolve() != folder.resolve()]
    try:
        return any(finder.find_spec(package, None) is not None for finder in sys.meta_path)
    finally:
        sys.path[:] = before


def _is_own(value: Any, module: ModuleType) -> bool:
    """Whether a function or class is defined there. What else can be called, a partial for instance, is made there."""
    return not (inspect.isroutine(value) or inspect.isclass(value)) or inspect.getmodule(value) is module


def _spec(module: ModuleType) -> ModuleSpec | None:
    """How it was found; debuggers leave a `__main__` that says nothing about it."""
    return vars(module).get("__spec__")


def _load_file(source: str, what: str) -> ModuleType:
    path = user_path(source).resolve()
    if not path.is_file():
        raise UserError(f"the {what} file {source} doesn't exist (looked at {path}). Check the path.")
    if path == _script():
        return _main()
    try:
        return load_module_file(path)
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and error.filename == str(path):
            raise UserError(f"the {what} file {source} can't be read: {error.strerror}") from error
        raise UserError(f"the {what} file {source} raised on import: {type(error).__name__}: {error}") from error


def _main() -> ModuleType:
    """What Python was started with. Loading its file again would give second copies of its classes."""
    return sys.modules["__main__"]


def _script() -> Path | None:
    source = vars(_main()).get("__file__")
    return None if source is None else Path(source).resolve()


def _load_module(source: str, what: str, must_be: str) -> ModuleType:
    folder, module = _module_in(source) or ("", "")
    if not module:
        raise UserError(f"{source!r} is neither a module such as package.module nor a file ending in .py")
    if folder and not Path(folder).is_dir():
        raise UserError(f"the module {source!r} of a {what} can't be imported: there is no folder {folder}")
    started_as = _spec(_main())
    if started_as is not None and started_as.name == module:
        return _main()
    try:
        look_in = Path(folder) if folder else Path.cwd()
        with import_from(look_in):
            loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the module {source!r} of a {what} can't be imported: {error}. Install it, start in its folder, or "
            f"give the file: file.py:{must_be}"
        ) from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"the module {source!r} of a {what} raised on import: {type(error).__name__}: {error}"
        ) from error
    stay_importable(look_in)
    return loaded
