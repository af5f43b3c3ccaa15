"""Which TensorRT builds for which GPUs. Both packages are stand-ins: modules with a version and, for RTX, its targets."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from medusa_export.core.errors import ConfigError, MissingPackageError
from medusa_export.engines.tensorrt.library import DATA_CENTRE, RTX, find_tensorrt


def stand_in(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__dict__["__version__"] = "1.7" if name == RTX else "10.15"
    module.__dict__["ComputeCapability"] = SimpleNamespace(SM75=0, SM80=1, SM89=2, SM120=3)
    return module


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    def only(*names: str) -> None:
        for name in (RTX, DATA_CENTRE):
            monkeypatch.setitem(sys.modules, name, stand_in(name) if name in names else None)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)

    return only


@pytest.mark.parametrize(
    ("packages", "gpus", "here", "chosen"),
    [
        ((RTX,), (80, 89), None, RTX),
        ((RTX, DATA_CENTRE), (80, 120), 80, RTX),
        ((RTX, DATA_CENTRE), (80,), 80, DATA_CENTRE),
        ((RTX,), (80,), 80, RTX),
        ((RTX, DATA_CENTRE), (89,), 90, RTX),
        ((RTX, DATA_CENTRE), (90,), 90, DATA_CENTRE),
        ((DATA_CENTRE,), (100,), 100, DATA_CENTRE),
    ],
)
def test_choice(packages: tuple[str, ...], gpus: tuple[int, ...], here: int | None, chosen: str, installed) -> None:
    installed(*packages)
    assert find_tensorrt(gpus, here).name == chosen


@pytest.mark.parametrize(
    ("packages", "gpus", "here", "error", "message"),
    [
        ((), (89,), None, MissingPackageError, r"TensorRT-RTX: got not installed; .*pip install 'medusa-export\[tensorrt-rtx\]'"),
        ((DATA_CENTRE,), (89,), 90, MissingPackageError, "TensorRT-RTX: got not installed"),
        ((RTX,), (90,), 90, MissingPackageError, "tensorrt: got not installed; .*run: pip install tensorrt"),
        ((RTX,), (90,), None, ConfigError, "--gpu sm90: got no GPU on this machine, and TensorRT-RTX has no target sm90"),
        ((RTX, DATA_CENTRE), (89, 90), 90, ConfigError, "got sm90 on this machine, and TensorRT-RTX has no target sm90"),
        ((DATA_CENTRE,), (89, 90), 90, ConfigError, "--gpu sm89,sm90: got sm90 on this machine"),
    ],
)  # fmt: skip
def test_refusals(packages, gpus, here, error, message, installed) -> None:
    installed(*packages)
    with pytest.raises(error, match=message):
        find_tensorrt(gpus, here)
