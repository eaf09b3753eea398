"""GGUF files for llama.cpp: adapters, by its own converter, and the base model that they belong to.

The converter knows how each architecture's weights are laid out. Loads no model.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from merge.folders import open_adapter, write_adapter
from router.model.base import EMBEDDED_ID, embedded_folder, embedded_gguf
from router.serving.names import Served
from router.system.errors import InputError
from router.system.files import remaking
from router.system.hub import fetch

CONVERTER = "convert_lora_to_gguf.py"


def base_gguf(served: Served, given: Path | None) -> Path:
    """The base model's file: the one that was given, or that of the embedded model.

    Raises:
        InputError: there is none.
    """
    if given is None and served.base == EMBEDDED_ID:
        return embedded_gguf()
    if given is None or not given.is_file():
        raise InputError(f"--gguf: expected {served.base} as a GGUF file, got {given or 'none'}")
    return given


def converted(served: Served, out: Path, llama_cpp: Path | None) -> dict[str, Path]:
    """Converts adapters into a folder, which is replaced; the name of each file says which adapter it is.

    Args:
        llama_cpp: a checkout of llama.cpp.

    Returns:
        The files by the adapters' names, in the same order.

    Raises:
        InputError: the folder is somebody else's, there is no converter, or it fails.
    """
    script = (llama_cpp or Path()) / CONVERTER
    if llama_cpp is None or not script.is_file():
        got = f"no {CONVERTER} in {llama_cpp}" if llama_cpp else "none"
        raise InputError(f"--llama_cpp: expected a checkout of llama.cpp, whose converter is run, got {got}")
    base = _config(served)
    with remaking(out) as files:
        plain = files.parent / "plain"
        for name, path in served.folders.items():
            # The converter leaves out the scales of rsLoRA and of single modules: they go into the factors.
            write_adapter(plain, dict(open_adapter(path).read_all()), served.base, max_rank=served.rank)
            file = files / _file(name)
            command = [sys.executable, *map(str, (script, "--base", base, "--outfile", file, plain))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not file.is_file():
                reason = (done.stderr.strip() or "it wrote nothing").splitlines()[-1]
                raise InputError(f"{script}: cannot convert {name} ({path}): {reason}")
    return {name: out / _file(name) for name in served.folders}


def _file(name: str) -> str:
    return f"{quote(name, safe='')}.gguf"


def _config(served: Served) -> Path:
    """A folder with the base model's configuration."""
    if served.base == EMBEDDED_ID:
        return embedded_folder()
    if Path(served.base).is_dir():
        return Path(served.base)
    spec = f"{served.base}@{served.revision}" if served.revision else served.base
    return fetch(spec, ["*.json"], where=f"{spec}: no such folder with a configuration")[0]
