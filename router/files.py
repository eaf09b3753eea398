"""Files: where they are cached, how they are hashed, and how they are replaced as a whole."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from router.errors import InputError


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


def sha256_of(*files: Path) -> str:
    """The sha256 of the files' bytes, concatenated, in hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Opens a text file that takes its final name only if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def told_if_full(folder: Path) -> Iterator[None]:
    """Says what to do where the block fails because there is no room for a file.

    Raises:
        InputError: the disk is full, or a limit on files or a quota is reached.
    """
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    try:
        yield
    except Exception as error:
        code = re.search(r"os error (\d+)", str(error))  # as safetensors says it
        number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
        if number not in full:
            raise
        raise InputError(
            f"{folder}: no room for the results ({os.strerror(number)}); free some, or choose another "
            "--output_folder. What was answered is kept: the same command goes on there"
        ) from error
