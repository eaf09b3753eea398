"""What variants are called on a server, and which of a router's folders they are in. Knows no models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.folders import CONFIG_FILE
from router.errors import InputError
from router.files import is_folder, read_json
from router.routing.variants import VARIANTS

AUTO = "auto"  # the model that a client names to have its request routed


def served(number: int) -> str:
    """The name of a variant on the server.

    Example:
        >>> served(3)
        'variant-3'
    """
    return f"variant-{number}"


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
        InputError: there are none.
    """
    if saved := _json(folder / "router.json", {"variants": list, "base_model": str, "dtype": str}):
        about = saved | {"base": saved | {"name": saved["base_model"]}}
    else:
        about = _json(folder / "run.json", {"variants?": list, "base?": {"name": str, "dtype": str}}) or {}
    if not about.get("variants") or not about.get("base"):
        raise InputError(f"{folder}: expected a saved router or a finished run with variants, found neither")
    base = about["base"]
    folders, ranks, modules = {}, [1], set()
    for number in range(len(about["variants"])):
        path = folder / VARIANTS / str(number)
        if config := _json(path / CONFIG_FILE, {"r": int, "target_modules": [str]}):
            folders[served(number)] = path
            ranks.append(config["r"])
            modules |= set(config["target_modules"])
    name = str(Path(base["name"]).resolve()) if is_folder(base["name"]) else base["name"]
    return Served(name, base.get("revision"), base["dtype"], folders, max(ranks), sorted(modules))


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
