"""A cache of its own for a measurement that must not find what an earlier one kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch


@contextmanager
def empty_cache() -> Iterator[None]:
    """What is kept between runs is kept in a folder of its own, empty at first, inside the block."""
    with tempfile.TemporaryDirectory() as folder, patch("router.disk.cache_folder", lambda: Path(folder)):
        yield
