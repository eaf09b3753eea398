"""The methods behind `-m`: one file each, found by its name.

To add one, put a file here that defines a subclass of `router.pipeline.steps.Method`, or of
`router.kit.Merges` (the starter kit's contract). Nothing else has to be edited.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from router.system.errors import InputError

if TYPE_CHECKING:
    from router.kit import Merges
    from router.pipeline.processes import Processes
    from router.pipeline.steps import Method
    from router.settings import Settings


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


def check_flags(
    name: str, method: type, settings: Settings, limited: bool = False, processes: Processes | None = None
) -> None:  # fmt: skip
    """Refuses flags that do not go together, or not with the method or with several processes.

    Args:
        method: the class of this name.
        limited: whether there is a --time_limit.

    Raises:
        InputError: they do not.
    """
    from router.pipeline.per_token import PerToken
    from router.pipeline.steps import Method

    several = processes is not None and processes.count > 1
    kit = not issubclass(method, Method)
    vllm = settings.engine == "vllm"
    refused: dict[str, object] = {
        "--engine vllm: expected the package vllm, found none; pip install 'proto-route[vllm]'": (
            vllm and find_spec("vllm") is None
        ),
        f"--engine vllm: expected a method that makes variants, got {name}": (
            vllm and (kit or issubclass(method, PerToken))
        ),
        "--engine vllm: expected one process; leave torchrun out": vllm and several,
        "--time_limit: expected --engine transformers, since vLLM answers many queries at once": (
            vllm and limited
        ),
        "--device_map: expected --engine transformers, since vLLM places the model itself": (
            vllm and settings.device_map
        ),
        "--device_map: expected one process, which takes all devices; leave torchrun out": (
            settings.device_map and several
        ),
        f"-m {name}: expected no --device_map; a starter-kit method takes none": kit and settings.device_map,
        f"-m {name}: expected one process; a starter-kit method runs in one": kit and several,
    }
    for why, wrong in refused.items():
        if wrong:
            raise InputError(why)


def all_merge_handlers() -> dict[str, type[Merges]]:
    """Every method by name, as a class with the starter kit's contract."""
    from router.kit import Handler, Merges

    handlers: dict[str, type[Merges]] = {}
    for name in method_names():
        made = load_method(name)
        handlers[name] = made if issubclass(made, Merges) else type(name, (Handler,), {"make": made})
    return handlers
