"""Looks for dead links in a built site, and for Markdown that was not understood.

    python docs/check_site.py build/site

mkdocs checks the links that are written in pages. This looks at what came out: links between pages, to anchors in them,
to pictures, scripts and styles, also those that a theme or a docstring made.
"""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The anchors of a page, what it links to, and the text of its paragraphs."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = {"", "__toc", "top"}
        self.links: list[str] = []
        self.loads: set[str] = set()  # what a browser fetches by itself
        self.paragraphs: list[str] = []
        self._in_paragraph = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        self.links += [value for name in ("href", "src") if (value := values.get(name)) and tag != "base"]
        kinds = (values.get("rel") or "").split()
        if tag == "link" and {"stylesheet", "icon", "preload", "preconnect"} & {*kinds}:
            self.loads.add(values.get("href") or "")
        elif source := values.get("src"):
            self.loads.add(source)
        if tag == "p":
            self._in_paragraph = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_paragraph = self._in_paragraph and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._in_paragraph:
            self.paragraphs[-1] += data


def problems(site: Path) -> list[str]:
    """One sentence for each dead link and each piece of Markdown that was not understood."""
    site = site.resolve()
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found: list[str] = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads:
                    found.append(f"{name} loads {link}: the site would not work without a network")
                continue
            base = site if parts.path.startswith("/") else path.parent
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            if target.is_dir():
                target = target / "index.html"
            if not target.exists():
                found.append(f"{name} links to {link}: there is no such file")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name} links to {link}: there is no such anchor")
        for paragraph in page.paragraphs:
            if mark := re.search(r"\n *(- |\d+\. |\|.*\|$|```)", paragraph, re.MULTILINE):
                near = " ".join(paragraph[max(0, mark.start() - 60) : mark.end() + 20].split())
                found.append(f"{name}: a list, a table or code was not understood, near {near!r}")
            if left := re.search(r"\]\[|\]\(|\$\$", paragraph):
                near = " ".join(paragraph[max(0, left.start() - 60) : left.end() + 20].split())
                found.append(f"{name}: Markdown is left over, near {near!r}")
    return found + _not_searched(site, pages)


def _not_searched(site: Path, pages: dict[Path, _Page]) -> list[str]:
    """Pages that the search does not know of."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    known = {entry["location"].partition("#")[0] for entry in index["docs"]}
    names = {path.relative_to(site).as_posix() for path in pages} - {"404.html"}
    return [f"{name} is not in the index of the search" for name in sorted(names - known - {"index.html"})]


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]))
    print("\n".join(lines) if lines else "every link leads somewhere")
    sys.exit(1 if lines else 0)
