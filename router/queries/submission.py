"""Query files in, submissions out: the starter kit's CSV format, and JSON lines. Knows nothing of models.

Every file is written under a temporary name and then renamed, so a file under its final name is whole.
"""

import ast
import csv
import hashlib
import io
import json
import tokenize
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

from router.queries.conversation import Message, checked, packed, shown
from router.system.errors import InputError, whole
from router.system.files import record_of, replacing

GENERATION, MULTIPLE_CHOICE = "generation", "multiple_choice"
EVAL_TYPES = (GENERATION, MULTIPLE_CHOICE)
COLUMNS = ("id", "input", "eval_type", "answer_choices")
# Keys that make a query another one, and that are not read.
UNREAD = "tools functions system system_prompt instruction instructions context choices options".split()
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

    def marked(self, later: int) -> str:
        """The text as `shown` has it, for a reader who asks what of a conversation decided."""
        return shown(self.conversation, later) if self.messages else self.input


def read_rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a query file, JSON lines if its name ends in `.jsonl`, else CSV, with the line of each.

    Of JSON lines without an id, or with null, the line is the id.

    Args:
        needed: columns of CSV.

    Raises:
        InputError: there is no such file, its header lacks a needed column or has one twice, or a row or line
            is none.
    """
    for line, row in _rows(path, needed):
        if isinstance(row, str):
            raise InputError(f"{path}, line {line}: {row}")
        yield line, row


def _rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """As `read_rows`, with what is wrong in place of a row that is none.

    pandas cannot read such CSV: it names no lines, fills rows that are too short, and takes text after a
    quote.
    """
    json_lines = path.suffix.casefold() == JSON_LINES
    kind = "JSON lines" if json_lines else "CSV"
    line = 0 if json_lines else 1  # of the header
    try:
        # newline="": a bare carriage return inside a field belongs to the text.
        with path.open(encoding="utf-8-sig", newline=None if json_lines else "") as file:
            for line, row in _json_rows(file) if json_lines else _csv_rows(file, path, needed):
                yield line, row
    except OSError as error:
        raise InputError(f"{path}: expected a file of {kind} ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        quotes = "" if json_lines else ", each quote closed, and doubled within a text"
        raise InputError(f"{path}, after line {line}: expected {kind} in UTF-8{quotes} ({error})") from error


def _csv_rows(
    file: TextIO, path: Path, needed: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any] | str]]:  # fmt: skip
    """The lines on which rows end, and the rows as dictionaries, or what is wrong with them."""
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(file, strict=True)
    header = list(reader.fieldnames or ())
    if missing := [name for name in needed if name not in header]:
        names = ", ".join(header)[:300].replace("\0", "") or "nothing"
        raise InputError(
            f"{path}: expected the columns {', '.join(needed)}; {', '.join(missing)} is missing "
            f"(found: {names}); is it CSV in UTF-8?"
        )
    if twice := [name for name in header if header.count(name) > 1]:
        raise InputError(f"{path}: the column {twice[0]!r} stands twice in the header; rename one")
    for row in reader:
        if None in row or None in row.values():
            got = "more" if None in row else "fewer"
            yield reader.line_num, f"expected {len(header)} fields, got {got}; is a quote missing?"
        else:
            yield reader.line_num, row


def _json_rows(file: TextIO) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The lines that are not blank, and their objects, or what is wrong with them."""
    for line, text in enumerate(file, 1):
        if text.strip():
            try:
                row = record_of(dict[str, Any], text)
                yield line, row | {"id": id_of(row, line)}
            except ValueError as error:
                yield line, f"expected a JSON object ({error})"


