"""A file of Python as a module: here, and in the worker processes that it starts."""

import contextlib
import hashlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

# What a worker process finds under the name that a module of a file has in this one.
_STUB = """# Made for worker processes, which import by name what this process loaded from a file.
import sys
from pathlib import Path

from eqx_specgrpo.files import load_module_file

del sys.modules[__name__]
if load_module_file(Path({path!r})).__name__ != __name__:
    raise ImportError({path!r} + " has changed since the program that started this one loaded it")
"""


class OwnFileLoader(SourceFileLoader):
    """Of a file that was named by its path: its module has a name that a program which was not told would not find."""

    def __init__(self, name: str, path: str):
        super().__init__(name, path)
        self._for_workers: tempfile.TemporaryDirectory | None = None

    def serve_workers(self) -> None:
        """Puts a file of the module's name where worker processes look, until this process ends; but in one of them,
        where it is already.

        A process that is started by `multiprocessing` (not forked) is given `sys.path`, and imports by name what it is
        to call. A `Pool` whose workers fail to would start new ones for ever.
        """
        if PathFinder.find_spec(self.name) is not None:
            return
        # Without room for a file workers can't be served; all else goes on.
        with contextlib.suppress(OSError):
            self._for_workers = tempfile.TemporaryDirectory(prefix="eqx_specgrpo_", ignore_cleanup_errors=True)
            stub = Path(self._for_workers.name) / f"{self.name}.py"
            stub.write_text(_STUB.format(path=self.path), encoding="utf-8")
            sys.path.append(self._for_workers.name)


def load_module_file(path: Path) -> ModuleType:
    """The module that a file is: run once, unless its content has changed.

    Whatever it defines can be handed to worker processes: they load the same file. Its folder is looked in for what it
    imports, first while it is run, as `python file.py` would, and last from then on.

    **Raises:**

    `OSError` if the file can't be read, and whatever running it raises.
    """
    # A name of its own: the file mustn't shadow an installed module that happens to be called the same. Of its content
    # too: the same file gives the same classes, as any module does, and one that was edited gives new ones.
    digest = hashlib.blake2b(
        str(path).encode("utf-8", "surrogateescape") + path.read_bytes(), digest_size=4
    ).hexdigest()
    name = re.sub(r"\W", "_", path.stem) + f"_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    loader = OwnFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # a loader was given
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses, among others, look their module up there
    try:
        with import_from(path.parent):
            loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    stay_importable(path.parent)
    loader.serve_workers()
    return module


@contextlib.contextmanager
def import_from(folder: Path) -> Iterator[None]:
    """Lets imports find a folder too, as `python file.py` would; a console script doesn't look where it was started."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def stay_importable(folder: Path) -> None:
    """Lets imports that come later, and those of worker processes, find a folder too: after all others, so that it
    shadows nothing."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
