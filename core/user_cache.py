"""Where what can be made again is kept between runs: the user's cache, or the directory that MEDUSA_EXPORT_CACHE names."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE, OFF = "MEDUSA_EXPORT_CACHE", "off"


def user_cache() -> Path | None:
    """The directory; None where MEDUSA_EXPORT_CACHE is "off"."""
    given = os.environ.get(VARIABLE)
    if given == OFF:
        return None
    if given:
        return Path(given).expanduser()
    import platformdirs  # not in a container of TensorRT-LLM, which imports this

    return platformdirs.user_cache_path("medusa-export", appauthor=False)
