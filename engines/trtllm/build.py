"""Runs ``trtllm-build``: its log as progress, its failures in one line, and what it left checked against what was asked for."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.json_fields import read_json
from medusa_export.engines.trtllm.command import (
    BASELINE,
    MEDUSA,
    TOOL,
    BuildSize,
    build_command,
    needs_awq_mending,
    plain_config,
)
from medusa_export.engines.trtllm.failures import BuildError, explain
from medusa_export.engines.trtllm.scripts import AWQ_DIR, BUILD_SCRIPT, docker_command, write_scripts
from medusa_export.heads.contract.engine_info import ENGINE_FILE
from medusa_export.heads.contract.trtllm_releases import TrtllmRelease, release_of_engine

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
MEDUSA_MODE = 4  # SpeculativeDecodingMode.MEDUSA in an engine's config.json
BUILD_FILE = "build.json"
TERM_SECONDS = 10.0  # that an interrupted build gets to end by itself
# Lines of the log that end a phase of a rank; each moves the bar on.
PHASES = (r"Time of loading weights|Weights loaded", r"Engine generation completed", r"Engine serialized")


def find_tool(release: TrtllmRelease) -> Path | None:
    """Where ``trtllm-build`` is; None where it is not installed.

    Raises:
        ConfigError: it is of another release than the one that the export is for.
    """
    found = shutil.which(TOOL)
    if found is None:
        return None
    try:
        installed = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        return Path(found)  # on the path, of another Python: the engine itself will say
    _require_release(installed, release, f"installed {TOOL}")
    return Path(found)


def build_engines(
    checkpoint: Path, engine_dir: Path, size: BuildSize, release: TrtllmRelease, progress: Progress
) -> dict[str, Any]:
    """``engine_dir/medusa`` and ``engine_dir/baseline``, with build.json beside them.

    Args:
        checkpoint: TensorRT-LLM checkpoint of the export.
        engine_dir: where the engines go.
        size: batch and lengths to build for.
        release: of the installed TensorRT-LLM.
        progress: called with (stage, done, total).

    Returns:
        what build.json holds: the release, and of each engine the command, the seconds that it took and its bytes.

    Raises:
        BuildError: ``trtllm-build`` failed, or left something else than was asked for.
        ConfigError: it is not installed, or of another release.
    """
    if find_tool(release) is None:
        raise ConfigError(TOOL, "not installed", f"TensorRT-LLM {release.name}", f"run build.sh in {release.container}")
    config, built = read_json(checkpoint / "config.json"), {}
    ranks = config["mapping"]["tp_size"]
    with tempfile.TemporaryDirectory(prefix="medusa-baseline-") as plain:
        link_plain_checkpoint(checkpoint, Path(plain), config)
        for name, source in ((MEDUSA, checkpoint), (BASELINE, Path(plain))):
            medusa, output = name == MEDUSA, engine_dir / name
            command = build_command(config, size, checkpoint=source, output=output, medusa=medusa)
            mending = engine_dir / AWQ_DIR if medusa and needs_awq_mending(config) else None
            seconds = run_build(command, ranks, partial(progress, f"{TOOL} {name}"), mending)
            check_engine_files(output, config, size, release, medusa=medusa)
            engines = sum((output / f"rank{rank}.engine").stat().st_size for rank in range(ranks))
            command[command.index("--checkpoint_dir") + 1] = "trtllm" if medusa else "trtllm, without Medusa"
            command[command.index("--output_dir") + 1] = f"engine/{name}"
            built[name] = {"command": command, "seconds": round(seconds, 1), "bytes": engines}
    record = {"tensorrt_llm": release.name, **built}
    (engine_dir / BUILD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def link_plain_checkpoint(checkpoint: Path, plain: Path, config: Mapping[str, Any]) -> None:
    """The baseline's checkpoint in ``plain``: its own config.json, and links to the rank files.

    Args:
        checkpoint: TensorRT-LLM checkpoint with heads.
        plain: an empty directory.
        config: body of the checkpoint's config.json.
    """
    (plain / "config.json").write_text(json.dumps(plain_config(config)), encoding="utf-8")
    for rank in sorted(checkpoint.glob("rank*.safetensors")):
        (plain / rank.name).symlink_to(rank.resolve())


def run_build(
    command: Sequence[str], ranks: int, progress: Callable[[int, int], None], python_path: Path | None = None
) -> float:
    """Run it to its end; the seconds that it took.

    The log goes line by line to this module's logger, and into a file that is kept when the build fails.

    Args:
        python_path: goes before what PYTHONPATH holds.

    Raises:
        BuildError: it failed; names the file.
    """
    start, lines, total = time.monotonic(), list[str](), ranks * len(PHASES)
    progress(0, total)
    done = 0
    process = subprocess.Popen(  # a session of its own, so that its workers can be ended with it
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1,
        start_new_session=True, env=None if python_path is None else _before_python_path(python_path),
    )  # fmt: skip
    try:
        assert process.stdout is not None  # a pipe was asked for
        for line in process.stdout:
            lines.append(line)
            logger.info("%s", line.rstrip())
            if done < total and any(re.search(phase, line) for phase in PHASES):
                done += 1
                progress(done, total)
        returncode = process.wait()
    except BaseException:  # an interrupt must not leave it running
        _end(process)
        raise
    log = "".join(lines)
    if returncode:
        with tempfile.NamedTemporaryFile("w", prefix="trtllm-build-", suffix=".log", delete=False) as file:
            file.write(log)
        raise explain(log, returncode, command, file.name)
    progress(total, total)
    return time.monotonic() - start


def _before_python_path(directory: Path) -> dict[str, str]:
    paths = [str(directory.resolve()), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _end(process: subprocess.Popen[str]) -> None:
    """End a build and its workers; those that do not end within a while are killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TERM_SECONDS)


