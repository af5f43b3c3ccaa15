"""What is said of files that are not the JSON they should be: in words, by what the reader expects, not by Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import MedusaExportError
from medusa_export.core.json_fields import HUGGING_FACE, read_json
from medusa_export.core.json_lines import json_object
from medusa_export.engines.bench.diff import read_report
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.acceptance import Acceptance
from medusa_export.heads.trees.step_costs import load_costs
from medusa_export.heads.trees.tree import load_tree
from medusa_export.quantize.scales import Scales

READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "report": (read_report, "a report of this version's medusa-run"),
    "acceptance": (Acceptance.load, "positions and paths"),
    "costs": (load_costs, '{"curves"'),
    "tree": (lambda path: load_tree(str(path)), "a "),
    "scales": (Scales.load, "saved scales"),
}
PYTHONS = ("Error", "NoneType", "codec", "Hugging Face", "download", "__main__")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("body", "got"),
    [(None, "no such file"), (b"", ""), (b"{}", ""), (b"null", ""), (b"\xff\xfe\x00", ""), (b"[" * 100_000, "")],
)
def test_every_reader_says_what_it_expects(name: str, body: bytes | None, got: str, tmp_path: Path) -> None:
    read, expected = READERS[name]
    path = tmp_path / "file"
    if body is not None:
        path.write_bytes(body)
    with pytest.raises(MedusaExportError) as raised:
        read(path)
    assert got in raised.value.got
    assert raised.value.expected.startswith(expected)
    assert not [word for word in PYTHONS if word in str(raised.value)], str(raised.value)


def test_words_for_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for body, got in (
        (b"null", "a JSON null"),
        (b"true", "a JSON true or false"),
        (b"1", "a JSON number"),
        (b"\xff", "unreadable JSON (not UTF-8)"),
        (b"[" * 100_000, "unreadable JSON (nested too deeply)"),
    ):
        path.write_bytes(body)
        with pytest.raises(MedusaExportError) as raised:
            read_json(path, *HUGGING_FACE)
        assert (raised.value.got, raised.value.action) == (got, "download the file again")
    path.write_text('{"positions": 1}')
    with pytest.raises(MedusaExportError, match="got no paths;"):
        Acceptance.load(path)
    with pytest.raises(MedusaExportError, match="got no medusa_choices;"):
        load_tree(str(path))
    with pytest.raises(MedusaExportError, match="got bytes that are not UTF-8;"):
        json_object(b"\x7fELF\x00\x00\x00\xff", "p:1")


def test_an_engine_directory_that_is_none(tmp_path: Path) -> None:
    for path, got in ((tmp_path / "nope", "no such file or directory"), (tmp_path, "no engine directory")):
        with pytest.raises(
            MedusaExportError, match=f"got {got}; expected a directory with engine.json; pass an export"
        ):
            EngineInfo.load(path)
    (tmp_path / "engine.json").write_text("{}")
    with pytest.raises(MedusaExportError, match=r"got no \w+ and 1\d other keys;"):
        EngineInfo.load(tmp_path)
