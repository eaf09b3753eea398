"""Query files in, submissions out: the starter kit's CSV format, and JSON lines. Knows nothing of models.

Every file is written under a temporary name and then renamed, so a file under its final name is whole.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from router.queries.conversation import Message, checked, packed, shown
from router.system.errors import InputError
from router.system.files import record_of, replacing

GENERATION, MULTIPLE_CHOICE = "generation", "multiple_choice"
EVAL_TYPES = (GENERATION, MULTIPLE_CHOICE)
COLUMNS = ("id", "input", "eval_type", "answer_choices")
JSON_LINES = ".jsonl"
UNKNOWN = "unknown"
SHOWN = 20  # problems of a file that are told at once


@dataclass(frozen=True)
class Query:
    """One row of a query file. Text stays text: `NA` and `None` are not missing values.

    Attributes:
        id: unique in its file.
        input: the prompt.
        eval_type: `generation` or `multiple_choice`; it alone decides how the row is answered.
        choices: the answer choices; never empty for multiple choice.
        messages: of a conversation, as JSON; empty for a prompt. `input` then shows them to a reader.
    """

    id: str
    input: str
    eval_type: str
    choices: tuple[str, ...] = ()
    messages: str = ""

    @property
    def conversation(self) -> list[Message]:
        """The messages; none for a prompt."""
        return json.loads(self.messages) if self.messages else []


def read_rows(
    path: Path, needed: Sequence[str], problems: list[str] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file as dictionaries, with the line on which each ends.

    pandas cannot read them: it names no lines, fills rows that are too short, and takes text after a quote.

    Args:
        problems: takes what is wrong with a row that is too long or too short, which is left out, and where
            the file is no CSV in UTF-8 any more, which ends it. None raises the first problem.

    Raises:
        InputError: there is no such file, its header lacks a needed column or has one twice, or there is a
            problem and no list for it.
    """
    csv.field_size_limit(1 << 30)
    line = 0
    try:
        # newline="": a bare carriage return inside a field belongs to the text.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = list(reader.fieldnames or ())
            _check_header(path, header, needed)
            line = reader.line_num
            for row in reader:
                line = reader.line_num
                if None in row or None in row.values():
                    got = "more" if None in row else "fewer"
                    where = f"{path}, line {line}"
                    _add(problems, f"{where}: expected {len(header)} fields, got {got}; is a quote missing?")
                else:
                    yield line, row
    except OSError as error:
        raise InputError(
            f"{path}: expected a CSV file ({error.strerror}); check --dataset_filepaths"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        _add(
            problems,
            f"{path}, after line {line}: expected CSV in UTF-8, each quote closed, and doubled within a text "
            f"({error})",
        )


def _check_header(path: Path, header: Sequence[str], needed: Sequence[str]) -> None:
    if missing := [name for name in needed if name not in header]:
        found = ", ".join(header)[:300].replace("\0", "") or "nothing"
        raise InputError(
            f"{path}: expected the columns {', '.join(needed)}; {', '.join(missing)} is missing "
            f"(found: {found}); is it CSV in UTF-8?"
        )
    if twice := [name for name in header if header.count(name) > 1]:
        raise InputError(f"{path}: the column {twice[0]!r} stands twice in the header; rename one")


def _add(problems: list[str] | None, problem: str) -> None:
    if problems is None:
        raise InputError(problem)
    problems.append(problem)


def read_labels(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """What stands in a column of a query file, row by row, each with its line.

    Raises:
        InputError: there is no such column.
    """
    if path.suffix.casefold() != JSON_LINES:
        yield from ((line, row[column]) for line, row in read_rows(path, (column,)))
        return
    for line, row in read_lines(path, []):
        if not isinstance(row.get(column), str):
            raise InputError(f"{path}, line {line}: expected a text as {column}, got none")
        yield line, row[column]


def adapters_of(label: str) -> list[str]:
    """The adapters that a label in the column `adapter` names, several as `a+b`."""
    return label.split("+")


def digest_of(queries: Sequence[Query]) -> str:
    """A sha256 of what is asked."""
    return hashlib.sha256(repr(list(queries)).encode("utf-8", "surrogatepass")).hexdigest()


def read_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, with their lines; without an id a line's number is its id.

    Args:
        problems: takes what is wrong with a line, which is left out, and where the file is not in UTF-8,
            which ends it.

    Raises:
        InputError: there is no such file.
    """
    line = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    row = record_of(dict[str, Any], text)
                    if not isinstance(row.setdefault("id", line), (str, int)):
                        raise ValueError(f"expected a text or a whole number as id, got {row['id']!r:.40}")
                    yield line, row | {"id": str(row["id"])}
                except ValueError as error:
                    problems.append(f"{path}, line {line}: expected a JSON object ({error})")
    except OSError as error:
        raise InputError(
            f"{path}: expected a file of JSON lines ({error.strerror}); check --dataset_filepaths"
        ) from error
    except UnicodeDecodeError as error:
        problems.append(f"{path}, after line {line}: expected JSON lines in UTF-8 ({error})")


def parse_line(row: Mapping[str, Any], where: str) -> Query:
    """The query of a JSON object: its `messages` or its `input`, and for multiple choice `answer_choices`.

    Raises:
        InputError: the object is none.
    """
    if ("messages" in row) == ("input" in row):
        both = "both" if "input" in row else "neither"
        raise InputError(f"{where}: expected `messages` or `input`, got {both}")
    kind, choices = row.get("eval_type", GENERATION), row.get("answer_choices") or []
    if kind not in EVAL_TYPES:
        raise InputError(f"{where}, eval_type: expected {' or '.join(EVAL_TYPES)}, got {kind!r:.40}")
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if kind == MULTIPLE_CHOICE and not (texts and choices):
        raise InputError(
            f"{where}, answer_choices: expected a list of at least one text, got {choices!r:.60}"
        )
    options = tuple(choices) if kind == MULTIPLE_CHOICE else ()
    if "messages" in row:
        messages = checked(row["messages"], where)
        return Query(row["id"], shown(messages), kind, options, packed(messages))
    if not isinstance(row["input"], str):
        raise InputError(f"{where}, input: expected a text, got {row['input']!r:.40}")
    return Query(row["id"], row["input"], kind, options)


def read_queries(path: Path) -> list[Query]:
    """Reads and checks a query file: JSON lines if its name ends in `.jsonl`, else CSV.

    Raises:
        InputError: something is wrong; the message names file, line and column, what was expected and what
            came, for every row up to SHOWN.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "queries.csv"
        ...     _ = path.write_text("id,input,eval_type,answer_choices\\n7,Two and two?,generation,\\n")
        ...     read_queries(path)
        [Query(id='7', input='Two and two?', eval_type='generation', choices=(), messages='')]
    """
    queries: list[Query] = []
    lines: dict[str, int] = {}
    problems: list[str] = []
    parse: Callable[[Any, str], Query] = parse_query
    rows: Iterator[tuple[int, Mapping[str, Any]]] = iter(())
    if path.suffix.casefold() == JSON_LINES:
        parse, rows = parse_line, read_lines(path, problems)
    else:
        rows = read_rows(path, COLUMNS, problems)
    for line, row in rows:
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
            queries.append(parse(row, where))
        except InputError as error:
            problems.append(str(error))
    if problems:
        more = len(problems) - SHOWN
        raise InputError("\n".join(problems[:SHOWN]) + (f"\nand {more} more like these" if more > 0 else ""))
    if not queries:
        raise InputError(f"{path}: expected at least one query, found none")
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


def _choices(text: str, where: str) -> tuple[str, ...]:
    literal = text.strip()
    if literal in ("", "None", "nan"):
        return ()
    try:
        with warnings.catch_warnings():  # a stray backslash in a choice is the author's business
            warnings.simplefilter("ignore", SyntaxWarning)
            value = ast.literal_eval(literal)
        tokens = tokenize.generate_tokens(io.StringIO(literal).readline)
        n_texts = sum(token.type == tokenize.STRING for token in tokens)
        fits = isinstance(value, (list, tuple)) and all(
            isinstance(choice, (str, int, float)) for choice in value
        )
        # Two texts without a comma between them, as NumPy prints a list, are one to Python.
        if fits and value and n_texts == sum(isinstance(choice, str) for choice in value):
            return tuple(map(str, value))
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        pass  # a whole number of more than 4,300 digits among them
    raise InputError(
        f"{where}, column answer_choices: expected a Python list of at least one text, such as "
        f"\"['yes', 'no']\", got {text[:60]!r}"
    )


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


def submission_name(path: Path) -> str:
    """What the answers to a query file are called: as the file, and in CSV."""
    return f"{path.stem}.csv" if path.suffix.casefold() == JSON_LINES else path.name


def write_submission(path: Path, queries: Sequence[Query], predictions: Sequence[str]) -> None:
    """Writes `id,prediction,dummy_field` in input order."""
    rows = (
        (query.id, submitted(prediction), 0) for query, prediction in zip(queries, predictions, strict=True)
    )
    write_table(path, ("id", "prediction", "dummy_field"), rows)


def submitted(prediction: str) -> str:
    """A prediction as it is submitted: the judge counts an empty one as missing, so it becomes `unknown`."""
    return prediction if prediction.strip() else UNKNOWN
