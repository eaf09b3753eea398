"""A library of adapters: opened, checked, and read module by module. Knows nothing of queries."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from merge.factors import Factors, inner
from merge.folders import WEIGHTS_FILE, AdapterError, AdapterFolder, open_adapter
from router.constants import BASE_COLUMN
from router.library.sources import CARD_FILE, Source, expand, find
from router.system.errors import InputError, out_of_memory
from router.system.files import sha256_of

# Columns of the routing table that are no adapter's.
TAKEN = {
    BASE_COLUMN: "it and the base model",
    "id": "it and the queries' ids",
    "variant": "it and the variants",
}


@dataclass(frozen=True)
class Adapter:
    """A checked adapter of a library.

    Attributes:
        name: unique in the library; the column in the routing table.
        folder: the files, readable one module at a time.
        sha256: of the weight file.
        revision: commit on the hub, None for local folders.
    """

    name: str
    folder: AdapterFolder
    sha256: str
    revision: str | None = None

    def read(self, module: str) -> Factors:
        """One module's update in float32.

        Raises:
            InputError: a value is not finite, or the file cannot be read.
        """
        try:
            return self._finite(module, self.folder.read(module))
        except (OSError, SafetensorError) as error:
            raise InputError(f"adapter {self.name} ({self.folder.path}): cannot be read: {error}") from error

    def check_unchanged(self) -> None:
        """Refuses an adapter whose weights were replaced since it was opened.

        What is kept on disk under their hash would be another's, for good.

        Raises:
            InputError: they were.
        """
        if sha256_of(self.folder.path / WEIGHTS_FILE) != self.sha256:
            raise InputError(
                f"adapter {self.name} ({self.folder.path}): {WEIGHTS_FILE} was changed while it was read; "
                "run again"
            )

    def read_all(self) -> Iterator[tuple[str, Factors]]:
        """Every module's update in float32, one after the other.

        Raises:
            InputError: a value is not finite, or the file cannot be read.
        """
        try:
            for module, update in self.folder.read_all():
                yield module, self._finite(module, update)
        except (OSError, SafetensorError) as error:
            raise InputError(f"adapter {self.name} ({self.folder.path}): cannot be read: {error}") from error

    def _finite(self, module: str, update: Factors) -> Factors:
        if torch.isfinite(update.a.norm() * update.b.norm()):  # so that products of them are finite, too
            return update
        raise InputError(
            f"adapter {self.name} ({self.folder.path}): {module} holds values that are not "
            "finite, or too large to multiply in float32; leave the adapter out of --adapters"
        )

    def check_values(self) -> None:
        """Reads every value.

        Raises:
            InputError: one is not finite, or all are zero.
        """
        if sum(inner(update, update) for _, update in self.read_all()) <= 0:
            raise InputError(f"{self.folder.path}: expected an update, got zero at every module")


def opened(source: Source) -> Adapter:
    """Opens one adapter; its values are checked to be finite when they are read.

    Raises:
        InputError: it is broken or of an unsupported kind.
    """
    try:
        folder = open_adapter(source.path)
    except AdapterError as error:
        raise InputError(str(error)) from error
    return Adapter(source.name, folder, sha256_of(source.path / WEIGHTS_FILE), source.revision)


@contextmanager
def _or_left_out(bad: list[str] | None) -> Iterator[None]:
    """Keeps an InputError of the block as a line of `bad`, if there is such a list."""
    try:
        yield
    except InputError as error:
        if bad is None or out_of_memory(error):
            raise
        bad.append(str(error))


def load_library(
    specs: Sequence[str], local_only: bool = False, bad: list[str] | None = None
) -> list[Adapter]:
    """Finds and checks adapters.

    Args:
        specs: folders, folders of folders, names in data/library, hub ids (`ID[@REVISION]`), or
            the single word `competition`.
        local_only: nothing is fetched from the hub.
        bad: takes why an adapter is left out, a line for each; every value is read to find these. None leaves
            none out.

    Returns:
        The adapters in the order given; those of one folder in order of name.

    Raises:
        InputError: an adapter is missing, broken, of an unsupported kind, or named like another; with `bad`,
            only if none is left.
    """
    found: dict[str, Adapter] = {}
    for spec in expand(specs):
        with _or_left_out(bad):
            for source in find(spec, local_only):
                with _or_left_out(bad):
                    check_name(source, found)
                    adapter = opened(source)
                    if bad is not None:
                        adapter.check_values()
                    found[adapter.name] = adapter
    return _some(found.values(), bad)


def card(folder: Path) -> str:
    """An adapter's model card without its YAML header; empty if there is none."""
    file = folder / CARD_FILE
    text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


