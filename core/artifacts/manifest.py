"""Output directories with a manifest, ``medusa.json``, written last: where it is present, the output is complete."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from medusa_export.core.artifacts import staging
from medusa_export.core.artifacts.hashing import WORKERS, list_files, sha256, sha256_all
from medusa_export.core.artifacts.resumable import ResumableOutput
from medusa_export.core.errors import ConfigError, OutputError
from medusa_export.core.json_fields import read_json
from medusa_export.core.threads import StopPoint, run_all

MANIFEST = "medusa.json"
FORMAT_VERSION = 1

_PACKAGES = (
    "medusa-export",
    "numpy",
    "torch",
    "transformers",
    "safetensors",
    "nvidia-modelopt",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx-cu13-libs",
    "tensorrt_llm",
)
_ABSENT = object()


@contextmanager
def output_directory(
    out: Path,
    *,
    inputs: Mapping[str, str],
    arguments: Mapping[str, Any],
    hashes: Callable[[], Mapping[str, str]] | None = None,
) -> Iterator[ResumableOutput]:
    """A directory beside ``out`` to fill, which becomes it, with a manifest, when the body ends well.

    Its parts (:meth:`ResumableOutput.run_once`) outlive a kill, a power loss, an interrupt and an unforeseen error: the next call
    for ``out`` with
    the same inputs, arguments and package versions goes on from them, and one with others discards them. After a
    MedusaExportError and on a full disk nothing is left.

    Args:
        out: the directory to make; it may exist when it is empty.
        inputs: what the output is made from: file -> SHA-256, or whatever else changes with it.
        arguments: what it is made with: JSON values and paths.
        hashes: gives file -> SHA-256 for the manifest, where ``inputs`` are something else.

    Raises:
        OutputError: ``out`` holds something else or is being made by another process, its parent cannot be written, or the disk
            is full.
    """
    out, hashes = out.resolve(), hashes or (lambda: inputs)
    refuse_occupied(out, hashes, arguments)
    run = {"inputs": _plain(inputs), "arguments": _plain(arguments), "versions": package_versions()}
    with staging.full_disk_named(out), staging.partial_beside(out) as partial, staging.sigterm_raises():
        refuse_occupied(out, hashes, arguments)  # another process may have published it before the lock was ours
        work = ResumableOutput(partial, run)
        yield work
        _write_manifest(work, {**run, "inputs": _plain(hashes())})
        staging.publish(work.path, out)


def has_manifest(out: Path) -> bool:
    """Whether something complete is there, whatever it was made from."""
    return (out / MANIFEST).is_file()


def is_up_to_date(out: Path, inputs: Mapping[str, str], arguments: Mapping[str, Any]) -> bool:
    """Whether ``out`` is complete and was made from the same inputs with the same arguments.

    Sizes are compared with the manifest, contents are not: :func:`verify_manifest` does that.

    Args:
        out: the directory.
        inputs: file -> SHA-256, as it would be recorded now.
        arguments: as they would be recorded now.

    Raises:
        OutputError: there is a manifest, but a damaged one.
    """
    if not has_manifest(out):
        return False
    manifest = read_manifest(out)
    return not _differences(manifest, inputs, arguments) and not _listing_problems(
        out, manifest["files"], _list_files(out)
    )


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a complete directory.

    Raises:
        OutputError: there is none, or it is damaged.
    """
    try:
        manifest = read_json(out / MANIFEST)
    except ConfigError as error:
        raise OutputError(error.where, error.got, "the manifest of a complete output", "make it again") from error
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise OutputError(str(out / MANIFEST), f"format_version {version!r}", f"{FORMAT_VERSION}", "make it again")
    damaged = [key for key in ("inputs", "arguments", "files") if not isinstance(manifest.get(key), dict)]
    entries = [] if damaged else manifest["files"].values()
    if damaged or not all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in entries):
        got = f"damaged {damaged[0] if damaged else 'files'}"
        raise OutputError(str(out / MANIFEST), got, "what this program writes", "make it again")
    return manifest


def verify_manifest(out: Path, *, left_by_use: Sequence[str] = ()) -> list[str]:
    """What is wrong with a directory, one line each; every file is read. Empty when all is as it was written.

    Args:
        left_by_use: names of folders that are there once it has been used, such as Python's compiled files.
    """
    try:
        files = read_manifest(out)["files"]
    except OutputError as error:
        return [str(error)]
    present = {
        name: path for name, path in _list_files(out).items() if not set(left_by_use) & set(Path(name).parts[:-1])
    }
    problems = _listing_problems(out, files, present)
    whole = [name for name in present if name in files and _is_whole(present[name], files[name])]
    for name, digest in zip(whole, sha256_all(present[name] for name in whole), strict=True):
        if digest != files[name]["sha256"]:
            problems.append(f"{present[name]}: its content is not what was written (SHA-256 differs)")
    return problems


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """Path, as given -> SHA-256.

    Raises:
        ConfigError: a file cannot be read.
    """
    paths = list(paths)
    hashes = run_all(_hash_input, paths, workers=WORKERS)
    return {str(path): digest for path, digest in zip(paths, hashes, strict=True)}


