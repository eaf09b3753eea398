"""The record of a saved router, `router.json`, read and written here alone, and the files beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from router.constants import FORMAT, SCRIPT, TEMPLATE
from router.model.base import EMBEDDED
from router.pipeline.record import RECORD
from router.pipeline.state import FILE
from router.routing.variants import VARIANTS, Variant
from router.system.errors import InputError
from router.system.files import (
    is_ours,
    is_sealed,
    is_still,
    mark,
    read_record,
    remove_ours,
    replacing,
    typed,
    work_folder,
)  # fmt: skip

ABOUT = "router.json"  # beside FILE and VARIANTS in the folder
WORK = ".router."  # how the name of the folder begins in which a router is written
BEFORE = ".router.json"  # the record of the router before, while it is replaced and a save may be killed


@dataclass(frozen=True)
class Saved:
    """The record of a saved router.

    Attributes:
        format: of the whole folder, FORMAT of the version that wrote it.
        version: of the package that wrote it.
        revision: of a base model from the hub.
        configuration: of the base model beside its weights, see `Base.configuration`.
        embedded: whether the base model is the embedded one.
        candidates: the adapters' names, and the base model's.
        settings: those of a run that answers depend on.
        centres: (variants, candidates) the mean mix that each variant was made for.
        firsts: for each variant, the numbers of the candidates that were the first of a query.
        files: the sha256 of the other files, by their paths in the folder; TEMPLATE is one if chats are not
            written in the base model's own.
    """

    format: int
    version: str
    base_model: str
    revision: str | None
    base_sha256: str
    configuration: str
    embedded: bool
    dtype: Literal["float32", "bfloat16", "float16"]
    candidates: list[str]
    settings: dict[str, Any]
    variants: list[Variant]
    centres: list[list[float]]
    firsts: list[list[int]]
    files: dict[str, str]

    def __post_init__(self) -> None:
        wide = len(self.candidates)
        same = 0 < len(self.variants) == len(self.centres)
        if not same or any(len(row) != wide for row in self.centres):
            raise ValueError("expected variants, and a centre for each, with a weight for each candidate")
        numbers = [n for row in self.firsts for n in row]
        if len(self.firsts) != len(self.variants) or any(not 0 <= n < wide for n in numbers):
            raise ValueError("expected numbers of candidates for each variant")

    @property
    def base(self) -> str:
        """The base model as `load_base` takes it."""
        return EMBEDDED if self.embedded else self.base_model + (f"@{self.revision}" if self.revision else "")

    def write(self, folder: Path) -> None:
        """Writes it into a folder, as a whole."""
        with replacing(folder / ABOUT) as file:
            json.dump(asdict(self), file, indent=2, ensure_ascii=False)

    @staticmethod
    def read(folder: Path) -> Saved:
        """Reads it back.

        Raises:
            FileNotFoundError: there is none.
            InputError: it is damaged, or of another format.
        """
        path = folder / ABOUT
        try:
            about = read_record(dict[str, Any], path)
            if about.get("format", FORMAT) != FORMAT:
                raise InputError(
                    f"{path}: expected format {FORMAT}, got {about['format']!s:.20}, which another version "
                    "writes; save the router again with this one"
                )
            return typed(Saved, about)
        except (FileNotFoundError, InputError):
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: expected what Router.save wrote ({error}); save it again") from error


def changed(folder: Path, files: Mapping[str, str]) -> str | None:
    """A file of a saved router that is not as it was saved, or gone; None if all are there."""
    return next((name for name, digest in files.items() if not is_still(folder / name, digest)), None)


@contextmanager
def replacing_router(folder: Path) -> Iterator[Path]:
    """A new folder whose router takes the place of an earlier one in `folder` if the block ends well.

    Raises:
        InputError: there are files of these names that no router left there.
    """
    check_replaceable(folder)
    work = work_folder(folder, WORK)
    try:
        yield work
        mark(work / VARIANTS, finished=True)
        check_replaceable(folder)  # what was put there meanwhile stays, too
        if (folder / ABOUT).exists():  # from here on it is no router, until it is the new one
            (folder / ABOUT).replace(folder / BEFORE)
        remove_ours(folder / VARIANTS)
        for name in (TEMPLATE, *([SCRIPT] if is_sealed(folder / SCRIPT) else [])):
            (folder / name).unlink(missing_ok=True)
        for name in (VARIANTS, ABOUT, TEMPLATE, FILE):  # the last two have hashes that the record says
            if (work / name).exists():
                (work / name).replace(folder / name)
        (folder / BEFORE).unlink(missing_ok=True)
    finally:
        remove_ours(work)


def check_replaceable(folder: Path) -> None:
    """Refuses a folder in which a router would replace what no router left there.

    Raises:
        InputError: it would.
    """
    known = list[Mapping[str, str]]()
    for about in (folder / ABOUT, folder / BEFORE):
        try:
            if about.exists():
                record = read_record(dict[str, Any], about)
                known.append(typed(dict[str, str], record["files"]))
                typed(tuple[int, str], (record["format"], record["version"]))
        except (OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{about}: expected none, or that of a router ({error}); move it away"
            ) from error
    if (folder / RECORD).exists():
        raise InputError(f"{folder}: expected no run in it ({RECORD}), whose variants would be replaced")
    foreign = [VARIANTS] if not is_ours(folder / VARIANTS) else []
    for name in (FILE, TEMPLATE):
        if (folder / name).exists() and all(changed(folder, {name: files.get(name, "")}) for files in known):
            foreign.append(name)
    if foreign:
        raise InputError(
            f"{folder}: expected no {foreign[0]} in it but what a router left there, since it would be "
            "replaced; move it away or choose another folder"
        )
