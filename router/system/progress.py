"""Progress bars, shown only on a terminal and never if TQDM_DISABLE is set, which --quiet does."""

import os
from typing import Any

from tqdm import tqdm


def progress(iterable: Any = None, **settings: Any) -> Any:
    """A tqdm bar. tqdm itself reads TQDM_DISABLE only if `disable` is not given."""
    return tqdm(iterable, disable=bool(os.environ.get("TQDM_DISABLE")) or None, **settings)
