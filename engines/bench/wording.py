"""What a report's figures are of, in words: the same on a terminal, on the page and in findings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BASELINE = "none"  # of the drafts: part of every measurement
SOURCES = {  # of drafts, by --drafts
    "heads": "heads, in a tree of {size}",
    "text": "text",
    "both": "heads and text",
    "none": "none",
}
COMPARED = {  # with decoding without drafts, by what drafted
    "heads": "with drafts from the heads",
    "text": "with drafts from the text",
    "both": "with drafts from heads and text",
    "none": "in a second run without drafts",
}
FORETOLD = {
    "heads": "predicted by acceptance.json",
    "both": "predicted, heads alone",
}  # where it says something of a run


def kind_of(report: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """What drafted in one of the report's ``drafts``: an empty tree of the heads is none."""
    kind = str(row["drafts"])
    return "none" if kind == "heads" and not report["tree"]["max_draft_len"] else kind


def measured_kind(report: Mapping[str, Any]) -> str:
    """What drafted in the run that the report is of."""
    return kind_of(report, report["drafts"][0])


def sources(report: Mapping[str, Any], row: Mapping[str, Any] | None = None) -> str:
    """Where drafts came from: "heads, in a tree of 63", "heads and text".

    Args:
        report: body of report.json.
        row: of its ``drafts``; None: what is measured.
    """
    return SOURCES[kind_of(report, row or report["drafts"][0])].format(size=report["tree"]["max_draft_len"])


def compared(report: Mapping[str, Any], row: Mapping[str, Any] | None = None) -> str:
    """How a run differs from decoding without drafts: "with drafts from heads and text".

    Args:
        report: body of report.json.
        row: of its ``drafts``; None: what is measured.
    """
    return COMPARED[kind_of(report, row or report["drafts"][0])]
