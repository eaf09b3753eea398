"""Tensors kept on disk between runs, under names made from all that they depend on.

They are safetensors files in the cache folder. A reader finds a whole file or none. Any of them may be
deleted; it is computed again when it is needed.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge.folders import CONFIG_FILE
from router.constants import TEMPLATE, TOKENIZER
from router.library.adapters import Adapter
from router.system.files import cache_folder, for_others, sha256_of


def content(adapter: Adapter) -> str:
    """A name made from an adapter's weights, its configuration (with its scale), and its chat template."""
    files = [adapter.folder.path / name for name in (CONFIG_FILE, TEMPLATE, TOKENIZER)]
    with adapter.named():
        digests = [sha256_of(file) if file.is_file() else "" for file in files]
    return hashlib.sha256(" ".join([adapter.sha256, *digests]).encode()).hexdigest()[:32]


def each_kept(
    names: Sequence[str], make: Callable[[list[int]], Iterable[dict[str, Tensor]]]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The number of each name with the tensors kept under it; those that are missing are made and kept.

    Args:
        make: makes the tensors of the names with these numbers, in one go.
    """
    missing = []
    for n, name in enumerate(names):
        if (known := load(name)) is None:
            missing.append(n)
        else:
            yield n, known
    for n, made in zip(missing, make(missing) if missing else (), strict=True):
        save(names[n], made)
        yield n, made


def load(name: str) -> dict[str, Tensor] | None:
    """The tensors kept under a name; None if there are none, or they cannot be read."""
    try:
        return load_file(_file(name))
    except (OSError, SafetensorError):
        return None


def save(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Keeps tensors under a name, `folder/name`; if that fails, the next run computes them again."""
    file = _file(name)
    with suppress(OSError, SafetensorError):  # a full disk raises the latter
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as work:
            part = Path(work) / "part"
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, part)
            for_others(part)
            part.replace(file)


def _file(name: str) -> Path:
    return cache_folder() / f"{name}.safetensors"
