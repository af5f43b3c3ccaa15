"""Which tritonserver runs here, and what it needs around it: NVIDIA's container has all that, the wheel nvidia-pytriton has not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.triton.hosting.environment import environment, layered, site_packages

PROGRAM = "tritonserver"
WHEEL = "pytriton"  # the package that nvidia-pytriton brings; nothing of its Python API is used


@dataclass(frozen=True)
class Installation:
    """A tritonserver.

    Attributes:
        program: the executable.
        variables: its environment.
        flags: what it has to be told besides where it listens and what it serves.
    """

    program: Path
    variables: dict[str, str]
    flags: tuple[str, ...] = ()


def find_installation(folder: Path, *, install: bool = False) -> Installation:
    """The tritonserver of the PATH, else the wheel's in this Python's environment, else the pinned one.

    Args:
        folder: what the wheel's has to have of its own is put there; it has to stay while the server runs.
        install: take the pinned environment in the user's cache, which pip makes once, in any case.

    Raises:
        ConfigError: there is none, or its Python has a NumPy that ends it.
        OutputError: the pinned packages cannot be installed.
    """
    if install:
        return pinned(folder)
    if found := shutil.which(PROGRAM):
        return Installation(Path(found), dict(os.environ))
    if importlib.util.find_spec(WHEEL) is None:
        raise ConfigError(
            PROGRAM, "no such program", "NVIDIA's container, a PATH that has it, or the wheel nvidia-pytriton",
            "use one, or let --install set up the wheel",
        )  # fmt: skip
    if int(version("numpy").split(".")[0]) >= 2:
        got = f"numpy {version('numpy')}"
        raise ConfigError("server environment", got, "below 2, or the server ends at its first text", "use --install")
    return _wheel(folder, Path(sysconfig.get_path("purelib")), Path(sys.executable).parent)


def pinned(folder: Path) -> Installation:
    """The wheel's server in an environment of pinned packages that runs this very code.

    Raises:
        ConfigError, OutputError: as :func:`~medusa_export.engines.serving.triton.hosting.environment.environment`.
    """
    layer = layered(folder)
    return _wheel(folder, site_packages(environment()), layer / "bin")


def _wheel(folder: Path, packages: Path, scripts: Path) -> Installation:
    """The server of the wheel: its python backend with the stub of this Python, the libraries that both need, and what runs models.

    Args:
        packages: where the wheel lies.
        scripts: of the environment whose Python runs the models.
    """
    server = packages / WHEEL / "tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        raise ConfigError(str(server), f"no stub for Python {python}", "one", "use another Python")
    backends = folder / "backends"
    shutil.copytree(server / "backends", backends)
    shutil.copy(stub, backends / "python")
    own = [str(packages / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    libraries = [*own, *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    path = [str(scripts), str(server / "bin"), *os.environ.get("PATH", "").split(":")]
    variables = {
        **os.environ, "PATH": ":".join(filter(None, path)), "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        "TMPDIR": str(folder),
    }  # fmt: skip
    return Installation(server / "bin" / PROGRAM, variables, (f"--backend-directory={backends}",))
