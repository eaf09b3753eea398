"""Routes unlabelled queries over a library of LoRA adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from router.api import Router

    __version__: str

__all__ = ["Router", "__version__"]


def __getattr__(name: str) -> Any:
    """Finds names on first use: importing `Router` takes seconds, and `--help` does not need it."""
    if name == "Router":
        from router.api import Router

        return Router
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("proto-route")
        except PackageNotFoundError:  # it runs from its folder without being installed
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