def read_labels(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """The texts in a column of a query file, row by row, each with its line.

    Raises:
        InputError: there is no such column, or no text in it.
    """
    for line, row in read_rows(path, (column,)):
        yield line, label_of(row, column, f"{path}, line {line}")


def label_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """A label in a row; a whole number in JSON lines is its text."""
    if not isinstance(label := row.get(column), (str, int)) or isinstance(label, bool):
        raise InputError(f"{where}, column {column}: expected a text, got {label!r:.40}")
    return str(label)


def adapters_of(label: str, names: Container[str] = ()) -> list[str]:
    """The adapters that a label in the column `adapter` names: one of the names, or several as `a+b`."""
    return [label] if label in names else [part.strip() for part in label.split("+")]


def digest_of(queries: Sequence[Query]) -> str:
    """A sha256 of what is asked."""
    return hashlib.sha256(repr(list(queries)).encode("utf-8", "surrogatepass")).hexdigest()


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
    columns = None if path.suffix.casefold() == JSON_LINES else COLUMNS  # further ones of CSV are no matter
    try:
        for line, row in _rows(path, COLUMNS):
            try:
                if isinstance(row, str):
                    raise InputError(f"{path}, line {line}: {row}")
                check_id(row["id"], line, lines, path)
                spelt = {name: row[name] for name in columns or row}
                queries.append(query_of(spelt, f"{path}, line {line}", csv=bool(columns)))
            except InputError as error:
                problems.append(str(error))
    except InputError as error:  # where the file breaks off
        problems.append(str(error))
    refuse(problems)
    if not queries:
        raise InputError(f"{path}: expected at least one query, found none")
    return queries


def refuse(problems: Sequence[str]) -> None:
    """Raises an InputError of up to SHOWN problems, if there are any."""
    if problems:
        more = len(problems) - SHOWN
        raise InputError("\n".join(problems[:SHOWN]) + (f"\nand {more} more like these" if more > 0 else ""))


def id_of(row: Mapping[str, Any], number: int) -> str:
    """The id of a row that is no CSV, or its number where it has none.

    Raises:
        ValueError: it is neither text nor a whole number.
    """
    value = number if row.get("id") is None else row["id"]
    if not isinstance(value, (str, int)):
        raise ValueError(f"expected a text or a whole number as id, got {value!r:.40}")
    return str(value)


def check_id(name: str, line: int, lines: dict[str, int], path: Path, what: str = "line") -> None:
    """Notes on which line, or row, an id stands.

    Raises:
        InputError: it is blank, no UTF-8, or stands on an earlier one.
    """
    if not name.strip() or not whole(name):
        raise InputError(f"{path}, {what} {line}, column id: expected an id, got {name!r}")
    if (first := lines.setdefault(name, line)) != line:
        raise InputError(
            f"{path}, {what} {line}, column id: {name!r} stands on {what} {first} too; ids must be unique"
        )


def query_of(row: Mapping[str, Any], where: str, csv: bool = False) -> Query:
    """The query of a row: its `messages` or its `input`, and for multiple choice `answer_choices`.

    Without `eval_type` it is multiple choice where it has choices.

    Raises:
        InputError: the row is none; `where` begins the sentence.
    """
    row = {key: value for key, value in row.items() if value is not None}  # as pandas writes what is missing
    if ("messages" in row) == ("input" in row):
        both = "both" if "input" in row else "neither"
        raise InputError(f"{where}: expected `messages` or `input`, got {both}")
    kind = row.get("eval_type", MULTIPLE_CHOICE if row.get("answer_choices") else GENERATION)
    if kind not in EVAL_TYPES:
        raise InputError(f"{where}, column eval_type: expected {' or '.join(EVAL_TYPES)}, got {kind!r:.40}")
    if unread := [key for key in UNREAD if row.get(key)]:
        raise InputError(
            f"{where}: expected no `{unread[0]}`, which would be lost: of a query `messages` or `input`, and "
            "`answer_choices`, are read"
        )
    messages = checked(row["messages"], where) if "messages" in row else []
    text = shown(messages) if messages else row["input"]
    if not isinstance(text, str):
        raise InputError(f"{where}, column input: expected a text, got {text!r:.40}")
    # Of generation nobody reads the column of choices, so anything may stand in it.
    choices = _choices(row.get("answer_choices"), text, where, csv) if kind == MULTIPLE_CHOICE else ()
    return Query(row["id"], text, kind, choices, packed(messages) if messages else "")


def _choices(given: Any, text: str, where: str, csv: bool) -> tuple[str, ...]:
    """The choices in a list of texts or numbers, or in a text that spells it, as a cell of CSV does.

    Where a cell of CSV is blank, the input is the only choice, answered with 0, as the starter kit does.
    """
    if csv and given.strip() in ("", "None", "nan"):
        return (text,)
    choices, odd = (_literal(given.strip()), ()) if isinstance(given, str) else (given, bool)
    fits = isinstance(choices, (list, tuple)) and all(
        isinstance(one, (str, int, float)) and not isinstance(one, odd) for one in choices
    )
    if not (fits and choices):
        raise InputError(
            f"{where}, column answer_choices: expected a list of at least one text, such as "
            f"\"['yes', 'no']\", got {given!r:.60}"
        )
    # JSON spells what is beyond U+FFFF in two halves, which Python leaves apart.
    return tuple(
        str(one).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") for one in choices
    )


def _literal(text: str) -> Any:
    """The list that a text spells, in JSON or in Python; None if it spells none, or lacks a comma."""
    with suppress(ValueError, TypeError, RecursionError):
        value = json.loads(text)
        if all(isinstance(choice, str) for choice in value):  # of other values Python's spelling counts
            return value
    try:
        with warnings.catch_warnings():  # a stray backslash in a choice is the author's business
            warnings.simplefilter("ignore", SyntaxWarning)
            value = ast.literal_eval(text)
        str(value)  # a ValueError for a whole number of more than 4,300 digits
        # Two texts without a comma between them, as NumPy prints a list, are one to Python.
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        texts = sum(token.type == tokenize.STRING for token in tokens)
        return value if texts == sum(isinstance(choice, str) for choice in value) else None
    except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        return None


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file as pandas and the starter kit do: minimal quotes, `\\n` line ends."""
    with replacing(path) as file:
        # csv quotes a bare carriage return only if its own line end has one.
        lines: Any = SimpleNamespace(write=lambda row: file.write(row.removesuffix("\r\n") + "\n"))
        writer = csv.writer(lines, lineterminator="\r\n")
        writer.writerow(header)
        writer.writerows(rows)


def submission_name(path: Path) -> str:
    """The name of the answers to a query file: as the file, and in CSV."""
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
