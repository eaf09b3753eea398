"""Files: where they are cached, how they are hashed, read as JSON, and replaced as a whole.

The folders that a run makes in an output folder bear a mark, without which one is somebody else's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, TextIO, TypeVar

from router.system.errors import InputError

T = TypeVar("T")

MARKER = ".proto-route"  # the mark of a folder, a file in it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # there is no room for a file
JSON_BYTES = 64 << 20  # of a JSON file, at most


def cache_folder() -> Path:
    """The folder for converted models and computed prototypes; PROTO_ROUTE_CACHE overrides it.

    Raises:
        InputError: there is no home folder and PROTO_ROUTE_CACHE is not set.
    """
    if given := os.environ.get("PROTO_ROUTE_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "proto-route"
    except RuntimeError as error:
        raise InputError(
            "expected a home folder to keep converted models in, found none; set PROTO_ROUTE_CACHE"
        ) from error


def is_folder(name: str | Path) -> bool:
    """Whether there is such a folder; there is none of a name that no folder can have."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):
        return False


def sha256_of(*files: Path) -> str:
    """The sha256 of the files' bytes, concatenated, in hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def read_record(kind: type[T], path: Path) -> T:
    """A typed record from a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than JSON_BYTES, or is none; see `record_of`.
    """
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(f"expected at most {JSON_BYTES >> 20} MiB")
    return record_of(kind, path.read_bytes())


def record_of(kind: type[T], text: str | bytes) -> T:
    """A typed record from its JSON text; keys that it does not have are left out.

    Raises:
        ValueError: the text is no JSON, or lacks something or has it in another type; the message says where.

    Example:
        >>> record_of(dict[str, int], '{"a": 1}')
        {'a': 1}
        >>> record_of(dict[str, int], '{"a": "x"}')
        Traceback (most recent call last):
        ...
        ValueError: a: it should be a valid integer, unable to parse string as an integer
    """
    try:
        found = json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return typed(kind, found)


def typed(kind: type[T], value: Any, strict: bool = False) -> T:
    """The same of JSON values.

    Args:
        strict: takes no value of another type, such as a text that spells a number.

    Raises:
        ValueError: something is missing, or of another type; the message says where.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(value, strict=strict)  # type: ignore[arg-type, no-any-return]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = first["msg"].replace("Input should", "it should").removeprefix("Value error, ")
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {what}" if where else what) from error


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _number(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"expected finite numbers, got {text:.20}")
    return value


def _whole(text: str) -> int:
    if abs(value := int(text)) > sys.maxsize:
        raise ValueError(f"expected numbers of 64 bits, got {text:.20}")
    return value


def for_others(path: Path) -> None:
    """Gives a file or folder that was made for its owner alone the rights that the umask leaves others."""
    mask = os.umask(0o077)  # there is no other way to ask
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Opens a text file that takes its final name only if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
        for_others(Path(name))
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def is_ours(folder: Path) -> bool:
    """Whether a folder may be removed or replaced: it bears our mark, is empty, or is not there."""
    try:
        if folder.is_symlink() or not folder.is_dir():
            return not (folder.is_symlink() or folder.exists())
        return (folder / MARKER).is_file() or not any(folder.iterdir())
    except OSError:  # another user's, perhaps
        return False


def mark(folder: Path) -> None:
    """Makes a folder of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def work_folder(output: Path, prefix: str) -> Path:
    """A new folder of ours in an output folder, which is made; those that killed runs left there go."""
    output.mkdir(parents=True, exist_ok=True)
    for left in output.glob(f"{prefix}*"):
        remove_ours(left)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=output))
    mark(work)
    return work


def remove_ours(folder: Path) -> None:
    """Removes a folder if it is ours: the mark last, so that it stays ours if the process is killed."""
    if not is_ours(folder):
        return
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MARKER:
                path.unlink()
        shutil.rmtree(folder)


@contextmanager
def told_if_full(
    folder: Path,
    what: str = "the results",
    then: str = "choose another --output_folder. What was answered is kept: the same command goes on there",
) -> Iterator[None]:
    """Says what to do where the block fails because there is no room for a file.

    Args:
        folder: where the block writes.
        what: it writes there.
        then: what to do, other than to make room.

    Raises:
        InputError: the disk is full, or a limit on files or a quota is reached.
    """
    try:
        yield
    except Exception as error:
        code = re.search(r"(?:os error |code: )(\d+)", str(error))  # as safetensors says it
        number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
        if number not in FULL:
            raise
        raise InputError(
            f"{folder}: no room for {what} ({os.strerror(number)}); free some, or {then}"
        ) from error
