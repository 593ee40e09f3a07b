"""Builds the site of the documentation into build/site, and checks it.

    pip install -e '.[docs]'
    python docs/make_site.py                 # executes the tutorials: some minutes
    python docs/make_site.py --no-execute    # with the outputs that the notebooks have

The pages are prepared in build/site_source, which mkdocs.yml builds from: notebooks become pages with what their cells
printed; README's siblings and the examples, which lie outside of docs/, become pages, and links to them lead there;
formulas become MathML, which browsers draw without a script. A notebook that fails, a warning of mkdocs, or a dead link
ends it with exit code 1.
"""

import argparse
import base64
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from check_site import problems
from latex2mathml.converter import convert
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
DOCS, SOURCE, SITE = ROOT / "docs", ROOT / "build" / "site_source", ROOT / "build" / "site"
COPIED = (".md", ".png", ".webp", ".svg", ".css", ".js")
# Files outside of docs/ that are pages of the site.
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
OUTSIDE |= {"benchmarks/results/README.md": "results.md"}
SECONDS_PER_NOTEBOOK = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-execute", action="store_true", help="take the outputs that the notebooks have")
    parser.add_argument("--keep", type=Path, help="write the executed notebooks to this folder as well")
    options = parser.parse_args()
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    for name, page in OUTSIDE.items():
        if page != "index.md":
            _write(page, _prepared((ROOT / name).read_text(encoding="utf-8"), name))
    for example in sorted((ROOT / "examples").glob("*.py")):
        _write(f"examples/{example.stem}.md", _example(example))
    for path in sorted(path for path in DOCS.rglob("*") if path.suffix in COPIED):
        name = path.relative_to(DOCS).as_posix()
        if path.suffix == ".md":
            _write(name, _prepared(path.read_text(encoding="utf-8"), f"docs/{name}"))
        else:
            (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, SOURCE / name)
    # Progress bars of other libraries ask for a package that a page has no use for.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    for path in sorted((DOCS / "tutorials").glob("*.ipynb")):
        _tutorial(path, execute=not options.no_execute, keep=options.keep)
    start = time.perf_counter()
    # The environment variable takes away a note about MkDocs 2, which this site does not use.
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    subprocess.run(mkdocs, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    print(f"site: built in {time.perf_counter() - start:.0f} s", flush=True)
    found = problems(SITE)
    print("\n".join(found) if found else "site: every link leads somewhere")
    return 1 if found else 0


def _write(name: str, text: str) -> None:
    path = SOURCE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _tutorial(path: Path, *, execute: bool, keep: Path | None) -> None:
    """A notebook as a page; its pictures lie beside it."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    if execute:
        workplace = ROOT / "build" / "tutorials" / path.stem
        shutil.rmtree(workplace, ignore_errors=True)
        workplace.mkdir(parents=True)
        place = {"metadata": {"path": str(workplace)}}
        NotebookClient(
            notebook, timeout=SECONDS_PER_NOTEBOOK, resources=place, coalesce_streams=True, record_timing=False
        ).execute()
        for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
            if output.output_type == "stream":
                output.text = _without_places(output.text)
        print(f"{path.name}: executed in {time.perf_counter() - start:.0f} s", flush=True)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, keep / path.name)
    pieces: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            pieces.append(cell.source)
        elif cell.cell_type == "code" and cell.source.strip():
            pieces.append(_code(cell.source))
            pieces += _printed(cell.outputs, f"{path.stem}_files/{number}", pictures)
    for name, content in pictures.items():
        target = SOURCE / "tutorials" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    text = "\n\n".join(pieces) + "\n"
    _write(f"tutorials/{path.stem}.md", _prepared(text, f"docs/tutorials/{path.name}", made={*pictures}))


def _without_places(text: str) -> str:
    """What is printed, without the places of the machine that it was printed on."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    known = {str(ROOT): ".", str(Path.home()): "~"} | ({cache: "~/.cache/eqx_specgrpo"} if cache else {})
    for place in sorted(known, key=len, reverse=True):
        text = text.replace(place, known[place])
    return text


def _code(source: str) -> str:
    """A cell's code, without the magic words at its top."""
    magic, _, rest = source.partition("\n")
    if magic.startswith("%%bash"):
        return _fenced(rest, "bash")
    if magic.startswith("%%writefile"):
        return _fenced(rest, f'python title="{magic.split()[1]}"')
    return _fenced(source, "python")


def _printed(outputs: list[Any], stem: str, pictures: dict[str, bytes]) -> list[str]:
    """What a cell has put out, as Markdown; its pictures are put into `pictures`."""
    text, pieces = "", []
    for output in outputs:
        data = output.get("data", {})
        if output.output_type == "stream":
            text += output.text
        elif "image/png" in data:
            name = f"{stem}_{len(pictures)}.png"
            pictures[name] = base64.b64decode(data["image/png"])
            pieces.append(f"![{data.get('text/plain', 'a picture')}]({name})")
        else:
            text += data.get("text/plain", "") + "\n"
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)  # colours of a terminal
    return ([_fenced(text.rstrip(), "text")] if text.strip() else []) + pieces


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.strip(chr(10))}\n```"


def _example(path: Path) -> str:
    return f"# `examples/{path.name}`\n\n{_fenced(path.read_text(encoding='utf-8'), 'python')}\n"


def _prepared(text: str, source: str, made: set[str] | None = None) -> str:
    """A page of the site: its links lead to pages of the site, its formulas are MathML. `made` are files beside it."""
    page = _page_of(source)

    def link(match: re.Match[str]) -> str:
        path, hash_, anchor = match[2].partition("#")
        if not path or "://" in path or path.startswith("mailto:") or path in (made or ()):
            return match[0]
        target = os.path.normpath(os.path.join(os.path.dirname(source), path))
        there = os.path.relpath(_page_of(target), os.path.dirname(page) or ".")
        return f"{match[1]}{there}{hash_}{anchor})"

    text = _outside_code(text, lambda prose: re.sub(r"(\]\()([^)\s]+)\)", link, prose))
    return _outside_code(text, _with_mathml, also_spans=True)


def _page_of(source: str) -> str:
    """Where a file of the repository is on the site."""
    if source in OUTSIDE:
        return OUTSIDE[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/").replace(".ipynb", ".md")
    if re.fullmatch(r"examples/\w+\.py", source):
        return source.removesuffix(".py") + ".md"
    raise SystemExit(f"there is a link to {source}, which is no page of the site")


def _outside_code(text: str, change: Callable[[str], str], *, also_spans: bool = False) -> str:
    """Changes what is outside of fenced code, and with `also_spans` of code within a line."""
    code = r"(^ *```.*?^ *```[^\n]*$" + (r"|`[^`\n]+`" if also_spans else "") + ")"
    pieces = re.split(code, text, flags=re.MULTILINE | re.DOTALL)
    return "".join(piece if index % 2 else change(piece) for index, piece in enumerate(pieces))


def _with_mathml(prose: str) -> str:
    """`$...$` and `$$...$$`, as GitHub writes formulas."""

    def formula(latex: str, display: str) -> str:
        html = convert(" ".join(latex.split()), display=display)
        # Characters that Markdown would take for its own.
        texts = str.maketrans({"|": "&#124;", "*": "&#42;", "_": "&#95;", "[": "&#91;", "]": "&#93;"})
        return re.sub(r">[^<]+<", lambda match: match[0].translate(texts), html)

    alone = r"\$\$(.+?)\$\$"
    prose = re.sub(alone, lambda m: f'<span class="formula">{formula(m[1], "block")}</span>', prose, flags=re.DOTALL)
    return re.sub(r"\$([^$\n]+?)\$", lambda m: f"<span>{formula(m[1], 'inline')}</span>", prose)


if __name__ == "__main__":
    sys.exit(main())
