"""build.sh in an export's engine directory: the engines of its checkpoint, built where TensorRT-LLM and the GPU are."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa_export.engines.trtllm import awq_builder
from medusa_export.engines.trtllm import session as trtllm_session
from medusa_export.engines.trtllm.command import (
    BASELINE,
    MEDUSA,
    TOOL,
    BuildSize,
    build_command,
    needs_awq_mending,
    plain_config,
)
from medusa_export.heads.contract.trtllm_releases import TrtllmRelease

BUILD_SCRIPT, RUN_SCRIPT = "build.sh", "run.py"
PLAIN_CONFIG = "baseline_config.json"
AWQ_DIR = "awq"  # on PYTHONPATH of every process of the Medusa build
_WITH_AWQ = (  # a checkpoint of group-wise INT4
    f"# TensorRT-LLM cannot build Medusa with INT4 AWQ weights unless a class is mended first: see {AWQ_DIR}/sitecustomize.py\n"
    f'PYTHONPATH="$here/{AWQ_DIR}${{PYTHONPATH:+:$PYTHONPATH}}" '
)
_SCRIPT = r"""#!/usr/bin/env bash
# Builds two TensorRT-LLM engines of this checkpoint on the GPU that will serve: one with Medusa, and one without, which medusa-run
# measures against. For TensorRT-LLM {release}; its container has everything:
#   docker run --rm --gpus all --ipc host -v "$PWD:$PWD" -w "$PWD" {container} bash OUT/engine/{script} [DIR]
# DIR (default: OUT-engine, beside the export) appears when both engines are built. EXTRA_FLAGS go to both builds.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
export_dir="$(dirname "$here")"
engine="${{1:-$export_dir-engine}}"
command -v {tool} > /dev/null || {{ echo "error: no {tool}; run this in {container}" >&2; exit 2; }}
installed="$(python3 -c 'import importlib.metadata as m; print(m.version("tensorrt_llm"))' 2> /dev/null || true)"
case "$installed" in
  "" | {versions}) ;;
  *)
    echo "error: got TensorRT-LLM $installed; expected {release}, which the export is for; run this in {container}" >&2
    exit 2
    ;;
esac
[ ! -e "$engine" ] || {{ echo "error: $engine is there already" >&2; exit 2; }}
stage="$engine.partial"
plain="$stage/baseline_checkpoint"
rm -rf "$stage"
trap 'rm -rf "$stage"' EXIT
cp -r "$here" "$stage"
mkdir "$plain"
mv "$stage/{plain_config}" "$plain/config.json"
ln -s "$export_dir"/trtllm/rank*.safetensors "$plain/"

{medusa}

{baseline}

rm -r "$plain"
mv "$stage" "$engine"
trap - EXIT
echo "wrote $engine"
echo "next: python3 $engine/{run}"
echo "  or: medusa-run --engine $engine --prompts PROMPTS.jsonl --report report.json"
"""


def build_script(config: Mapping[str, Any], size: BuildSize, release: TrtllmRelease) -> str:
    """The text of build.sh.

    Args:
        config: body of the checkpoint's config.json.
        size: batch and lengths to build for.
        release: of TensorRT-LLM.
    """
    places = {MEDUSA: '"$export_dir/trtllm"', BASELINE: '"$plain"'}
    commands = {
        name: _shell(
            build_command(config, size, checkpoint="CHECKPOINT", output="OUTPUT", medusa=name == MEDUSA),
            {"CHECKPOINT": place, "OUTPUT": f'"$stage/{name}"'},
        )
        for name, place in places.items()
    }
    if needs_awq_mending(config):
        commands[MEDUSA] = _WITH_AWQ + commands[MEDUSA]
    versions = {release.name, release.name.removesuffix(".post1")}
    return _SCRIPT.format(
        release=release.name, container=release.container, script=BUILD_SCRIPT, tool=TOOL, run=RUN_SCRIPT,
        plain_config=PLAIN_CONFIG, versions=" | ".join(f'"{version}"' for version in sorted(versions)), **commands,
    )  # fmt: skip


def write_scripts(engine_dir: Path, config: Mapping[str, Any], size: BuildSize, release: TrtllmRelease) -> None:
    """build.sh, run.py and the configuration that the baseline is built from, in an export's engine directory.

    Args:
        engine_dir: of the export.
        config: body of the checkpoint's config.json.
        size: batch and lengths to build for.
        release: of TensorRT-LLM.
    """
    (engine_dir / BUILD_SCRIPT).write_text(build_script(config, size, release), encoding="utf-8")
    (engine_dir / BUILD_SCRIPT).chmod(0o755)
    (engine_dir / RUN_SCRIPT).write_bytes(Path(trtllm_session.__file__).read_bytes())
    if needs_awq_mending(config):
        write_awq_mending(engine_dir / AWQ_DIR)
    (engine_dir / PLAIN_CONFIG).write_text(json.dumps(plain_config(config), indent=1) + "\n", encoding="utf-8")


def write_awq_mending(directory: Path) -> None:
    """What mends TensorRT-LLM in every Python that starts with ``directory`` on PYTHONPATH."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_bytes(Path(awq_builder.__file__).read_bytes())


def docker_command(out: Path, release: TrtllmRelease) -> str:
    """What builds the engines in the release's container; the directory that holds the export is mounted as it is."""
    parent, name = out.resolve().parent, out.resolve().name
    command = ["docker", "run", "--rm", "--gpus", "all", "--ipc", "host", "-v", f"{parent}:{parent}", "-w", str(parent)]
    return shlex.join([*command, release.container, "bash", f"{name}/engine/{BUILD_SCRIPT}"])


def _shell(command: list[str], places: Mapping[str, str]) -> str:
    """A command over several lines, a flag each; places stand for shell variables."""
    tool, flags = command[0], command[1:]
    lines = [
        f"{flag} {places.get(value) or shlex.quote(value)}" for flag, value in zip(flags[::2], flags[1::2], strict=True)
    ]
    return " \\\n  ".join([tool, *lines, "${EXTRA_FLAGS:-}"])
