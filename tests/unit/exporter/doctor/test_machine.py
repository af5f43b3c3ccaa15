"""GPUs as nvidia-smi names them, memory as Linux says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_export.exporter.doctor.machine import SeenGpu, look


def smi(folder: Path, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_gpus(path: Path) -> None:
    smi(path, 'echo "NVIDIA H100 80GB HBM3, 9.0, 81559, 570.86.15"; echo "NVIDIA RTX PRO, 12.0, 97887, 570.86.15"')
    machine = look()
    assert machine.gpus == (
        SeenGpu("NVIDIA H100 80GB HBM3", 90, 81559 << 20, "570.86.15"),
        SeenGpu("NVIDIA RTX PRO", 120, 97887 << 20, "570.86.15"),
    )
    assert machine.gpus_said == ""


def test_no_driver_and_a_driver_without_its_module(path: Path) -> None:
    assert look().gpus_said == "nvidia-smi is not installed"
    smi(path, 'echo "NVIDIA-SMI has failed"; exit 9')
    assert (look().gpus, look().gpus_said) == ((), "nvidia-smi: NVIDIA-SMI has failed")
    smi(path, "exit 9")
    assert look().gpus_said == "nvidia-smi: exit code 9"


def test_memory_disk_and_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (look().cache, look().cache_bytes) == (path / "cache", 0)
    (path / "cache/kept").mkdir(parents=True)
    (path / "cache/kept/file").write_bytes(bytes(1234))
    machine = look()
    assert machine.cache_bytes == 1234
    assert machine.free_disk > 0
    assert machine.memory is not None
    assert machine.free_memory is None or 0 < machine.free_memory < machine.memory
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", "off")
    assert look().cache is None
