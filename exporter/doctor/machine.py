"""The machine: memory, disk, the cache of this project, and GPUs as the driver's own tool names them."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from medusa_export.core.user_cache import user_cache

QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits")
TIMEOUT = 30.0  # seconds


@dataclass(frozen=True)
class SeenGpu:
    """A GPU of this machine.

    Attributes:
        sm: compute capability as 10 * major + minor.
        memory: bytes.
        driver: its version.
    """

    name: str
    sm: int
    memory: int
    driver: str


@dataclass(frozen=True)
class Machine:
    """What can be said of it without loading a library.

    Attributes:
        memory, free_memory: bytes; None where the system does not say.
        free_disk: bytes where the command runs.
        cache: None where it is turned off.
        cache_bytes: what lies there.
        gpus_said: why no GPU is found; "" where one is.
    """

    memory: int | None
    free_memory: int | None
    free_disk: int
    cache: Path | None
    cache_bytes: int
    gpus: tuple[SeenGpu, ...]
    gpus_said: str


def look(directory: Path = Path()) -> Machine:
    """This machine, and the disk that ``directory`` is on."""
    cache = user_cache()
    files = (path for path in cache.rglob("*") if path.is_file()) if cache and cache.is_dir() else ()
    gpus, said = _gpus()
    sizes = _memory(Path("/proc/meminfo"))
    return Machine(
        sizes.get("MemTotal"), sizes.get("MemAvailable"), shutil.disk_usage(directory).free, cache,
        sum(path.stat().st_size for path in files), gpus, said,
    )  # fmt: skip


def _memory(file: Path) -> dict[str, int]:
    """The lines of Linux's table, in bytes; elsewhere the size alone, as far as the system says it."""
    if not file.is_file():
        known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
        return {"MemTotal": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")} if known else {}
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if len(words) == 3}


def _gpus() -> tuple[tuple[SeenGpu, ...], str]:
    """The GPUs, or why there are none."""
    try:
        result = subprocess.run(QUERY, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except FileNotFoundError:
        return (), "nvidia-smi is not installed"
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi did not answer in {TIMEOUT:.0f} s"
    if result.returncode:
        lines = (result.stdout + result.stderr).strip().splitlines()
        return (), f"nvidia-smi: {lines[-1] if lines else f'exit code {result.returncode}'}"
    return tuple(_gpu(line) for line in result.stdout.splitlines() if line.strip()), ""


def _gpu(line: str) -> SeenGpu:
    name, capability, mebibytes, driver = (part.strip() for part in line.rsplit(",", 3))
    return SeenGpu(name, int(capability.replace(".", "")), int(mebibytes) << 20, driver)
