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
        from router.system.version import own_version

        return own_version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
