"""Findings as lines: at most five of a check, and the remedy for an export is another export."""

from __future__ import annotations

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.verify.findings import Finding, Findings, shortened


def test_five_of_a_kind() -> None:
    findings = [Finding("weights", f"tensor {number}") for number in range(46)] + [Finding("tree", "an empty tree")]
    lines = shortened(findings)
    assert lines[:2] == ["weights: tensor 0", "weights: tensor 1"]
    assert lines[5:] == ["weights: ... and 41 more", "tree: an empty tree"]


def test_nothing_is_downloaded_again() -> None:
    findings = Findings()
    with findings.guarded("config"):
        raise ConfigError("config.json", "no JSON", "an object", "download the file again")
    assert findings == [Finding("config", "config.json: got no JSON; expected an object; export again")]
