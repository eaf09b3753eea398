"""What a server calls variants and adapters, and which folders they are in. Knows no models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.folders import CONFIG_FILE
from router.constants import BASE_COLUMN
from router.errors import InputError
from router.files import is_folder, read_json
from router.library.adapters import load_library
from router.routing.variants import VARIANTS, served

AUTO = "auto"  # the model that a client names to have its request routed


@dataclass(frozen=True)
class Served:
    """The variants of a saved router or a finished run, as a server needs them.

    Attributes:
        base: name of the base model.
        revision: its commit on the hub, None elsewhere.
        dtype: as transformers calls it.
        folders: of the variants that have one, by their names on the server.
        rank: the highest rank among them.
        modules: kinds of modules that any of them changes.
    """

    base: str
    revision: str | None
    dtype: str
    folders: dict[str, Path]
    rank: int
    modules: list[str]


def read_served(folder: Path) -> Served:
    """Reads the variants in the folder of a saved router, or in the output folder of a run.

    Raises:
        InputError: there are none, one is gone, or the run's method makes none.
    """
    variants = [{"folder?": str, "weights?": {"*": float}}]
    if saved := _json(folder / "router.json", {"variants": variants, "base_model": str, "dtype": str}):
        about = saved | {"base": saved | {"name": saved["base_model"]}}
    else:
        shape = {"variants?": variants, "base?": {"name": str, "dtype": str}}
        about = _json(folder / "run.json", shape) or {}
        for one in about.get("variants") or []:
            if not one.get("folder") and set(one.get("weights") or {}) - {BASE_COLUMN}:
                raise InputError(
                    f"{folder}: expected variants to serve, but the run's method weighs its adapters for "
                    "each token, so that it has none that a server could load; run proto_route"
                )
    if not about.get("variants") or not about.get("base"):
        raise InputError(f"{folder}: expected a saved router or a finished run with variants, found neither")
    base = about["base"]
    folders, ranks, modules = {}, [1], set()
    for number, variant in enumerate(about["variants"]):
        path = folder / VARIANTS / str(number)
        config = _json(path / CONFIG_FILE, {"r": int, "target_modules": [str]})
        if config:
            folders[served(number)] = path
            ranks.append(config["r"])
            modules |= {name.rpartition(".")[2] for name in config["target_modules"]}
        elif any(share for own, share in (variant.get("weights") or {}).items() if own != BASE_COLUMN):
            record, again = ("router.json", "save the router") if saved else ("run.json", "run")
            raise InputError(
                f"{path}: expected variant {number}, which {record} names, found none; put its folder "
                f"back, or {again} again"
            )
    name = str(Path(base["name"]).resolve()) if is_folder(base["name"]) else base["name"]
    return Served(name, base.get("revision"), base["dtype"], folders, max(ranks), sorted(modules))


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
