"""Progress bars: none where there is no terminal, and none where TQDM_DISABLE is set, as by --quiet."""

from __future__ import annotations

import os
from typing import Any

from tqdm import tqdm


def progress(iterable: Any = None, **settings: Any) -> Any:
    """A tqdm bar; tqdm itself asks the variable only where `disable` is not given."""
    return tqdm(iterable, disable=bool(os.environ.get("TQDM_DISABLE")) or None, **settings)
