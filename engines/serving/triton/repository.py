"""Writes a Triton model repository for an engine of ONNX Runtime or TensorRT, and checks one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from medusa_export.core.artifacts.hashing import list_files
from medusa_export.core.artifacts.manifest import MANIFEST, hash_files, output_directory, read_manifest, verify_manifest
from medusa_export.core.errors import ConfigError, MedusaExportError
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.core.typed_paths import as_recorded
from medusa_export.engines.decoding.batch_trees import BatchTrees
from medusa_export.engines.decoding.draft_kinds import settle_drafts
from medusa_export.engines.serving.decoders import require_served
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.serving.triton.config_files import CONFIG_FILE, differences, parse, render
from medusa_export.engines.serving.triton.dialect import UNHONOURED, Port
from medusa_export.engines.serving.triton.tensors import INPUTS, OUTPUTS
from medusa_export.heads.contract.engine_info import TREE_FILE, EngineInfo

LEFT_BY_USE = ("__pycache__",)  # Triton's python backend compiles the models where they lie
KIND = "python"  # the backend of Triton that runs it
ENGINE = "engine"  # in the model's version directory
UNARY = "_unary"
VERSION = "1"
MODEL_CODE = '''"""Loaded by Triton's python backend."""

from {module} import {name} as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
LAUNCH = """#!/usr/bin/env bash
# Starts tritonserver on this repository: bash launch.sh [further flags of tritonserver]. On loopback; HOST=0.0.0.0 lets others in.
# HTTP_PORT, GRPC_PORT and METRICS_PORT are other ports. Without a tritonserver on the PATH: medusa-triton serve --install DIRECTORY
set -euo pipefail
cd "$(dirname "$0")"
command -v tritonserver >/dev/null || {
  echo "error: tritonserver: got no such program; expected NVIDIA's container or a PATH that has it; run it there" >&2
  exit 2
}
# Triton recurses through an HTTP body: with the usual stack of 8 MB, one of 4 MB ends the server.
ulimit -s 262144 2>/dev/null || echo "warning: the stack stays at $(ulimit -s) KB: keep large bodies away from this server" >&2
host="${HOST:-127.0.0.1}"
exec tritonserver --model-repository . --disable-auto-complete-config --http-address "$host" --http-port "${HTTP_PORT:-8000}" \\
  --grpc-address "$host" --grpc-port "${GRPC_PORT:-8001}" --metrics-address "$host" --metrics-port "${METRICS_PORT:-8002}" "$@"
"""
README = """# {name}: {precision}

Text in, text out, decoded with Medusa. Made from `{source}`; nothing outside this directory is needed but the package `medusa-export`
in the server's Python environment, with {packages}.

    bash {directory}/launch.sh  # or: medusa-triton serve {directory}
    curl -s 127.0.0.1:8000/v2/models/{name}/generate_stream -d '{{"text_input": "Why is the sky blue?", "stream": true}}'
    curl -s 127.0.0.1:8000/v2/models/{name}/generate -d '{{"text_input": "Why is the sky blue?"}}'

| model | for |
|---|---|
| `{name}` | answers in pieces (`stream`) or whole: gRPC streaming, `/generate_stream`, `/generate` |
| `{name}{unary}` | whole answers for calls that take one response: `/infer`, gRPC `ModelInfer` |

Both share one engine, {order}.

| input | type | |
|---|---|---|
{inputs}

| output | type |
|---|---|
{outputs}
"""

README_WORDS = {
    "onnxruntime": {
        "packages": "numpy below 2, onnxruntime and transformers",
        "order": "whose steps serve all requests at once",
    },
    "tensorrt": {
        "packages": "numpy below 2, torch for CUDA, transformers, and the TensorRT package that built the engine",
        "order": "which answers one request after another",
    },
}


