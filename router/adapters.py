"""A library of adapters: where they are, which revision, are they sound. Knows nothing of queries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from merge.factors import Factors
from merge.folders import CONFIG_FILE, WEIGHTS_FILE, AdapterError, AdapterFolder, open_adapter
from router.base import sha256_of
from router.constants import BASE_COLUMN, COMPETITION, COMPETITION_ADAPTERS, LIBRARY
from router.errors import InputError

CARD_FILE = "README.md"  # an adapter's model card, as on the hub


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
            InputError: a value is not finite, or the file broke off.
        """
        try:
            return self._finite(module, self.folder.read(module))
        except OSError as error:
            raise InputError(f"adapter {self.name} ({self.folder.path}): cannot be read: {error}") from error

    def read_all(self) -> Iterator[tuple[str, Factors]]:
        """Every module's update in float32, one after the other.

        Raises:
            InputError: a value is not finite, or the file broke off.
        """
        try:
            for module, update in self.folder.read_all():
                yield module, self._finite(module, update)
        except OSError as error:
            raise InputError(f"adapter {self.name} ({self.folder.path}): cannot be read: {error}") from error

    def _finite(self, module: str, update: Factors) -> Factors:
        if torch.isfinite(update.a).all() and torch.isfinite(update.b).all():
            return update
        raise InputError(
            f"adapter {self.name} ({self.folder.path}): {module} holds values that are not "
            "finite; leave the adapter out of --adapters"
        )


def load_library(specs: Sequence[str], local_only: bool = False) -> list[Adapter]:
    """Finds and checks adapters.

    Args:
        specs: folders, folders of folders, names in data/library, hub ids (`ID[@REVISION]`), or
            the single word `competition`.
        local_only: nothing is fetched from the hub.

    Returns:
        The adapters in the order given, folders of folders in order of name.

    Raises:
        InputError: an adapter is missing, broken, of an unsupported kind, or named like another.
    """
    adapters: list[Adapter] = []
    for spec in COMPETITION_ADAPTERS if list(specs) == [COMPETITION] else specs:
        for path, revision in find(spec, local_only):
            try:
                folder = open_adapter(path)
            except AdapterError as error:
                raise InputError(str(error)) from error
            name = spec.partition("@")[0].rsplit("/", 1)[-1] if revision else path.resolve().name
            adapters.append(Adapter(name, folder, sha256_of(path / WEIGHTS_FILE), revision))
    names = [adapter.name for adapter in adapters]
    for adapter in adapters:
        if names.count(adapter.name) > 1 or adapter.name == BASE_COLUMN:
            taken = "the base model" if adapter.name == BASE_COLUMN else "two adapters"
            raise InputError(
                f"adapter {adapter.name} ({adapter.folder.path}): {taken} would share a column of that "
                "name; rename the folder"
            )
    return adapters


def find(spec: str, local_only: bool = False) -> Iterator[tuple[Path, str | None]]:
    """The folders that one of the specs of `load_library` stands for, with their revisions; not opened.

    Raises:
        InputError: there are none.
    """
    path = Path(spec)
    if not path.is_dir() and (LIBRARY / spec).is_dir():
        path = LIBRARY / spec
    if path.is_dir():
        if (path / CONFIG_FILE).exists():
            yield path, None
            return
        found = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
        if not found:
            raise InputError(
                f"--adapters {spec}: expected a PEFT folder or a folder of such folders, found neither"
            )
        for child in found:
            yield child, None
        return
    yield from_hub(spec, local_only)


def from_hub(spec: str, local_only: bool = False) -> tuple[Path, str]:
    """Fetches an adapter, `ID[@REVISION]`; returns its folder in the hub's cache and its commit.

    Args:
        local_only: it must be in the cache already.

    Raises:
        InputError: the hub cannot give it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = spec.partition("@")
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE],
                local_files_only=local_only,
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"--adapters {spec}: no such folder, no such name in {LIBRARY}, and the hub could not give "
            f"it ({reason}). Where there is no network, download the adapter elsewhere and pass its folder."
        ) from error
    return folder, folder.name


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
    adapters: Iterable[Adapter], base_name: str, is_folder: bool, shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuses adapters of another base model.

    Args:
        base_name: what the base model is called on the hub, or its folder.
        is_folder: the name is a local path, so only shapes can be compared.
        shapes: (d_out, d_in) of the base model's linear layers by module name.

    Raises:
        InputError: another base model is named, or a module does not exist or fit.
    """
    for adapter in adapters:
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
