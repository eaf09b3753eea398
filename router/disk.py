"""Tensors kept on disk between runs, under names made from all that they depend on.

They are safetensors in the cache folder. Whoever reads one finds all of it or nothing; any may be deleted,
and is computed again when it is needed.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge.folders import CONFIG_FILE
from router.adapters import Adapter
from router.base import cache_folder


def content(adapter: Adapter) -> str:
    """A name made from an adapter's weights and configuration, in which its scale is."""
    config = (adapter.folder.path / CONFIG_FILE).read_bytes()
    return hashlib.sha256(adapter.sha256.encode() + config).hexdigest()[:32]


def load(name: str) -> dict[str, Tensor] | None:
    """What is kept under a name; None if nothing is, or nothing that can be read."""
    try:
        return load_file(_file(name))
    except (OSError, SafetensorError):
        return None


def save(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Keeps tensors under a name, `folder/name`; where nothing can be kept, the next run computes again."""
    file = _file(name)
    with suppress(OSError, SafetensorError):  # a full disk is the latter
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as work:
            part = Path(work) / "part"
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, part)
            part.replace(file)


def _file(name: str) -> Path:
    return cache_folder() / f"{name}.safetensors"
