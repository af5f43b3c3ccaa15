"""The Python environment of a Triton server: pinned packages, built once, and this package's own source."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medusa_export import core, engines, heads
from medusa_export.core.errors import ConfigError, OutputError

VARIABLE = "MEDUSA_TRITON_ENV"  # where environments are kept, instead of the user's cache
PINS = Path(__file__).with_name("triton_server.txt")
PYTHON = ((3, 10), (3, 12))  # the versions that NumPy 1.26 has wheels for
READY = "ready"


def environment() -> Path:
    """The directory of the pinned packages, made when it is not there yet: half a gigabyte, half a minute.

    Raises:
        ConfigError: a Python without NumPy 1.26, or no Linux on x86-64 or Arm.
        OutputError: the packages cannot be installed.
    """
    if not PYTHON[0] <= sys.version_info[:2] <= PYTHON[1] or sys.platform != "linux":
        got = f"Python {sys.version_info.major}.{sys.version_info.minor} on {sys.platform}"
        raise ConfigError("server environment", got, "Python 3.10 to 3.12 on Linux", "use one, or NVIDIA's container")
    name = f"{hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]}-{sys.implementation.cache_tag}"
    import platformdirs

    home = Path(os.environ.get(VARIABLE) or platformdirs.user_cache_path("medusa-export") / "triton-server")
    home.mkdir(parents=True, exist_ok=True)
    path = home / name
    with _lock(home / f"{name}.lock"):
        if not (path / READY).is_file():
            _install(path)
    return path


def layered(folder: Path) -> Path:
    """A virtual environment in ``folder`` that has the pinned packages and, as ``medusa_export``, the code that runs now.

    The python backend's stub ignores PYTHONPATH, so a path file says where both lie.

    Raises:
        ConfigError, OutputError: as :func:`environment`.
    """
    base, layer, source = environment(), folder / "env", folder / "source"
    venv.create(layer, symlinks=True, with_pip=False)
    package = source / "medusa_export"
    package.mkdir(parents=True)
    for module in (core, heads, engines):
        folder = Path(next(iter(module.__path__))).resolve()
        (package / folder.name).symlink_to(folder, target_is_directory=True)
    paths = f"{site_packages(base)}\n{source}\n"
    (site_packages(layer) / "medusa_export.pth").write_text(paths, encoding="utf-8")
    return layer


def site_packages(environment: Path) -> Path:
    """Where a virtual environment of the running Python has its packages."""
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _install(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    venv.create(path, symlinks=True, with_pip=True)
    command = [str(path / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(PINS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OutputError(
            str(path), f"pip's {reason}", "the packages of triton_server.txt", "see that pip reaches them"
        )
    (path / READY).touch()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
