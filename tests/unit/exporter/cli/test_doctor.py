"""medusa-doctor and medusa-export formats, as they are printed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_export.exporter.cli.doctor import doctor_main
from medusa_export.exporter.cli.export import export_main
from medusa_export.exporter.doctor.packages import PACKAGES
from medusa_export.quantize.formats import FORMATS, KV_CACHE

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def start(main: Callable[[], None], *flags: object, columns: int = 80) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medusa-try", *map(str, flags)])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return start


def test_the_page(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi, no tritonserver
    code, out, err = run(doctor_main, "--quick", "--json", tmp_path / "doctor.json")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80 or "pip install" in max(out.splitlines(), key=len)
    for part in (
        *PACKAGES,
        *FORMATS,
        "none found (nvidia-smi is not installed)",
        "no: needs an NVIDIA GPU",
        "Triton server: NVIDIA's container",
    ):
        assert part in out, part
    body = json.loads((tmp_path / "doctor.json").read_text())
    assert body["machine"]["gpus"] == []
    assert body["formats"]["fp8"]["runs_on"] == ["onnxruntime"]
    missing = {each["what"]: each["missing"] for each in body["abilities"]}
    assert missing["calibrate a format"] == []
    assert missing["run a TensorRT engine"] == ["an NVIDIA GPU"]


def test_no_place_for_the_file(run: Run, tmp_path: Path) -> None:
    code, out, err = run(doctor_main, "--quick", "--json", tmp_path / "no/doctor.json")
    assert (code, out) == (2, "")
    assert "no such directory" in err


def test_names_of_formats_are_whole_on_a_narrow_terminal(run: Run) -> None:
    lines = run(export_main, "formats", columns=60)[1].splitlines()
    assert {*FORMATS, *KV_CACHE} <= {line.split()[0] for line in lines if line.strip()}


def test_formats(run: Run) -> None:
    code, out, err = run(export_main, "formats")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert {*FORMATS, *KV_CACHE} <= rows.keys()
    assert rows["w4a8_awq"][1:9] == ["4", "bit", "fp8", "yes", "89..99", "-", "yes", "-"]
    assert rows["nvfp4"][1:9] == ["4", "bit", "fp4", "yes", "100+", "100+", "-", "yes"]
    assert out.index("--kv-cache") > out.index("nvfp4")
    assert max(map(len, out.splitlines())) <= 80
