"""One row for a format: every table that is keyed by one is listed, whole, and without strays; no code branches on a name."""

from __future__ import annotations

import re

import pytest

from medusa_export.exporter.verify.trtllm_loader import modules
from medusa_export.quantize.formats import FORMATS
from tests import format_tables
from tests.paths import ROOT

# What compares with such a word and means something else.
OTHER_MEANINGS = {
    # TensorRT-LLM's own rule, which the verifier repeats: its Qwen model is the base where model_type has "qwen" in it
    "exporter/verify/trtllm_loader/modules.py": ["'qwen' in str(config.get('model_type'))"],
    # kinds of drafts
    "engines/decoding/draft_kinds.py": ["drafts in ('text', 'none')"],
}  # fmt: skip
# Literals with two such words or more that no row decides.
OTHER_LITERALS = {
    ("core/artifacts/manifest.py", "_PACKAGES"),
    ("engines/measure/machine.py", "PACKAGES"),
    ("exporter/verify/parts/engine_files.py", "_graph_problems"),  # names of outputs
    ("benchmarks/gpu.py", "FORMS"),  # the two that it runs
    ("heads/roofline/gpus.py", "GPUS"),  # what products are made in
    ("heads/roofline/gpus.py", "HOPPER_OPERATIONS"),
}


@pytest.mark.parametrize("table", format_tables.tables(), ids=lambda table: table.place)
def test_no_table_lacks_a_row_or_has_a_stray_one(table: format_tables.Table) -> None:
    assert list(table.problems()) == []


def test_rows_and_tables_agree() -> None:
    assert list(format_tables.row_problems()) == []


def test_a_table_that_lacks_a_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(modules.ALGOS, "NVFP4")
    monkeypatch.setitem(modules.ALGOS, "W3A16", modules.ALGOS["W4A16"])
    found = [problem for table in format_tables.tables() for problem in table.problems()]
    place = "exporter/verify/trtllm_loader/modules.py ALGOS"
    assert found == [f"{place} lacks 'NVFP4'", f"{place} has 'W3A16', which no row asks for"]


def test_every_table_is_listed() -> None:
    listed = {tuple(table.place.split(" ")) for table in format_tables.tables()}
    known = format_tables.names()
    found = {
        (name, table)
        for name, text in format_tables.source_files()
        for table in format_tables.literal_tables(text, known)
    }
    assert found - listed == OTHER_LITERALS


def test_no_branch_on_a_name() -> None:
    known = format_tables.names() | format_tables.choices()
    found = {
        name: branches
        for name, text in format_tables.source_files()
        if (branches := list(format_tables.branches(text, known)))
    }
    assert {name: sorted(branches) for name, branches in found.items()} == OTHER_MEANINGS


@pytest.mark.parametrize(
    ("text", "branches", "tables"),
    [
        ('if weight_format.name == "nvfp4": pass', 1, 0),
        ('x = storage in ("int4", "other")', 1, 0),
        ('match name:\n  case "int8_wo": pass', 1, 0),
        ('if "qwen" in model_type: pass', 1, 0),
        ('if arguments.format in ("trtllm", "hf"): pass', 1, 0),
        ('TABLE = {"fp8": 1, "nvfp4": 2}', 0, 1),
        ('TABLE = dict.fromkeys(("fp8", "nvfp4"), 1)', 0, 1),
        ('def f():\n  return {"int8_wo": 8, "int4_wo": 4}[name]', 0, 1),
        ('if weight_format.is_quantized and name == "weight": pass', 0, 0),
        ('TABLE = {"fp8": 1, "q_proj": 2}', 0, 0),
    ],
)
def test_the_scan_finds(text: str, branches: int, tables: int) -> None:
    known = format_tables.names()
    assert len(list(format_tables.branches(text, known | format_tables.choices()))) == branches
    assert len(list(format_tables.literal_tables(text, known))) == tables


def test_documents_have_every_format() -> None:
    """README's table is compared with the rows in test_readme; this one is of what was measured of TensorRT's graphs."""
    text = (ROOT / "docs" / "tensorrt.md").read_text("utf-8")
    named = set(re.findall(r"`([a-z0-9_]+)`", text))
    assert {name for name, row in FORMATS.items() if hasattr(row.tensorrt, "form")} <= named
