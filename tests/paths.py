"""Where things lie in the checkout, and comparison with golden files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"


def assert_golden(name: str, found: Any) -> None:
    """Compare a text, or a value as JSON, with ``tests/golden/{name}``.

    ``MEDUSA_EXPORT_GOLDEN=write`` rewrites the files; read the difference before keeping it.
    """
    path, text = GOLDEN / name, found if isinstance(found, str) else json.dumps(found, indent=1) + "\n"
    if os.environ.get("MEDUSA_EXPORT_GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{name} is new: run with MEDUSA_EXPORT_GOLDEN=write and read the file"
    assert text == path.read_text(encoding="utf-8")
