"""Downloads from the Hugging Face hub, into its own cache. Knows neither models nor adapters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from router.system.errors import InputError, reason


class HubError(InputError):
    """The hub could not provide a repository."""


def fetch(
    spec: str,
    patterns: Sequence[str],
    local_only: bool = False,
    without: Sequence[str] = (),
    where: str = "no such folder",
) -> tuple[Path, str, str]:
    """Fetches a repository, `ID[@REVISION]`.

    Args:
        patterns: the files to fetch.
        local_only: these files must be in the cache already.
        without: files that are not fetched, whatever `patterns` says.
        where: begins the error: which flag names it, and where else it was looked for.

    Returns:
        The repository's folder in the cache, its id, and its commit.

    Raises:
        HubError: there is no such repository or revision, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = spec.partition("@")
    # The client lets errors through of what it speaks HTTP with, httpx or httpx2 by its version, which are no
    # OSErrors; most of hf_xet's are no more than RuntimeErrors.
    failures: Any = (
        HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError, *HfHubHTTPError.__bases__
    )  # fmt: skip
    try:
        folder = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=list(patterns),
            ignore_patterns=list(without) or None,
            local_files_only=local_only,
        )
    except failures as error:
        raise HubError(
            f"{where}, and the hub could not give it ({reason(error)}). Where there is no network, download "
            "it elsewhere and pass its folder"
        ) from error
    return Path(folder), name, Path(folder).name