def check_engine_files(
    engine: Path, config: Mapping[str, Any], size: BuildSize, release: TrtllmRelease, *, medusa: bool
) -> None:
    """Raise BuildError unless an engine directory is what was asked for.

    Args:
        engine: what trtllm-build wrote.
        config: body of the checkpoint's config.json.
        size: batch and lengths that were asked for.
        release: that had to build it.
        medusa: with Medusa, or the baseline.
    """
    missing = [
        name
        for name in ("config.json", *(f"rank{rank}.engine" for rank in range(config["mapping"]["tp_size"])))
        if not (engine / name).is_file()
    ]
    if missing:
        raise BuildError(str(engine), f"no {', '.join(missing)}", "a whole engine", f"read {TOOL}'s log")
    built = read_json(engine / "config.json")
    _require_release(built.get("version"), release, f"{engine}/config.json")
    numbers, pretrained = built.get("build_config", {}), built.get("pretrained_config", {})
    wanted: dict[str, tuple[Any, Any]] = {
        "max_batch_size": (numbers.get("max_batch_size"), size.max_batch_size),
        "max_beam_width": (numbers.get("max_beam_width"), 1),
    }
    if medusa:  # without the mode the runtime decodes as if there were no heads
        wanted["speculative_decoding_mode"] = (numbers.get("speculative_decoding_mode"), MEDUSA_MODE)
        wanted |= {key: (pretrained.get(key), config[key]) for key in ("max_draft_len", "num_medusa_heads")}
    for key, (got, expected) in wanted.items():
        if got != expected:
            raise BuildError(f"{engine}/config.json", f"{key} {got!r}", repr(expected), "build it again")


def _require_release(version: object, release: TrtllmRelease, where: str) -> None:
    if release_of_engine(version, where) != release:
        raise ConfigError(
            where,
            f"TensorRT-LLM {version}",
            release.name,
            f"pass --trtllm-version {version}, or use {release.container}",
        )


class TrtllmBuilder:
    """What the exporter builds with; it does not know this package, so the command passes one in."""

    def require(self, target: TrtllmRelease) -> None:
        """Raise ConfigError when the ``trtllm-build`` here is of another release; none at all is no error."""
        find_tool(target)

    def build(self, source: Path, out: Path, progress: Progress, **request: Any) -> None:
        """Scripts into ``out``, and the engines too where ``trtllm-build`` is installed.

        Args:
            request: max_batch, max_length and release.
        """
        size, release = BuildSize(request["max_batch"], request["max_length"]), request["release"]
        write_scripts(out, read_json(source / "config.json"), size, release)
        if find_tool(release):
            build_engines(source, out, size, release, progress)


def next_steps(export_dir: Path) -> list[str]:
    """What is left to do for an export to TensorRT-LLM whose engines are not built, a line each; nothing for any other."""
    engine = export_dir / "engine"
    if not (engine / BUILD_SCRIPT).is_file() or (engine / BUILD_FILE).is_file():
        return []
    release = release_of_engine(read_json(engine / ENGINE_FILE)["source"]["tensorrt_llm"], str(engine / ENGINE_FILE))
    return [
        f"{TOOL} is not installed here, so there is no engine yet. On the machine with the GPU:",
        f"  bash {engine / BUILD_SCRIPT}",
        "or, where nothing is installed, in the container:",
        f"  {docker_command(export_dir, release)}",
    ]
