"""The cache of calibrations: what finds an entry, what does not, and that it never costs an export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from medusa_export.quantize import scales_cache as cache
from medusa_export.quantize.formats import get_format, get_kv_cache
from medusa_export.quantize.scales import Scales
from medusa_export.quantize.scales_cache import cache_directory, cached_scales, calibration_key

GIVEN: dict[str, Any] = {
    "files": {"base/model.safetensors": "ab", "config": "cd"},
    "batches": [[1, 2], [3]],
    "weight_format": get_format("fp8"),
    "kv_cache": get_kv_cache("none"),
    "quant_heads": False,
    "device": "cpu",
}
SCALES = Scales({"a": 1 / 3, "b": 2.0}, {"a": 0.1, "b": 7.0}, {0: 5.0, 11: 1e-9})
KEY = "ab" * 32


def body(scales: Scales) -> list[Any]:
    return [scales.input_amax, scales.weight_amax, scales.kv_amax]


def never() -> Scales:
    raise AssertionError("it is cached")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/scales"


class TestKey:
    @pytest.mark.parametrize(
        "change",
        [
            {"files": {"base/model.safetensors": "ac", "config": "cd"}},
            {"files": {"base/model.safetensors": "ab"}},
            {"files": {"base/model.safetensors": "cd", "config": "ab"}},
            {"batches": [[1, 2, 3]]},
            {"batches": [[3], [1, 2]]},
            {"weight_format": get_format("none")},
            {"weight_format": replace(get_format("fp8"), group_size=64)},
            {"kv_cache": get_kv_cache("fp8")},
            {"quant_heads": True},
            {"device": "cuda"},
        ],
    )
    def test_everything_counts(self, change: dict[str, Any]) -> None:
        assert calibration_key(**(GIVEN | change)) != calibration_key(**GIVEN)

    def test_the_same_is_the_same(self) -> None:
        again = {**GIVEN, "files": dict(reversed(GIVEN["files"].items())), "batches": [(1, 2), (3,)]}
        assert calibration_key(**again) == calibration_key(**GIVEN)
        assert len(calibration_key(**GIVEN)) == 64

    @pytest.mark.parametrize("package", ["nvidia-modelopt", "torch", "transformers", "medusa-export"])
    def test_versions(self, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        before, versions = calibration_key(**GIVEN), cache.package_versions()
        monkeypatch.setattr(cache, "package_versions", lambda: {**versions, package: "99"})
        assert calibration_key(**GIVEN) != before
        monkeypatch.setattr(cache, "package_versions", lambda: {**versions, "onnx": "99"})
        assert calibration_key(**GIVEN) == before


def test_a_second_time_it_is_read(directory: Path) -> None:
    assert body(cached_scales(KEY, lambda: SCALES)) == body(SCALES)
    assert body(cached_scales(KEY, never)) == body(SCALES)
    assert len(list(directory.iterdir())) == 1  # and no temporary one
    other = Scales({"c": 1.0}, {"c": 1.0})
    assert body(cached_scales("cd" * 32, lambda: other)) == body(other)
    assert body(cached_scales(KEY, never)) == body(SCALES)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def own_name(path: Path) -> None:
    """Whole, going by its name, but no scales."""
    path.write_text("other")
    path.rename(path.with_name(f"{KEY}.{cache.sha256(path)}{path.suffix}"))


@pytest.mark.parametrize(
    "damage", [flip, own_name, lambda path: path.write_bytes(b""), lambda path: path.rename(path.with_name(f"{KEY}.x"))]
)
def test_a_damaged_entry_is_made_again(
    damage: Callable[[Path], object], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached_scales(KEY, lambda: SCALES)
    (path,) = directory.iterdir()
    whole = path.read_bytes()
    damage(path)
    assert body(cached_scales(KEY, lambda: SCALES)) == body(SCALES)
    (record,) = caplog.records
    assert "calibrating again" in record.getMessage()
    assert body(cached_scales(KEY, never)) == body(SCALES)
    assert [entry.read_bytes() for entry in directory.iterdir()] == [whole]


@pytest.mark.parametrize("how", ["a file in its place", "full"])
def test_a_cache_that_cannot_be_written(
    how: str, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    if how == "full":
        monkeypatch.setattr(Scales, "save", full)
    else:
        directory.parent.write_text("x")
    assert cached_scales(KEY, lambda: SCALES) is SCALES
    (record,) = caplog.records
    assert "the calibration is not kept for other exports" in record.getMessage()
    assert not directory.exists() or list(directory.iterdir()) == []


def test_a_failed_calibration_is_not_kept(directory: Path) -> None:
    def fail() -> Scales:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cached_scales(KEY, fail)
    assert not directory.exists()


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory() is None  # off in all tests
    assert cached_scales(KEY, lambda: SCALES) is SCALES
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", "~/elsewhere")
    assert cache_directory() == tmp_path / "elsewhere/scales"
    for unset in (
        lambda: monkeypatch.setenv("MEDUSA_EXPORT_CACHE", ""),
        lambda: monkeypatch.delenv("MEDUSA_EXPORT_CACHE"),
    ):
        unset()
        assert cache_directory() == platformdirs.user_cache_path("medusa-export") / "scales"
    assert list(tmp_path.iterdir()) == []