def write_repository(
    engine: Path,
    output: Path,
    *,
    name: str = "medusa",
    options: ServingOptions | None = None,
    tree: Path | None = None,
) -> None:
    """A complete model repository; it appears all at once or not at all.

    Args:
        engine: the engine directory of an export; it is copied.
        output: the repository to make.
        tree: tree.json to serve with instead of the engine's.
        name: the model's; its twin for unary calls is called ``{name}_unary``.

    Raises:
        MedusaExportError: an engine that cannot be used, a name that Triton would not take, or an output that is there already.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError("--name", repr(name), "letters, digits, _ . and -", "choose another one")
    options = options or ServingOptions()
    info = EngineInfo.load(engine)
    require_served(engine, info, options)
    options = replace(options, drafts=settle_drafts(options.drafts, info, own_tree=tree is not None))
    paths = list_files(engine, engine) | {TREE_FILE: tree or engine / TREE_FILE}
    BatchTrees.load(paths[TREE_FILE], unmeasured=options.tree_max_batch).require(info)
    read_tokenizer(engine)
    arguments = {"kind": KIND, "engine": as_recorded(engine), "name": name, **options.as_text()}
    hashes = hash_files(paths.values())
    inputs = {f"engine/{relative}": hashes[str(path)] for relative, path in paths.items()}
    with output_directory(output, inputs=inputs, arguments=arguments) as work:
        for relative, path in paths.items():
            work.copy(f"{name}/{VERSION}/{ENGINE}/{relative}", path)
        for model, config in repository_configs(name, options).items():
            work.write_text(f"{model}/{CONFIG_FILE}", render(config))
            work.write_text(f"{model}/{VERSION}/model.py", model_code(model, name))
        work.write_text("README.md", _readme(name, output, info))
        work.write_text("launch.sh", LAUNCH)


def repository_configs(name: str, options: ServingOptions) -> dict[str, dict[str, Any]]:
    """The fields of both models' configurations, by model."""
    shared = {
        "backend": "python",
        "max_batch_size": 1,  # a batch axis, as NVIDIA's clients send it; a request is one text
        "input": [port.as_config() for port in INPUTS],
        "output": [port.as_config() for port in OUTPUTS],
        "instance_group": [{"kind": "KIND_CPU", "count": 1}],
    }
    streaming = _parameters({"engine": ENGINE, **options.as_text()})
    return {
        name: {"name": name, **shared, "model_transaction_policy": {"decoupled": True}, "parameters": streaming},
        f"{name}{UNARY}": {"name": f"{name}{UNARY}", **shared, "parameters": _parameters({"model": name})},
    }


def verify_repository(repository: Path) -> list[str]:
    """What is wrong with a repository, one line each: files, configurations, engine and tokenizer."""
    problems = verify_manifest(repository, left_by_use=LEFT_BY_USE)
    if not (repository / MANIFEST).is_file():
        return problems
    try:
        arguments = read_manifest(repository)["arguments"]
        expected = repository_configs(arguments["name"], ServingOptions.from_text(arguments))
        for model, config in expected.items():
            path = repository / model / CONFIG_FILE
            problems += [f"{path}: {line}" for line in differences(parse(path), config, _fault_of, FIELD_FAULTS)]
        engine = repository / arguments["name"] / VERSION / ENGINE
        BatchTrees.load(engine / TREE_FILE, unmeasured=1).require(EngineInfo.load(engine))
        read_tokenizer(engine)
    except MedusaExportError as error:
        problems.append(str(error))
    return problems


# What the code of both models relies on.
FIELD_FAULTS: dict[str, Callable[[Any], str]] = {
    "name": lambda found: "expected the name of its folder; medusa-triton --name writes another",
    "max_batch_size": lambda found: "expected 1: a request is one text, and the scheduler batches by itself",
    "instance_group": lambda found: (
        "expected one instance: it serves all requests at once, and a further one opens the engine again"
    ),
    "dynamic_batching": lambda found: "expected none: a refused request would fail those beside it",
    "model_transaction_policy": lambda found: "expected what was written, as the model sends its answers that way",
}
FIXED = {"engine": f"{ENGINE}, where the engine lies", "model": "the name of the model that has the engine"}


def _fault_of(parameter: str, text: str | None) -> str:
    """What is wrong with a changed parameter of either model; an option that is not there has its default."""
    expected = FIXED.get(parameter) or ServingOptions.may_be(parameter)
    if not expected:
        return "there is no such parameter, and the model would ignore it"
    try:
        ServingOptions.from_text({} if text is None else {parameter: text})
    except ConfigError:
        return f"expected {expected}"
    return f"expected {expected}" if parameter in FIXED else ""


def _parameters(values: dict[str, str]) -> dict[str, dict[str, str]]:
    return {name: {"string_value": value} for name, value in values.items()}


def model_code(model: str, name: str) -> str:
    if model == name:
        return MODEL_CODE.format(module="medusa_export.engines.serving.triton.model", name="MedusaModel")
    return MODEL_CODE.format(module="medusa_export.engines.serving.triton.unary", name="UnaryModel")


def _readme(name: str, output: Path, info: EngineInfo) -> str:
    def type_of(port: Port) -> str:
        return port.data_type + ("[]" if port.dims[-1] == -1 else "")

    def note_of(port: Port) -> str:
        limit = UNHONOURED.get(port.name)
        return f"only {limit.expected}" if limit else "" if port.is_optional else "required"

    return README.format(
        name=name, unary=UNARY, directory=output.name, precision=info.precision, **README_WORDS[info.backend],
        source=Path(str(info.source.get("checkpoint", "a checkpoint"))).name,
        inputs="\n".join(f"| `{port.name}` | {type_of(port)} | {note_of(port)} |" for port in INPUTS),
        outputs="\n".join(f"| `{port.name}` | {type_of(port)} |" for port in OUTPUTS),
    )  # fmt: skip
