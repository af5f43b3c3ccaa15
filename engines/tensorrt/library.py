"""Which TensorRT builds for the GPUs asked for, decided when one is needed: TensorRT-RTX ahead of time, or that of the GPU here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from medusa_export.core.errors import ConfigError, MissingPackageError, missing_package

RTX, DATA_CENTRE = "tensorrt_rtx", "tensorrt"


@dataclass(frozen=True)
class TensorRtLibrary:
    """A TensorRT that is installed; both have one API.

    Attributes:
        name: "tensorrt_rtx" or "tensorrt".
        module: what was imported.
    """

    name: str
    module: ModuleType

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    def targets(self) -> tuple[int, ...]:
        """What it builds for without a GPU; nothing where it has no such thing."""
        kinds: Any = getattr(self.module, "ComputeCapability", None)
        names = [name for name in dir(kinds) if name.startswith("SM")] if self.name == RTX else []
        return tuple(sorted(int(name[2:]) for name in names))


def find_tensorrt(gpus: Sequence[int], here: int | None) -> TensorRtLibrary:
    """The TensorRT that builds for ``gpus``: the data-centre one where this machine's GPU is the only target, else TensorRT-RTX.

    Args:
        gpus: compute capabilities, as 10 * major + minor.
        here: that of this machine's GPU; None where there is none.

    Raises:
        MissingPackageError: it is not installed.
        ConfigError: neither builds for these GPUs on this machine.
    """
    own = import_tensorrt(DATA_CENTRE) if list(gpus) == [here] else None
    if own:
        return own
    rtx = import_tensorrt(RTX)
    others = [sm for sm in gpus if rtx is not None and sm not in rtx.targets()]
    if rtx and not others:
        return rtx
    if rtx is None and here not in gpus:
        raise missing_package("TensorRT-RTX", "tensorrt-rtx")
    if list(gpus) == [here]:
        raise MissingPackageError(
            "tensorrt", "not installed", "NVIDIA's TensorRT for the GPU of this machine", "run: pip install tensorrt"
        )
    found = f"sm{here}" if here else "no GPU"
    raise ConfigError(
        "--gpu " + ",".join(f"sm{sm}" for sm in gpus),
        f"{found} on this machine, and TensorRT-RTX has no target {', '.join(f'sm{sm}' for sm in others or gpus)}",
        "TensorRT-RTX's targets, or the one GPU of this machine (its kernels are timed where they will run)",
        "run the same command on a machine with that GPU and the tensorrt package",
    )


def import_tensorrt(name: str) -> TensorRtLibrary | None:
    """The package of that name; None where it is not installed."""
    try:
        if name == DATA_CENTRE:
            import tensorrt

            return TensorRtLibrary(name, tensorrt)
        return TensorRtLibrary(name, _import_rtx())
    except ImportError:
        return None


def _import_rtx() -> ModuleType:
    """NVIDIA's whole package is called tensorrt_rtx; its parts, libraries and bindings, can be installed alone."""
    try:
        import tensorrt_rtx

        return tensorrt_rtx
    except ImportError:
        import tensorrt_rtx_bindings

        return tensorrt_rtx_bindings


def local_gpu() -> int | None:
    """The compute capability of this machine's first GPU, as torch sees it; None without one."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
