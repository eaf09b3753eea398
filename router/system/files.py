"""Files: where they are cached, how they are hashed, read as JSON, and replaced as a whole.

The folders that a run makes in an output folder bear a mark, without which one is somebody else's. That of a
finished folder holds the hashes of its files, and a script or page one of its text: what was changed is
somebody else's, too.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
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
SEAL = "sha256 of all else: "  # in a text, before its hash


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


def is_still(path: Path, sha256: str) -> bool:
    """Whether there is such a file with these bytes, by their hash."""
    return path.is_file() and sha256_of(path) == sha256


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file in a folder but its mark, by its path there; of a link, no hash."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    paths.pop(MARKER, None)
    links = {name: "link" for name, path in paths.items() if path.is_symlink()}
    return {name: sha256_of(path) for name, path in paths.items() if path.is_file()} | links


def sealed(text: str) -> str:
    """The text with a hash of all else in the place of the 64 digits that follow its first SEAL.

    Example:
        >>> sealed(f"# {SEAL}{'0' * 64} !") == sealed(sealed(f"# {SEAL}{'0' * 64} !"))
        True
    """
    before, seal, after = text.partition(SEAL)
    return before + seal + hashlib.sha256((before + after[64:]).encode()).hexdigest() + after[64:]


def is_sealed(path: Path) -> bool:
    """Whether a file is as it was sealed, or not there."""
    try:
        if path.is_symlink() or not path.is_file():
            return not (path.is_symlink() or path.exists())
        text = path.read_bytes().decode("utf-8", "replace")
        return SEAL in text and sealed(text) == text
    except OSError:  # another user's, perhaps
        return False


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
        value = json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return typed(kind, value)


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
    """Whether a folder may be removed or replaced: it has nothing but what is ours, or is not there."""
    try:
        if folder.is_symlink() or not folder.is_dir():
            return not (folder.is_symlink() or folder.exists())
        if not (folder / MARKER).is_file():
            return not any(folder.iterdir())
        known = (folder / MARKER).read_bytes()
        return not known or hashes(folder).items() <= record_of(dict[str, str], known).items()
    except (OSError, ValueError):  # another user's, perhaps
        return False


def mark(folder: Path, finished: bool = False) -> None:
    """Makes a folder of ours; of a finished one, what is in it now, and nothing that comes later."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(json.dumps(hashes(folder)) if finished else "")


def check_apart(inputs: Iterable[tuple[str, Path]], replaced: Path) -> None:
    """Refuses what is read, as (what it is, path), in a folder that is about to be replaced."""
    replaced = replaced.resolve()
    for what, path in inputs:
        if path.resolve().is_relative_to(replaced):
            raise InputError(
                f"{what} {path}: expected a folder that is not replaced, got one in {replaced}; "
                "write the results to another folder"
            )


def work_folder(output: Path, prefix: str) -> Path:
    """Makes a folder of ours in an output folder; removes those that killed runs left there."""
    output.mkdir(parents=True, exist_ok=True)
    for left in output.glob(f"{prefix}*"):
        remove_ours(left)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=output))
    mark(work)
    return work


@contextmanager
def remaking(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of an earlier one of ours if the block ends without an error.

    Raises:
        InputError: what is there is somebody else's.
    """
    if not is_ours(folder):
        raise InputError(f"{folder}: expected no such folder, or one as it was made; move it away")
    work = work_folder(folder.parent, f".{folder.name}.")
    try:
        (made := work / folder.name).mkdir()
        yield made
        mark(made, finished=True)
        remove_ours(folder)
        made.rename(folder)
    finally:
        remove_ours(work)


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
def explain_full_disk(
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
