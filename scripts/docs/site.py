"""Builds the API pages from the docstrings; `python -m scripts.docs.site` writes them to build/site."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules, walk_packages
from typing import get_type_hints
from unittest.mock import patch

import pdoc
import pdoc.render

import merge
import router

LEFT_OUT = ("__main__", "integrations")  # what plugs into other projects imports them


def build(folder: Path, show_source: bool = True) -> None:
    """Writes index.html and a page for each module of `router` and `merge`."""
    for package in (router, merge):
        for module in walk_packages(package.__path__, f"{package.__name__}."):
            if not set(module.name.split(".")) & set(LEFT_OUT):
                _resolve_named_tuples(module.name)
    # pdoc takes `__all__` for all that a package has, so the modules of `router` are named one by one.
    rooms = [
        f"router.{module.name}" for module in iter_modules(router.__path__) if module.name not in LEFT_OUT
    ]
    pdoc.render.configure(docformat="google", show_source=show_source)
    # What is in `__all__` comes into being on first use, and pdoc only looks.
    with patch.dict(vars(router), {name: getattr(router, name) for name in router.__all__}):
        pdoc.pdoc("merge", "router", *rooms, output_directory=folder)


def _resolve_named_tuples(name: str) -> None:
    """Turns annotations of a module's named tuples into types, which pdoc cannot do."""
    for found in vars(import_module(name)).values():
        if hasattr(found, "_fields") and found.__module__ == name:
            found.__new__.__annotations__ = get_type_hints(found)


if __name__ == "__main__":
    build(Path("build/site"))
