"""Defaults that --help shows; apart from the code that measures, so that help pages load none of it."""

from __future__ import annotations

PAST_LENGTH = 256  # tokens in the key/value cache, where costs are measured
