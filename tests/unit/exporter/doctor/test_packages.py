"""What is installed, and what only looks installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tomllib

from medusa_export.exporter.doctor.packages import PACKAGES, Found, Package, find_packages
from tests.paths import ROOT


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package that is there and does not import, as one without its library."""
    (tmp_path / "has_no_library.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    return Package("broken", "nothing", "", ("not_here", "has_no_library"), ("has-no-library",))


def test_what_does_not_import_is_found_out(broken: Package) -> None:
    (found,) = find_packages([broken]).values()
    assert found == Found(None, True, "OSError: libcudart.so.13: cannot open shared object file")
    assert not found.works
    assert find_packages([broken], imports=False)["broken"].works


def test_one_module_of_several_is_enough(broken: Package, tmp_path: Path) -> None:
    (tmp_path / "whole.py").write_text("")
    both = Package("both", "", "", (*broken.modules, "whole"))
    assert find_packages([both])["both"] == Found(None, True)


def test_versions_and_what_is_missing() -> None:
    seen: list[tuple[int, int]] = []
    rows = [
        Package("here", "", "", ("numpy",), ("no-such-distribution", "numpy")),
        Package("missing", "", "", ("no_such_module_at_all",)),
        Package("program", "", "", program="no-such-program", folder="/nowhere"),
    ]
    found = find_packages(rows, progress=lambda *at: seen.append(at))
    assert found["here"].version
    assert found["here"].works
    assert found["missing"] == found["program"] == Found(None, False)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_program_off_the_path(tmp_path: Path) -> None:
    (tmp_path / "server").write_text("#!/bin/sh\n")
    (tmp_path / "server").chmod(0o755)
    assert find_packages([Package("server", "", "", program="server", folder=str(tmp_path))])["server"].is_here


def test_the_commands_name_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = {row.install.split("[")[1].split("]")[0] for row in PACKAGES.values() if "medusa-export[" in row.install}
    assert named
    assert named <= extras.keys()
    assert all(bool(row.modules) != bool(row.program) for row in PACKAGES.values())
