"""The methods behind `-m`: one file each, found by its name.

To add one, put a file here that defines a subclass of `router.pipeline.steps.Method`, or of
`router.kit.Merges` (the starter kit's contract). Nothing else has to be edited.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from router.system.errors import InputError

if TYPE_CHECKING:
    from router.kit import Merges
    from router.pipeline.steps import Method


def method_names() -> list[str]:
    """The names of all methods, in alphabetical order; imports none of them."""
    return sorted(module.name for module in iter_modules(__path__))


def load_method(name: str) -> type[Merges] | type[Method]:
    """The class of one method: the one that its file defines itself.

    Raises:
        InputError: there is no such method, or its file defines none, or several.
    """
    from router.kit import Merges
    from router.pipeline.steps import Method

    if name not in method_names():
        raise InputError(f"method: expected one of {', '.join(method_names())}, got {name!r}")

    module = import_module(f"{__name__}.{name}")
    kinds = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, (Merges, Method))
        and value.__module__ == module.__name__
    ]
    if len(kinds) != 1:
        raise InputError(
            f"-m {name}: expected one subclass of Merges or Method in {module.__file__}, found {len(kinds)}"
        )
    return kinds[0]


def all_merge_handlers() -> dict[str, type[Merges]]:
    """Every method by name, as a class with the starter kit's contract."""
    from router.kit import Handler, Merges

    handlers: dict[str, type[Merges]] = {}
    for name in method_names():
        made = load_method(name)
        handlers[name] = made if issubclass(made, Merges) else type(name, (Handler,), {"make": made})
    return handlers
