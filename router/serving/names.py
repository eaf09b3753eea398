"""What a server calls variants and adapters, and which folders they are in. Knows no models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from merge.folders import CONFIG_FILE, WEIGHTS_FILE, AdapterError, AdapterFolder, open_adapter
from router.constants import BASE_COLUMN, TEMPLATE, Dtype
from router.library.adapters import load_library
from router.routing.variants import VARIANTS, served
from router.system.errors import InputError
from router.system.files import is_folder, read_json, sha256_of

AUTO = "auto"  # the model that a client names to have its request routed
# A run may come from a stranger, and its words go to a command line: none of them is a flag or a pattern.
PLAIN = re.compile(r"[\w/][\w./-]*", re.ASCII)
DTYPES = {*get_args(Dtype)} - {"auto"}
MADE = [{"folder?": str, "weights?": {"*": float}, "sha256?": str}]


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
    """

    base: str
    revision: str | None
    dtype: str
    folders: dict[str, Path]
    rank: int
    modules: list[str]
    templates: bool = False


def read_served(folder: Path) -> Served:
    """Reads the variants in the folder of a saved router, or in the output folder of a run.

    Raises:
        InputError: there are none, one is gone or damaged, the run's method makes none, or a name is not
            plain.
    """
    record, base, variants = _made(folder)
    folders, ranks, modules = {}, [1], set()
    for number, variant in enumerate(variants):
        path = folder / VARIANTS / str(number)
        if (path / CONFIG_FILE).exists():
            own, digest = _opened(path).ranks, variant.get("sha256") or ""
            if digest and sha256_of(path / WEIGHTS_FILE) != digest:
                raise InputError(
                    f"{path}: expected the weights that {record.name} names, got others; put them back, or "
                    "make them again"
                )
            folders[served(number, digest)] = path
            ranks += own.values()
            modules |= {module.rpartition(".")[2] for module in own}
        elif any(share for name, share in (variant.get("weights") or {}).items() if name != BASE_COLUMN):
            if record.name == "run.json" and not variant.get("folder"):
                raise InputError(f"{folder}: its method weighs adapters for each token, which no server does")
            raise InputError(
                f"{path}: expected variant {number}, which {record.name} names, found none; put its folder "
                "back, or make it again"
            )
    known, revision = is_folder(base["name"]), base.get("revision")
    for word in (*modules, revision or "main", "folder" if known else base["name"]):
        if not PLAIN.fullmatch(word):
            raise InputError(
                f"{record}: expected plain names of its base model and of its variants' modules, got "
                f"{word!r:.80}; do not serve what a stranger made like this"
            )
    name = str(Path(base["name"]).resolve()) if known else base["name"]
    templates = any((path / TEMPLATE).is_file() for path in folders.values())
    return Served(name, revision, base["dtype"], folders, max(ranks), sorted(modules), templates)


def _made(folder: Path) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """The record of a saved router or of a run, and what it says of the base model and of the variants."""
    saved = {"base_model": str, "revision?": str, "dtype": DTYPES, "variants": MADE}
    if about := _json(folder / "router.json", saved):
        return folder / "router.json", about | {"name": about["base_model"]}, about["variants"]
    run = {"base?": {"name": str, "revision?": str, "dtype": DTYPES}, "variants?": MADE}
    about = _json(folder / "run.json", run) or {}
    if not about.get("base") or not about.get("variants"):
        raise InputError(f"{folder}: expected a saved router or a finished run with variants, found neither")
    return folder / "run.json", about["base"], about["variants"]


def _opened(path: Path) -> AdapterFolder:
    try:
        return open_adapter(path)
    except AdapterError as error:
        raise InputError(str(error)) from error


def read_adapters(folder: Path) -> dict[str, Path]:
    """The folders of the adapters that a finished run names, by their names; none of a saved router.

    Raises:
        InputError: they are not what they were.
    """
    run = _json(folder / "run.json", {"flags": {"adapters": [str]}, "adapters": {"*": {"sha256": str}}})
    if (folder / "router.json").exists() or run is None:
        return {}
    specs = run["flags"]["adapters"]
    # Those that the run left out are no matter.
    found = {adapter.name: adapter for adapter in load_library(specs, bad=[])}
    for name, about in run["adapters"].items():
        if name not in found or found[name].sha256 != about["sha256"]:
            raise InputError(
                f"{folder}: expected the adapters of the run in {', '.join(specs)}, but {name} is not there "
                "as it was; put it back, or run again"
            )
    return {name: found[name].folder.path for name in run["adapters"]}


def _json(path: Path, shape: Any) -> Any:
    """What a JSON file holds; None if it is not there.

    Raises:
        InputError: it is no JSON, or of another shape.
    """
    try:
        return read_json(path, shape)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected JSON, got something else ({error}); write it again") from error
