"""House rules that a machine can check: imports point one way, classes are abstract or final, modules stay small."""

import ast
import functools as ft
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import pytest
from mutations import MUTATIONS

import eqx_specgrpo

TESTS = Path(__file__).parent
PACKAGE = Path(inspect.getfile(eqx_specgrpo)).parent
FILES = sorted(PACKAGE.rglob("*.py"))
INITS = [path for path in FILES if path.name == "__init__.py" and path.parent != PACKAGE]

# What each station may import, besides itself. A folder and a file at the top of the package are both stations.
BOTTOM = {"_types", "choices", "errors", "files", "runtime", "sampling"}
STATIONS = {"models", "layout", "drafts", "decoding", "tasks", "grpo", "distill"}
ALLOWED = {
    "_types": {"errors"},
    "choices": {"errors"},
    "errors": set(),
    "files": {"errors"},
    "runtime": {"errors"},
    "sampling": {"errors"},
    "models": BOTTOM,
    "layout": BOTTOM | {"models"},
    "drafts": BOTTOM | {"models"},
    "decoding": BOTTOM | {"models", "layout", "drafts"},
    "tasks": BOTTOM,
    "grpo": BOTTOM | {"models", "layout"},
    "distill": BOTTOM | {"models", "layout", "drafts"},
    "records": BOTTOM | STATIONS,
    "config": BOTTOM | STATIONS | {"records"},
    "testing": BOTTOM | STATIONS | {"records", "config"},
    "evaluation": BOTTOM | STATIONS | {"records", "config"},
    "train": BOTTOM | STATIONS | {"records", "config", "testing", "evaluation"},
    "bench": BOTTOM | STATIONS | {"records", "config", "testing", "evaluation", "train"},
    "_cli_options": BOTTOM,
    "_cli_devices": BOTTOM | {"_cli_options", "config", "train"},
    "_cli_eval": BOTTOM | {"_cli_options", "config", "train"},
    "_cli_report": BOTTOM | {"records"},
    "_cli_generate": BOTTOM | {"_cli_options", "train"},
    "cli": BOTTOM
    | {"_cli_options", "_cli_devices", "_cli_eval", "_cli_report", "_cli_generate"}
    | STATIONS
    | {"records", "config", "testing", "evaluation", "train", "bench"},
    "__init__": BOTTOM | STATIONS | {"records", "config", "testing", "evaluation", "train", "bench"},
}
LONGEST_FILE = 400


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def station_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@ft.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names of what a file imports, wherever in the file, and the lines."""
    folder = ("eqx_specgrpo", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import train` imports a station; `from .train import run` a name out of one. Both give both forms.
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    station = station_of(path)
    assert station in ALLOWED, f"{station} is a new station: say in ALLOWED what it may import"
    wrong = []
    for module, line in imported_modules(path):
        first, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if first == "eqx_specgrpo" and other in ALLOWED and other not in ALLOWED[station] | {station}:
            wrong.append(f"line {line} imports {other}")
    assert not wrong, f"{name_of(path)}: {'; '.join(wrong)}; {station} may import {sorted(ALLOWED[station])}"


def test_the_import_check_would_notice():
    """Both relative and absolute imports, and those inside functions, are seen."""
    found = {module for module, _ in imported_modules(PACKAGE / "cli.py")}
    assert {"eqx_specgrpo.errors", "eqx_specgrpo.config", "eqx_specgrpo.train"} <= found
    found = {module for module, _ in imported_modules(PACKAGE / "decoding" / "_round.py")}
    assert {"eqx_specgrpo.drafts", "eqx_specgrpo.decoding._verify", "jax.numpy"} <= found
    below = {other for name, allowed in ALLOWED.items() if name in STATIONS for other in allowed}
    assert not below & {"records", "config", "testing", "evaluation", "train", "bench", "cli"}


def all_modules() -> list[type[eqx.Module]]:
    """Every `eqx.Module` class that the package defines, private ones included."""
    classes = {}
    for info in pkgutil.walk_packages([str(PACKAGE)], "eqx_specgrpo."):
        for value in vars(importlib.import_module(info.name)).values():
            if inspect.isclass(value) and issubclass(value, eqx.Module) and value.__module__.startswith("eqx_specgrpo"):
                classes[value.__module__, value.__qualname__] = value
    return list(classes.values())


def abstract_members(cls: type) -> set[str]:
    """Names of abstract methods and of `AbstractVar`s that a class leaves to its subclasses."""
    kinds = ("__abstractmethods__", "__abstractvars__", "__abstractclassvars__")
    return {name for kind in kinds for name in getattr(cls, kind, ())}


def test_classes_are_abstract_or_final():
    classes = all_modules()
    names = {cls.__name__ for cls in classes}
    assert {"AbstractDraft", "MedusaHeads", "Rejection", "Transformer", "Arithmetic", "ForwardKL"} <= names
    for cls in classes:
        where = f"{cls.__module__}.{cls.__qualname__}"
        is_abstract = cls.__name__.lstrip("_").startswith("Abstract")
        for other in classes:
            if other is not cls and issubclass(other, cls):
                assert is_abstract, f"{other.__qualname__} subclasses the concrete class {where}: wrap it instead"
        if is_abstract:
            assert abstract_members(cls), f"{where} has nothing abstract: drop the prefix, or make a member abstract"
        else:
            assert not abstract_members(cls), f"{where} is abstract in {abstract_members(cls)}: call it Abstract..."


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_dynamic_attributes_and_no_postponed_annotations(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Name):
            assert node.id not in ("hasattr", "getattr", "setattr"), f"{name_of(path)}, line {node.lineno}: {node.id}"
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            names = [alias.name for alias in node.names]
            assert "annotations" not in names, f"{name_of(path)}: shapes can't be checked at run time with it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{name_of(path)} has {lines} lines: split it"


def definition(path: Path, name: str) -> tuple[Path, ast.stmt]:
    """The statement that binds a name that a file imports or defines, and the file where it is."""
    for node in parse(path).body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef() if node.name == name:
                return path, node
            case ast.AnnAssign(target=ast.Name(id=assigned)) if assigned == name:
                return path, node
            case ast.Assign() if any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
                return path, node
            case ast.ImportFrom() if node.level:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                        source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
                        return definition(source, alias.name)
    raise AssertionError(f"{name_of(path)} has no {name}")


@pytest.mark.parametrize("path", INITS, ids=name_of)
def test_public_names_are_documented(path):
    for node in parse(path).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        assert isinstance(node, ast.ImportFrom) and node.level, f"{name_of(path)}, line {node.lineno}: only re-exports"
        for alias in node.names:
            assert alias.asname == alias.name, f"{name_of(path)}: write `{alias.name} as {alias.name}`"
            where, source = definition(path, alias.name)
            # A type alias can't have a docstring; a comment beside it is for reviewers to ask for.
            if isinstance(source, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                assert ast.get_docstring(source), f"{alias.name}, in {name_of(where)}, has no docstring"


def test_headline_names():
    """What type checkers see at the top of the package is what there is, from the same places, and documented."""
    path = PACKAGE / "__init__.py"
    (seen,) = (node for node in parse(path).body if isinstance(node, ast.If))
    imports = [node for node in seen.body if isinstance(node, ast.ImportFrom)]
    declared = {alias.name: node.module for node in imports for alias in node.names}
    assert declared == eqx_specgrpo._HOME_OF
    for name, home in declared.items():
        assert getattr(eqx_specgrpo, name) is getattr(importlib.import_module(f"eqx_specgrpo.{home}"), name)
        source = PACKAGE / home / "__init__.py" if (PACKAGE / home).is_dir() else PACKAGE / f"{home}.py"
        assert ast.get_docstring(definition(source, name)[1]), f"{name} has no docstring"  # pyright: ignore
    with pytest.raises(AttributeError, match="no attribute 'Medusa'"):
        eqx_specgrpo.Medusa  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("jax", "equinox", "pydantic")
    code = f"import sys, eqx_specgrpo, eqx_specgrpo.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_fault_of_the_mutations_has_a_place_and_a_test():
    """`mutations.py` takes minutes and is run now and then: what it names has to stand all the same."""
    for mutation in MUTATIONS:
        assert (PACKAGE / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, mutation.name
        file, _, test = mutation.test.partition("::")
        assert f"def {test.partition('[')[0]}" in (TESTS / file).read_text(encoding="utf-8"), mutation.name
