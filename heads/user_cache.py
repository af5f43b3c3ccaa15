"""Where what can be made again is kept between runs: the user's cache, or the directory that MEDUSA_EXPORT_CACHE names."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

VARIABLE, OFF = "MEDUSA_EXPORT_CACHE", "off"


def user_cache() -> Path | None:
    """The directory; None where MEDUSA_EXPORT_CACHE is "off"."""
    given = os.environ.get(VARIABLE)
    if given == OFF:
        return None
    return Path(given).expanduser() if given else platformdirs.user_cache_path("medusa-export", appauthor=False)