def check_name(source: Source, others: Container[str]) -> None:
    """Refuses an adapter whose name no column of the routing table may have.

    Args:
        others: the names of the library's other adapters.

    Raises:
        InputError: the column is not an adapter's, or another's, or the name cannot be printed.
    """
    where = f"adapter {source.name!r} ({str(source.path)!r})"
    if taken := TAKEN.get(source.name) or ("two adapters" if source.name in others else None):
        raise InputError(f"{where}: {taken} would share a column of that name; rename the folder")
    if not source.name.isprintable():
        raise InputError(f"{where}: expected a name that can be printed; rename the folder")


def _some(adapters: Iterable[Adapter], bad: list[str] | None) -> list[Adapter]:
    """The adapters as a list that is not empty."""
    if not (found := list(adapters)) and bad:
        raise InputError(f"--skip_bad: expected an adapter that can be used, but: {'; '.join(bad)}")
    return found


def base_of(adapters: Iterable[Adapter]) -> str:
    """The one base model that all adapters name.

    Raises:
        InputError: they name several, or none at all.
    """
    named: dict[str, str] = {}
    for adapter in adapters:
        if adapter.folder.base_model:
            named.setdefault(adapter.folder.base_model, adapter.name)
    if len(named) != 1:
        what = "; ".join(f"{adapter} names {base}" for base, adapter in named.items()) or "none named"
        raise InputError(f"--adapters: expected one base model for all: {what}; pass --base_model")
    return next(iter(named))


def check_against_base(
    adapters: Iterable[Adapter],
    base_name: str,
    is_folder: bool,
    shapes: Mapping[str, tuple[int, int]],
    bad: list[str] | None = None,
) -> list[Adapter]:
    """The adapters that belong to a base model.

    Args:
        base_name: what the base model is called on the hub, or its folder.
        is_folder: the name is a local path, so only shapes can be compared.
        shapes: (d_out, d_in) of the base model's linear layers by module name.
        bad: takes why an adapter is left out, as in `load_library`.

    Raises:
        InputError: another base model is named, or a module does not exist or fit.
    """
    found = []
    for adapter in adapters:
        with _or_left_out(bad):
            _check_base(adapter, base_name, is_folder, shapes)
            found.append(adapter)
    return _some(found, bad)


def _check_base(
    adapter: Adapter, base_name: str, is_folder: bool, shapes: Mapping[str, tuple[int, int]]
) -> None:
    where = f"adapter {adapter.name} ({adapter.folder.path})"
    stated = adapter.folder.base_model
    if stated and not is_folder and stated.casefold() != base_name.casefold():
        raise InputError(
            f"{where}: expected an adapter of {base_name}, got one of {stated}; "
            "leave it out of --adapters or pass its --base_model"
        )
    for module, shape in adapter.folder.shapes.items():
        if shapes.get(module) != shape:
            had = f"{shapes[module]}" if module in shapes else "no such linear layer"
            raise InputError(
                f"{where}: {module} has shape {shape}, but {base_name} has {had} there; "
                "is it an adapter of another base model?"
            )


def last_block(adapters: Sequence[Adapter]) -> list[str]:
    """The modules that adapters change in one block: the last of the blocks that most adapters change."""
    blocks: dict[str, list[set[str]]] = {}
    for adapter in adapters:
        mine: dict[str, set[str]] = {}
        for module in adapter.folder.shapes:
            mine.setdefault(_block(module), set()).add(module)
        for block, modules in mine.items():
            blocks.setdefault(block, []).append(modules)
    best = max(blocks, key=lambda block: (len(blocks[block]), _number(block)))
    return sorted(set.union(*blocks[best]))


def _block(module: str) -> str:
    """`model.layers.3.self_attn.q_proj` is in `model.layers.3`; one outside of blocks is its own block."""
    found = re.match(r"(.*?\.\d+)\.", module)
    return found[1] if found else module


def _number(block: str) -> int:
    found = re.search(r"\.(\d{1,9})$", block)
    return int(found[1]) if found else -1
