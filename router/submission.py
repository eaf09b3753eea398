"""Query files in, submissions out: the starter kit's CSV format. Knows nothing of models.

Every file is written under a temporary name and then renamed, so a file under its final name is whole.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import re
import sys
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from router.errors import InputError
from router.files import replacing

GENERATION, MULTIPLE_CHOICE = "generation", "multiple_choice"
EVAL_TYPES = (GENERATION, MULTIPLE_CHOICE)
COLUMNS = ("id", "input", "eval_type", "answer_choices")
UNKNOWN = "unknown"
SHOWN = 20  # problems of a file that are told at once
# A whole number that Python refuses to read.
LONG = re.compile(rf"\d[\d_]{{{sys.int_info.default_max_str_digits - 1},}}")


@dataclass(frozen=True)
class Query:
    """One row of a query file. Text stays text: `NA` and `None` are not missing values.

    Attributes:
        id: unique in its file.
        input: the prompt.
        eval_type: `generation` or `multiple_choice`; it alone decides how the row is answered.
        choices: the answer choices; never empty for multiple choice.
    """

    id: str
    input: str
    eval_type: str
    choices: tuple[str, ...] = ()


def read_rows(
    path: Path, needed: Sequence[str], problems: list[str] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file as dictionaries, with the line on which each ends.

    Args:
        problems: takes what is wrong with a row that is too long or too short, which is left out, and where
            the file is no CSV in UTF-8 any more, which ends it.

    Raises:
        InputError: there is no such file, a needed column is missing, or, without `problems`, a row is too
            long or too short, or the file is not CSV in UTF-8.
    """
    csv.field_size_limit(1 << 30)
    line = 0
    try:
        # newline="": a bare carriage return inside a field belongs to the text.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = list(reader.fieldnames or ())
            line = reader.line_num
            missing = [name for name in needed if name not in header]
            if missing:
                shown = ", ".join(header)[:300]
                wide = "; is it UTF-16? Save it as UTF-8" if "\0" in "".join(header) else ""
                raise InputError(
                    f"{path}: expected the columns {', '.join(needed)}; "
                    f"{', '.join(missing)} is missing (found: {shown or 'nothing'}){wide}"
                )
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise InputError(f"{path}: the column {twice[0]!r} stands twice in the header; rename one")
            for row in reader:
                line = reader.line_num
                if None in row or None in row.values():
                    problem = (
                        f"{path}, line {line}: expected {len(header)} fields, "
                        f"got {'more' if None in row else 'fewer'}; is a quote missing?"
                    )
                    if problems is None:
                        raise InputError(problem)
                    problems.append(problem)
                    continue
                yield line, row
    except FileNotFoundError as error:
        raise InputError(f"{path}: expected a CSV file, found none; check --dataset_filepaths") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: expected a CSV file, found a folder; name the files in it") from error
    except OSError as error:
        raise InputError(f"{path}: expected a readable CSV file, but {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        problem = f"{path}, after line {line}: {_broken(error)}"
        if problems is None:
            raise InputError(problem) from error
        problems.append(problem)


def adapters_of(label: str) -> list[str]:
    """The adapters that a label in the column `adapter` names, several as `a+b`."""
    return label.split("+")


def _broken(error: UnicodeDecodeError | csv.Error) -> str:
    """What ended the reading of a CSV file, as far as the csv module says it, and what to do."""
    if "unexpected end of data" in str(error):
        return (
            "expected each quote to be closed, but one that the next row opens is not; close it, and double "
            "those that belong to a text"
        )
    if "expected after" in str(error):
        return (
            "expected a comma or the end of the row after a closing quote, but in the next row text follows "
            "one; is a quote before it never closed? Close it, and double those that belong to a text"
        )
    return f"expected CSV in UTF-8, got something else ({error}); save it as UTF-8"


def digest_of(queries: Sequence[Query]) -> str:
    """A sha256 of what is asked."""
    return hashlib.sha256(repr(list(queries)).encode("utf-8", "surrogatepass")).hexdigest()


def read_queries(path: Path) -> list[Query]:
    """Reads and checks a query file.

    Raises:
        InputError: something is wrong; the message names file, line and column, what was expected and what
            came, for every row up to SHOWN.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "queries.csv"
        ...     _ = path.write_text("id,input,eval_type,answer_choices\\n7,Two and two?,generation,\\n")
        ...     read_queries(path)
        [Query(id='7', input='Two and two?', eval_type='generation', choices=())]
    """
    queries: list[Query] = []
    lines: dict[str, int] = {}
    problems: list[str] = []
    for line, row in read_rows(path, COLUMNS, problems):
        where = f"{path}, line {line}"
        if not row["id"].strip():
            problems.append(f"{where}, column id: expected an id, got {row['id']!r}")
            continue
        first = lines.setdefault(row["id"], line)
        if first != line:
            problems.append(
                f"{where}, column id: {row['id']!r} stands on line {first} too; ids must be unique"
            )
        try:
            queries.append(parse_query(row, where))
        except InputError as error:
            problems.append(str(error))
    if problems:
        more = len(problems) - SHOWN
        raise InputError("\n".join(problems[:SHOWN]) + (f"\nand {more} more like these" if more > 0 else ""))
    if not queries:
        raise InputError(f"{path}: expected at least one query below the header, found none")
    return queries


def parse_query(row: Mapping[str, str], where: str) -> Query:
    """The query of one row, a text for each of COLUMNS.

    Raises:
        InputError: the row is none.
    """
    if row["eval_type"] not in EVAL_TYPES:
        raise InputError(
            f"{where}, column eval_type: expected {' or '.join(EVAL_TYPES)}, got {row['eval_type']!r}"
        )
    choices: tuple[str, ...] = ()  # of generation nobody reads the column, so anything may stand in it
    if row["eval_type"] == MULTIPLE_CHOICE:
        # Where the cell is blank, the input is the only choice, answered with 0, as the starter kit does.
        choices = _choices(row["answer_choices"], where) or (row["input"],)
    return Query(row["id"], row["input"], row["eval_type"], choices)


def _run_together(text: str) -> bool:
    """Whether two texts follow each other without a comma, as NumPy prints a list; Python would join them."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    kinds = [kind for kind in kinds if kind != tokenize.NL]
    return any(one == other == tokenize.STRING for one, other in pairwise(kinds))


def _long_numbers_as_texts(text: str) -> str:
    """The same Python literal with a text in place of each whole number that Python refuses to read."""
    words: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        word = token.string
        if token.type == tokenize.NUMBER and LONG.fullmatch(word):
            sign = words.pop() if words[-1:] == ["-"] else ""
            word = repr(sign + word.replace("_", ""))
        words.append(word)
    return " ".join(words)


def _choices(text: str, where: str) -> tuple[str, ...]:
    literal = text.strip()
    if literal in ("", "None", "nan"):
        return ()
    try:
        if LONG.search(literal):
            literal = _long_numbers_as_texts(literal)
        with warnings.catch_warnings():  # a stray backslash in a choice is the author's business
            warnings.simplefilter("ignore", SyntaxWarning)
            value = ast.literal_eval(literal)
        if _run_together(literal):
            value = None
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        value = None
    fits = isinstance(value, (list, tuple)) and all(isinstance(v, (str, int, float)) for v in value)
    if not fits or not value:
        raise InputError(
            f"{where}, column answer_choices: expected a Python list of at least one text, such as "
            f"\"['yes', 'no']\", got {text[:60]!r}"
        )
    return tuple(map(_written, value))


def _written(choice: Any) -> str:
    try:
        return str(choice)
    except ValueError:  # a whole number of thousands of digits
        return hex(choice)


class _UnixLines:
    """Ends each row with `\\n`. csv itself quotes a bare carriage return only if its line end has one."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, row: str) -> int:
        return self.file.write(row.removesuffix("\r\n") + "\n")


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file as pandas and the starter kit do: minimal quotes, `\\n` line ends."""
    with replacing(path) as file:
        writer = csv.writer(_UnixLines(file), lineterminator="\r\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_submission(path: Path, queries: Sequence[Query], predictions: Sequence[str]) -> None:
    """Writes `id,prediction,dummy_field` in input order."""
    rows = (
        (query.id, submitted(prediction), 0) for query, prediction in zip(queries, predictions, strict=True)
    )
    write_table(path, ("id", "prediction", "dummy_field"), rows)


def submitted(prediction: str) -> str:
    """A prediction as it is submitted: the judge counts an empty one as missing, so it becomes `unknown`."""
    return prediction if prediction.strip() else UNKNOWN
