"""What a served engine's metrics endpoint says, for tests that wait for it."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Mapping

SECONDS = 60.0


class Metrics:
    """Reads an endpoint in Prometheus' text form.

    Args:
        url: asked for at every reading, as a server has none at first.
    """

    def __init__(self, url: Callable[[], str], headers: Mapping[str, str] | None = None) -> None:
        self._url, self._headers = url, dict(headers or {})

    def read(self, name: str, **labels: str) -> float:
        """One number."""
        request = urllib.request.Request(self._url(), headers=self._headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            text = response.read().decode()
        for line in text.splitlines():
            found = re.fullmatch(rf"{name}\{{(.*)\}} (\S+)", line)
            if found and all(f'{key}="{value}"' in found[1] for key, value in labels.items()):
                return float(found[2])
        raise LookupError(name)

    def wait_for(self, name: str, value: float, **labels: str) -> None:
        """Return when a number has a value."""
        deadline = time.monotonic() + SECONDS
        while (found := self.read(name, **labels)) != value:
            assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
            time.sleep(0.02)
