"""A library of adapters: opened, checked, and read module by module. Knows nothing of queries."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from merge.factors import Factors, gram
from merge.folders import WEIGHTS_FILE, AdapterError, AdapterFolder, open_adapter
from router.constants import BASE_COLUMN
from router.library.sources import CARD_FILE, expand, find
from router.system.errors import InputError, out_of_memory, printable
from router.system.files import sha256_of

log = logging.getLogger(__name__)
LONGEST_CARD = 1 << 20  # characters
# How names of quantised copies of a base model end.
BITS = r"bnb-(4bit|8bit|nf4)|(awq|gptq)(-int[48]|-[48]bit)?|fp8(-dynamic)?|nvfp4|quantized\.w\d+a\d+"
QUANTISED = rf"(-unsloth)?-({BITS})$"
TAKEN = (BASE_COLUMN, "id", "variant")  # columns of the routing table that are no adapter's


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

    @property
    def where(self) -> str:
        """The adapter in a sentence for a person."""
        return f"adapter {self.name} ({self.folder.path})"

    def read(self, module: str) -> Factors:
        """One module's update in float32; see `read_all`."""
        return next(self.read_all([module]))[1]

    def read_all(self, modules: Sequence[str] | None = None) -> Iterator[tuple[str, Factors]]:
        """Each of these modules' updates in float32, one after the other; None takes all, in order of name.

        Raises:
            InputError: a value is not finite, or the file cannot be read.
        """
        with self.named():
            for module, update in self.folder.read_all(modules):
                # So that products of its factors are finite, too.
                if not torch.isfinite(update.a.norm() * update.b.norm()):
                    raise InputError(
                        f"{self.where}: {module} holds values that are not finite, or too large to multiply "
                        "in float32; leave the adapter out of --adapters"
                    )
                yield module, update

    @contextmanager
    def named(self) -> Iterator[None]:
        """Names the adapter whose file cannot be read."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.where}: cannot be read: {error}") from error

    def check_unchanged(self) -> None:
        """Refuses an adapter whose weights were replaced since it was opened.

        What is kept on disk under their hash would be another's, for good.

        Raises:
            InputError: they were.
        """
        with self.named():
            now = sha256_of(self.folder.path / WEIGHTS_FILE)
        if now != self.sha256:
            raise InputError(f"{self.where}: {WEIGHTS_FILE} was changed while it was read; run again")


class Examined(NamedTuple):
    """An adapter that was looked for: None if it cannot be opened, and why it cannot be used, if so."""

    name: str
    adapter: Adapter | None = None
    error: InputError | None = None


def examined(specs: Sequence[str], local_only: bool = False, values: bool = True) -> Iterator[Examined]:
    """Finds and opens adapters one after the other, also those that cannot be used.

    Args:
        specs, local_only: as of `load_library`.
        values: whether every value is read, since one may not be finite, or all may be zero; else they are
            checked to be finite when they are read.
    """
    names = set[str]()
    for spec in expand(specs):
        try:
            sources = find(spec, local_only)
        except InputError as error:
            yield Examined(Path(spec.partition("@")[0]).name, error=error)
            continue
        for source in sources:
            name, path, revision = source
            adapter: Adapter | None = None
            unusable: InputError | None = None
            try:
                if name in TAKEN or name in names or not name.isprintable():
                    raise InputError(
                        f"adapter {name!r} ({str(path)!r}): expected a name that can be printed and is no "
                        f"other adapter's, and none of {', '.join(TAKEN)}, which are columns of the routing "
                        "table; rename the folder"
                    )
                adapter = Adapter(name, open_adapter(path), sha256_of(path / WEIGHTS_FILE), revision)
                if values and sum(float(gram([update])) for _, update in adapter.read_all()) <= 0:
                    raise InputError(f"{path}: expected an update, got zero at every module")
                names.add(name)
            except InputError as error:
                unusable = error
            except (AdapterError, OSError) as error:
                unusable = InputError(str(error))
                unusable.__cause__ = error  # which may be for want of memory
            yield Examined(name, adapter, unusable)


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
    return _usable(examined(specs, local_only, bad is not None), bad)


def _usable(every: Iterable[Examined], bad: list[str] | None) -> list[Adapter]:
    """The adapters that can be used; see `load_library`."""
    usable = []
    for _, adapter, error in every:
        if error and (bad is None or out_of_memory(error)):
            raise error
        if error and bad is not None:
            bad.append(str(error))
        elif adapter:
            usable.append(adapter)
    if bad and not usable:
        raise InputError(f"--skip_bad: expected an adapter that can be used, but: {'; '.join(bad)}")
    return usable


def card(folder: Path) -> tuple[str, str]:
    """An adapter's model card, its YAML header and its text; "" where there is none."""
    text = ""
    file = folder / CARD_FILE
    if file.is_file():
        with file.open(encoding="utf-8-sig", errors="replace") as card:
            text = card.read(LONGEST_CARD)
    match = re.match(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", text, re.DOTALL)
    return (match[1], text[match.end() :]) if match else ("", text)


def base_of(adapters: Iterable[Adapter]) -> str:
    """The one base model that all adapters name.

    Raises:
        InputError: they name several, or none at all.
    """
    named = {adapter.folder.base_model: adapter.name for adapter in adapters if adapter.folder.base_model}
    # Folders of one name may be two models.
    models = {model_of(base) if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else base for base in named}
    if len(models) != 1:
        what = "; ".join(f"{adapter} names {base}" for base, adapter in named.items()) or "none named"
        raise InputError(f"--adapters: expected one base model for all: {what}; pass --base_model")
    return min(named, key=lambda base: bool(re.search(QUANTISED, base.casefold())))  # the first that is whole


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
    adapters = list(adapters)
    named = sorted({model_of(adapter.folder.base_model) for adapter in adapters if adapter.folder.base_model})
    if is_folder and len(named) > 1:
        log.warning("%s", printable(f"adapters of {', '.join(named)} are all taken for those of {base_name}"))
    every = (
        Examined(adapter.name, adapter, misfit(adapter, base_name, is_folder, shapes)) for adapter in adapters
    )
    return _usable(every, bad)


def misfit(
    adapter: Adapter, base_name: str, is_folder: bool, shapes: Mapping[str, tuple[int, int]]
) -> InputError | None:
    """Why an adapter does not belong to a base model, if so; see `check_against_base`."""
    where = adapter.where
    stated = adapter.folder.base_model
    if stated and not is_folder and model_of(stated) != model_of(base_name):
        return InputError(
            f"{where}: expected an adapter of {base_name}, got one of {stated}; "
            "leave it out of --adapters or pass its --base_model"
        )
    for module, shape in adapter.folder.shapes.items():
        if shapes.get(module) != shape:
            had = shapes.get(module, "no torch.nn.Linear below its output layer")
            return InputError(
                f"{where}: {module} has shape {shape}, but {base_name} has {had} there; "
                "is it an adapter of another base model, or of unsupported layers, such as Conv1D? "
                "If PEFT loads it, it has older names: save it again with PEFT"
            )
    return None


def model_of(name: str) -> str:
    """A base model's name, whoever uploaded it, quantised or not: adapters are trained on either.

    Example:
        >>> model_of("unsloth/llama-3-8b-bnb-4bit") == model_of("meta-llama/Meta-Llama-3-8B")
        True
    """
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]  # of a folder, also one of Windows
    return re.sub(f"^meta-|{QUANTISED}", "", last.casefold())  # Llama's is on the hub with and without


def last_block(adapters: Sequence[Adapter], within: str = "") -> list[str]:
    """The modules that adapters change in one block: the last of the blocks that most adapters change.

    `model.layers.3.self_attn.q_proj` is in `model.layers.3`; a module outside of blocks is its own block.

    Args:
        within: how the names of the modules that count begin, for an adapter that changes any of them.
    """
    blocks: dict[tuple[str, int], dict[str, set[str]]] = {}  # by adapter
    for adapter in adapters:
        inside = [module for module in adapter.folder.shapes if module.startswith(within)]
        for module in inside or adapter.folder.shapes:
            match = re.match(r"(.*?)\.(\d{1,9})\.", module)
            block = (match[1], int(match[2])) if match else (module, -1)
            blocks.setdefault(block, {}).setdefault(adapter.name, set()).add(module)
    best = max(blocks, key=lambda block: (len(blocks[block]), block[1]))
    return sorted(set.union(*blocks[best].values()))
