"""The built wheel, alone: what pyproject.toml forgets is missing there, however well the checkout runs."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import tomllib
from packaging.metadata import Metadata

from tests.paths import ROOT

pytestmark = pytest.mark.slow
FOLDERS = ("core", "heads", "quantize", "exporter", "engines")
DATA = (".py", ".jsonl", ".jinja", ".txt", ".typed")


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, without this checkout on its path."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the tracked files, so that nothing left over from earlier builds gets in."""
    source = tmp_path_factory.mktemp("source")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS, "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        "--wheel-dir",
        out,
    ]
    run(*pip, "--no-build-isolation", source, cwd=out)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and with this one's other packages: their path files, and so the checkout, are left out."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    run(
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--python",
        folder / "bin/python",
        "install",
        "--no-deps",
        wheel,
        cwd=folder,
    )
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def test_every_file_of_the_packages_is_in_it(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"medusa_export/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in DATA
    }
    assert len(expected) > 200
    assert expected - inside == set()


def test_metadata(wheel: Path) -> None:
    """What an index checks: fields that go together, extras that exist, a licence file."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    found = Metadata.from_email(archive.read(name), validate=True)
    assert (found.name, found.license_expression, found.description_content_type) == (
        "medusa-export",
        "Apache-2.0",
        "text/markdown",
    )
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    extras = set(found.provides_extra or ())
    assert {"all-cpu", "tensorrt-llm", "tensorrt", "tensorrt-rtx", "serve"} <= extras
    for requirement in found.requires_dist or ():
        assert requirement.name != "medusa-export" or requirement.extras <= extras
    (version,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text("utf-8"), flags=re.MULTILINE)
    assert version == str(found.version)


def test_the_sdist_has_what_the_wheel_is_built_from(source: Path, wheel: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    inside = {
        name.removeprefix("medusa_export/") for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name
    }
    assert inside - names == set()
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names


def test_every_module_is_importable(python: Path, wheel: Path) -> None:
    names = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in zipfile.ZipFile(wheel).namelist()
        if name.endswith(".py")
    ]
    code = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    files = run(python, "-c", code, *names, cwd=python.parent).splitlines()
    assert len(files) == len(names)
    assert all(Path(file).is_relative_to(python.parents[1]) for file in files)


@pytest.mark.parametrize("command", tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"])
def test_every_command_says_what_it_takes(command: str, python: Path) -> None:
    assert "--help" in run(python.with_name(command), "--help", cwd=python.parent)
