"""What --help loads: nothing that computes, or it takes longer than reading it."""

from __future__ import annotations

import subprocess
import sys

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
def test_help_loads_little(script: str) -> None:
    command = [
        sys.executable,
        "-S",
        "-c",
        CODE,
        SCRIPTS[script],
    ]  # -S: what an editable installation imports does not count
    path = {"PYTHONPATH": ":".join(each for each in sys.path if each), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, env=path, check=False)
    assert result.returncode == 0, result.stderr
    length, *modules = result.stdout.split()
    assert int(length) > 500
    assert HEAVY & {*modules} <= TOLERATED.get(script, set())