def package_versions() -> dict[str, str]:
    """The installed packages that shape what is written, this one included."""
    return {name: version for name in _PACKAGES if (version := _version(name))}


def check_free_space(parent: Path, needed_bytes: int) -> None:
    """Raise OutputError when the file system that ``parent`` is, or will be, on has less than ``needed_bytes`` free."""
    existing = next(path for path in (parent.resolve(), *parent.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        got = f"{free / 1e9:.2f} GB free"
        raise OutputError(str(parent), got, f"{needed_bytes / 1e9:.2f} GB", "free some space or choose another disk")


def _hash_input(path: Path, stop_point: StopPoint) -> str:
    try:
        return sha256(path, stop_point)
    except OSError as error:
        raise ConfigError(str(path), f"no readable file ({error.strerror})", "an input", "check the path") from error


def refuse_occupied(out: Path, hashes: Callable[[], Mapping[str, str]], arguments: Mapping[str, Any]) -> None:
    """Raise OutputError for whatever is at ``out``, unless it is nothing or an empty directory.

    Args:
        out: directory that is to be written.
        hashes: gives what a manifest calls an input -> SHA-256; called only where there is an output already.
        arguments: as the manifest would record them.
    """
    other = "choose another directory or delete this one"
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(str(out), "a file", "a directory to make", "choose another name")
    if os.path.ismount(out):
        raise OutputError(str(out), "a mount point", "a directory that can be replaced", f"use {out / 'model'}")
    if not any(out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise OutputError(str(out), f"files, but no {MANIFEST}", "a new or an empty directory", other)
    manifest = read_manifest(out)
    if differences := _differences(manifest, hashes(), arguments):
        raise OutputError(str(out), f"an output with other {differences[0]}", "the same inputs and arguments", other)
    if problems := _listing_problems(out, manifest["files"], _list_files(out)):
        raise OutputError(str(out), f"a damaged output ({problems[0]})", "a complete one", "delete it and run again")
    raise OutputError(
        str(out), "an output that is complete and up to date", "nothing to do", "delete it to make it again"
    )


def _differences(manifest: Mapping[str, Any], inputs: Mapping[str, str], arguments: Mapping[str, Any]) -> list[str]:
    """The inputs and arguments that are not those of the manifest."""
    differences = []
    for kind, now in (("inputs", _plain(inputs)), ("arguments", _plain(arguments))):
        before = manifest[kind]
        changed = sorted(name for name in {*before, *now} if before.get(name, _ABSENT) != now.get(name, _ABSENT))
        differences += [f"{kind} ({name})" for name in changed]
    return differences


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON gives them back: paths as text, tuples as lists."""

    def text(value: object) -> str:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise TypeError(f"{value!r} cannot be kept in {MANIFEST}")

    plain: dict[str, Any] = json.loads(json.dumps(dict(values), default=text))
    return plain


def _list_files(root: Path) -> dict[str, Path]:
    """Relative name -> path of every file and link in a directory but the manifest, sorted."""
    found = list_files(root, root)
    found.pop(MANIFEST, None)
    return found


def _is_whole(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether it is a file of the right size: only then its content is worth a look."""
    return path.is_file() and path.stat().st_size == entry["size"]


def _listing_problems(out: Path, files: Mapping[str, Mapping[str, Any]], present: Mapping[str, Path]) -> list[str]:
    """Missing files, surplus files and wrong sizes."""
    problems = [f"{out / name}: missing" for name in files if name not in present]
    problems += [f"{path}: not in {MANIFEST}" for name, path in present.items() if name not in files]
    for name, path in present.items():
        if path.is_symlink():
            problems.append(f"{path}: a link")
        elif name in files and path.stat().st_size != files[name]["size"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, {files[name]['size']} were written")
    return problems


def _write_manifest(work: ResumableOutput, run: Mapping[str, Any]) -> None:
    files = work.finish()
    manifest = {
        "format_version": FORMAT_VERSION,
        "tool_version": run["versions"].get("medusa-export"),
        "created": _now().isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "arguments": run["arguments"],
        "inputs": run["inputs"],
        "versions": {"python": platform.python_version(), **run["versions"]},
    }
    if taken := (manifest.keys() | {"files"}) & work.values.keys():
        raise ValueError(f"{sorted(taken)} cannot be recorded: the manifest has keys of that name")
    manifest |= {**work.values, "files": files}
    (work.path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _now() -> datetime:
    """The time, or what SOURCE_DATE_EPOCH (reproducible-builds.org) says it is, in seconds since 1970."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(fixed), timezone.utc) if fixed.isdecimal() else datetime.now(timezone.utc)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
