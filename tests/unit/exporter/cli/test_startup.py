"""What --help loads: nothing that computes, or it takes longer than reading it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from tests.paths import ROOT

SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]

HEAVY = {
    "numpy",
    "hashlib",
    "importlib.metadata",
    "rich.progress",
    "tempfile",
    "asyncio",
    "transformers",
    "torch",
    "yaml",
}
# medusa-data: its flags stand beside the sampler, which draws with NumPy; medusa-export: importlib.resources.
TOLERATED = {"medusa-data": {"numpy", "hashlib", "importlib.metadata", "tempfile"}, "medusa-export": {"tempfile"}}
CODE = """
import contextlib, io, sys
module, name = sys.argv.pop().split(":")
sys.argv = ["medusa-try", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    getattr(__import__(module, fromlist=[name]), name)()
print(len(shown.getvalue()), *sys.modules)
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_little(script: str, tmp_path: Path) -> None:
    package = tmp_path / "medusa_export"
    package.mkdir()
    for folder in ("core", "heads", "quantize", "exporter", "engines"):
        (package / folder).symlink_to(ROOT / folder)
    # -S: what an editable installation imports does not count
    command = [sys.executable, "-S", "-c", CODE, SCRIPTS[script]]
    path = {"PYTHONPATH": ":".join([str(tmp_path), *filter(None, sys.path)]), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, env=path, check=False)
    assert result.returncode == 0, result.stderr
    length, *modules = result.stdout.split()
    assert int(length) > 500
    assert HEAVY & {*modules} <= TOLERATED.get(script, set())
