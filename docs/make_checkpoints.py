"""Writes the tables of docs/checkpoints.md from the tables that loading goes by, so that they cannot be out of date.

    python docs/make_checkpoints.py

A test compares the page with what this script would write.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from eqx_specgrpo.models import CHECKPOINT_KEYS, KeyRule

PAGE = Path(__file__).parent / "checkpoints.md"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"


def page(old: str) -> str:
    """The page with its tables made anew."""
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has lost its marks {BEGIN.strip()} and {END.strip()}: put them back")
    tables = "\n".join(line for title, table in CHECKPOINT_KEYS.items() for line in _table(title, table))
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def _table(title: str, table: Sequence[KeyRule]) -> Iterator[str]:
    yield f"### {title}\n"
    yield "| keys | what becomes of them | why, or what for |"
    yield "| --- | --- | --- |"
    for rule in table:
        names = ", ".join(f"`{name}`" for name in rule.names)
        yield f"| {names} | {_treatment(rule)} | {rule.why} |"
    yield ""


def _treatment(rule: KeyRule) -> str:
    stated = [value for value in rule.neutral if value is not None and value is not False]
    unless = f" unless {' or '.join(f'`{value}`'.lower() for value in stated)}" if stated else ""
    if rule.treatment == "refused":
        return f"refused{unless}"
    if rule.families:
        return f"read for {', '.join(rule.families)}; else refused{unless}"
    return rule.treatment


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
