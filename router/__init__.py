"""Routes unlabelled queries over a library of LoRA adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from router.api import Router

__all__ = ["Router"]


def __getattr__(name: str) -> Any:
    """`Router` when it is asked for: importing it takes seconds, and `--help` does without."""
    if name == "Router":
        from router.api import Router

        return Router
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
