"""Tables in Markdown files that are written again where they stand."""

from collections.abc import Iterable
from pathlib import Path


def insert(path: Path, name: str, lines: Iterable[str]) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` in a file."""
    text, start, end = path.read_text("utf-8"), f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in text or end not in text:
        raise ValueError(f"{path}: expected the lines {start.strip()} and {end}")
    head, rest = text.split(start, 1)
    path.write_text(head + start + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1], "utf-8")


def row(*cells: object) -> str:
    """A line of a table."""
    return "".join(["|", *(f" {cell} |" if cell != "" else " |" for cell in cells)])


def header(names: Iterable[str], texts: int = 1) -> list[str]:
    """The two lines above a table.

    Args:
        texts: columns that hold text, the first ones; the others hold numbers and stand on the right.
    """
    names = list(names)
    return [row(*names), row(*["---"] * texts, *["---:"] * (len(names) - texts))]
