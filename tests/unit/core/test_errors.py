from __future__ import annotations

from medusa_export.core.errors import ConfigError


def test_one_printable_line() -> None:
    error = ConfigError("a\x1b[31m", "two\nlines", "one", "see\tthere")
    assert str(error) == "a\\x1b[31m: got two lines; expected one; see there"
