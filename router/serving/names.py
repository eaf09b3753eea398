"""The names of variants and adapters on a server, and their folders. Knows no models."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge.folders import CONFIG_FILE, AdapterError, open_adapter
from router.constants import BASE_COLUMN, TEMPLATE
from router.library.adapters import load_library
from router.model.base import EMBEDDED, EMBEDDED_ID
from router.pipeline.record import RECORD, BaseRecord, Record, VariantRecord
from router.pipeline.saved import ABOUT, Saved
from router.pipeline.served import content_of, served
from router.routing.variants import VARIANTS, Variant
from router.system.errors import InputError
from router.system.files import is_folder, is_still

AUTO = "auto"  # the model that a client names to have its request routed
# A run may come from a stranger, and its words go to a command line: none of them is a flag or a pattern.
PLAIN = re.compile(r"[\w/][\w./-]*", re.ASCII)


@dataclass(frozen=True)
class Served:
    """The variants of a saved router or a finished run, as a server needs them.

    Attributes:
        base: name of the base model; of a folder, the whole path.
        revision: its commit on the hub, None elsewhere.
        dtype: as transformers calls it.
        folders: of the variants that have one, by their names on the server.
        rank: the highest rank among them.
        modules: kinds of modules that any of them changes, from the names of the weights.
        templates: whether one of them brings a chat template.
        template: of all others, where it is not the base model's own.
    """

    base: str
    revision: str | None
    dtype: str
    folders: dict[str, Path]
    rank: int
    modules: list[str]
    templates: bool = False
    template: Path | None = None


def read_served(folder: Path, base_model: str | None = None) -> Served:
    """Reads the variants in the folder of a saved router, or in the output folder of a run.

    Args:
        base_model: where the base model is now, as flags name it; None is where it was.

    Raises:
        InputError: there are none, one is gone or damaged, the run's method makes none, or a name is not
            plain, or `base_model` is none.
    """
    record, base, variants, files = _made(folder)
    if base_model:
        place, _, commit = (base_model, "", "") if is_folder(base_model) else base_model.partition("@")
        if not is_folder(place) and not PLAIN.fullmatch(place):
            raise InputError(f"--base_model {base_model}: expected a folder, or a name as the hub has it")
        base = replace(base, name=EMBEDDED_ID if place == EMBEDDED else place, revision=commit or None)

    def another(path: Path) -> InputError:
        return InputError(
            f"{path}: expected what {record.name} names, got another or none, or one of another version; put "
            "it back, or make it again"
        )

    folders = {}
    ranks = [1]
    modules = set()
    for number, variant in enumerate(variants):
        path = folder / VARIANTS / str(number)
        if not any(share for name, share in variant.weights.items() if name != BASE_COLUMN):
            continue
        if isinstance(variant, VariantRecord) and not variant.folder:
            raise InputError(f"{folder}: its method weighs adapters for each token, which no server does")
        if not (path / CONFIG_FILE).exists():
            raise another(path)
        try:
            by_module = open_adapter(path).ranks
        except AdapterError as error:
            raise InputError(str(error)) from error
        if content_of(path) != variant.sha256:
            raise another(path)
        folders[served(number, variant.sha256)] = path
        ranks += by_module.values()
        modules |= {module.rpartition(".")[2] for module in by_module}
    known = is_folder(base.name)
    revision = base.revision
    for word in (*modules, revision or "main", "folder" if known else base.name):
        if not PLAIN.fullmatch(word):
            raise InputError(
                f"{record}: expected plain names of its base model and of its variants' modules, got "
                f"{word!r:.80}; do not serve what a stranger made like this"
            )
    name = str(Path(base.name).resolve()) if known else base.name
    templates = any((path / TEMPLATE).is_file() for path in folders.values())
    template = folder / TEMPLATE if TEMPLATE in files else None
    if template and not is_still(template, files[TEMPLATE]):
        raise another(template)
    return Served(name, revision, base.dtype, folders, max(ranks), sorted(modules), templates, template)


def _made(folder: Path) -> tuple[Path, BaseRecord, Sequence[Variant | VariantRecord], Mapping[str, str]]:
    """Where the record of a saved router or of a run is, its base model, its variants and its files."""
    if (folder / ABOUT).is_file():
        saved = Saved.read(folder)
        base = BaseRecord(saved.base_model, saved.base_sha256, saved.dtype, saved.revision)
        return folder / ABOUT, base, saved.variants, saved.files
    try:
        run = Record.read(folder / RECORD)
        if run.base is None or not run.variants:
            raise ValueError("it has no variants")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder / RECORD}: expected a saved router, or a run with variants ({error}); run it again"
        ) from error
    return folder / RECORD, run.base, run.variants, run.files


def read_adapters(folder: Path) -> dict[str, Path]:
    """The folders of the adapters of a run that `read_served` takes, by their names; none of a saved router.

    Raises:
        InputError: they are not what they were.
    """
    if (folder / ABOUT).exists():
        return {}
    run = Record.read(folder / RECORD)
    specs = [run.located(spec) for spec in run.flags["adapters"]]
    # Those that the run left out are no matter.
    library = {adapter.name: adapter for adapter in load_library(specs, bad=[])}
    for name, about in run.adapters.items():
        if name not in library or not about.is_of(library[name]):
            raise InputError(
                f"{folder}: expected the adapters of the run in {', '.join(specs)}, but {name} is not there "
                "as it was; put it back, or run again"
            )
    return {name: library[name].folder.path for name in run.adapters}
