"""Calibrations of earlier exports, found again by everything that they depend on: another ``--tp`` needs no second one."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from medusa_export.core.artifacts.hashing import sha256
from medusa_export.core.artifacts.manifest import package_versions
from medusa_export.core.artifacts.staging import sync
from medusa_export.core.errors import MedusaExportError
from medusa_export.core.user_cache import user_cache
from medusa_export.quantize.formats import Format, KvCache
from medusa_export.quantize.scales import SCALES_FILE, Scales

logger = logging.getLogger(__name__)

PACKAGES = ("medusa-export", "nvidia-modelopt", "torch", "transformers")


def calibration_key(
    files: Mapping[str, str],
    *,
    batches: Sequence[Sequence[int]],
    weight_format: Format,
    kv_cache: KvCache,
    quant_heads: bool,
    device: str,
) -> str:
    """Hexadecimal SHA-256 of everything that a calibration depends on.

    Args:
        files: name -> SHA-256 of the files that it reads: the heads' too when they are quantized.
        batches: token ids, one prompt each.
        device: "cpu" or "cuda": arithmetic and precision differ.
    """
    versions = {name: version for name, version in package_versions().items() if name in PACKAGES}
    cache = [kv_cache.name, kv_cache.bits]
    what = [
        dict(files),
        [list(ids) for ids in batches],
        weight_format.calibration,
        cache,
        quant_heads,
        device,
        versions,
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def cached_scales(key: str, calibrate: Callable[[], Scales]) -> Scales:
    """The scales kept under ``key``, or those of ``calibrate``, which are kept from then on.

    A cache that cannot be read or written costs a warning and a calibration, never the export.
    """
    directory = cache_directory()
    if directory is None:
        return calibrate()
    for path in sorted(directory.glob(f"{key}.*")):
        if (scales := _load(path)) is not None:
            logger.info("calibration of an earlier export: %s", path)
            return scales
    scales = calibrate()
    _store(directory, key, scales)
    return scales


def cache_directory() -> Path | None:
    """Where scales are kept: in the user's cache, or in the directory MEDUSA_EXPORT_CACHE; None where that is "off"."""
    root = user_cache()
    return None if root is None else root / "scales"


def _load(path: Path) -> Scales | None:
    """An entry that still is what was written, going by the SHA-256 in its name; another one is removed."""
    try:
        if sha256(path) == path.name.split(".")[1]:
            return Scales.load(path)
        reason = "its content is not what was written"
    except (OSError, MedusaExportError) as error:
        reason = str(error)
    logger.warning("%s: damaged (%s); calibrating again", path, reason)
    with suppress(OSError):  # a cache that cannot be written stays as it is
        path.unlink(missing_ok=True)
    return None


def _store(directory: Path, key: str, scales: Scales) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".") as temporary:
            path = Path(temporary) / SCALES_FILE
            scales.save(path)
            sync(path)
            path.rename(directory / f"{key}.{sha256(path)}{path.suffix}")
    except Exception as error:  # whatever a library makes of a full or read-only disk: the export has its scales
        logger.warning("%s: the calibration is not kept for other exports (%s)", directory, error)
