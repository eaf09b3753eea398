"""Where adapters are: in a folder, in data/library, or on the hub. Opens none of them."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from merge.folders import CONFIG_FILE, WEIGHTS_FILE
from router.constants import COMPETITION, COMPETITION_ADAPTERS, LIBRARY, TEMPLATE, TOKENIZER
from router.system.errors import InputError, printable
from router.system.files import is_folder
from router.system.hub import HubError, fetch

log = logging.getLogger(__name__)
CARD_FILE = "README.md"  # an adapter's model card, as on the hub
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, TEMPLATE, TOKENIZER)


class Source(NamedTuple):
    """An adapter's folder, not opened yet."""

    name: str  # the column in the routing table
    path: Path
    revision: str | None  # commit on the hub, None for local folders


def expand(specs: Sequence[str]) -> list[str]:
    """The specs, or the competition's adapters if the only one is the word `competition`."""
    return list(COMPETITION_ADAPTERS if list(specs) == [COMPETITION] else specs)


def find(spec: str, local_only: bool = False) -> list[Source]:
    """The adapters that a spec stands for: a folder, a folder of folders, a name in data/library, a hub id.

    Raises:
        InputError: there are none, the folder cannot be read, or the hub cannot provide it.
    """
    path = next((path for path in (Path(spec), LIBRARY / spec) if is_folder(path)), None)
    if path is None and Path(spec) == LIBRARY:
        raise InputError(
            f"--adapters {spec}: expected the default library there, found none; run from a clone of the "
            "repository, or name your own adapters"
        )
    if path is None:
        where = f"--adapters {spec}: no such folder, no such name in {LIBRARY}"
        path, repo, commit = fetch(spec, FILES, local_only, where=where)
        return [Source(repo.rsplit("/", 1)[-1], path, commit)]
    try:
        if (path / CONFIG_FILE).exists():  # a link keeps its own name
            # As PEFT saves a model with several adapters; the Trainer saves steps of the same one.
            more = sorted(file.parent.name for file in path.glob(f"*/{CONFIG_FILE}"))
            if more := [name for name in more if not re.fullmatch(r"checkpoint-\d+", name)]:
                log.warning(
                    "%s", printable(f"{path}: an adapter, so those in it are left out: {', '.join(more)}")
                )
            return [Source(Path(os.path.normpath(path.absolute())).name, path, None)]
        # With links to nowhere, of which none is to be left out without a word.
        there = (child for child in path.iterdir() if child.is_dir() or not child.exists())
        folders = sorted(child for child in there if not child.name.startswith("."))
    except OSError as error:
        raise InputError(
            f"--adapters {spec}: expected a folder that can be read ({error}); change its permissions, or "
            "name another"
        ) from error
    if not folders:
        raise InputError(
            f"--adapters {spec}: expected a PEFT folder or a folder of such folders, found neither"
        )
    return [Source(child.name, child, None) for child in folders]


def is_here(spec: str) -> bool:
    """Whether there is nothing to download: a spec is here, or names nothing that the hub could have."""
    from huggingface_hub.errors import HFValidationError

    try:
        find(spec, local_only=True)
    except InputError as error:
        return not isinstance(error, HubError) or isinstance(error.__cause__, HFValidationError)
    return True
