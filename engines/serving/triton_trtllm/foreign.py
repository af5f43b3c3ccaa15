"""Checks a model repository that another tool wrote, NVIDIA's own templates among them: what a served Medusa engine needs of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError, MedusaExportError
from medusa_export.core.json_fields import read_json
from medusa_export.engines.serving.triton.config_files import CONFIG_FILE, parse, text_parameters
from medusa_export.engines.serving.triton_trtllm.parameters import PARAMETERS, parameter_problems
from medusa_export.heads.contract.trtllm_releases import RELEASES, TrtllmRelease, release_of_engine

PLACEHOLDER = re.compile(
    r"\$\{\w+\}"
)  # of NVIDIA's templates; the backend takes one that is left for a parameter that is not there
ENGINE_PATH, BACKEND = "gpt_model_path", "tensorrtllm"


def verify_foreign_repository(repository: Path) -> list[str]:
    """What is wrong with a repository, one line each: its configurations, parameters of the engine, and steps of ensembles.

    Raises:
        ConfigError: no repository.
    """
    paths = {path.parent.name: path for path in sorted(repository.glob(f"*/{CONFIG_FILE}"))}
    if not paths:
        raise ConfigError(str(repository), "no model repository", f"models with a {CONFIG_FILE}", "check the path")
    problems, configs = list[str](), dict[str, Any]()
    for name, path in paths.items():
        try:
            configs[name] = parse(path)
        except ConfigError as error:
            left = sorted(set(PLACEHOLDER.findall(path.read_text(encoding="utf-8", errors="replace"))))
            problems.append(f"{path}: {left[0]} is not filled in" if left else str(error))
    for name, config in configs.items():
        found = [*_of_model(paths[name].parent, config), *_of_steps(config, configs)]
        problems += [f"{paths[name]}: {problem}" for problem in found]
    return problems


def _of_model(folder: Path, config: Any) -> Iterator[str]:
    """Its name, its version's folder, its code, and its parameters if it has the engine."""
    if config.name and config.name != folder.name:
        yield f"name: got {config.name}; expected {folder.name}, as its folder"
    versions = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    if not versions:
        yield "no folder of a version, such as 1"
    if config.backend == "python":
        code = config.default_model_filename or "model.py"
        yield from (f"{path.name}: no {code}" for path in versions if not (path / code).is_file())
    parameters = text_parameters(config)
    if config.backend == BACKEND or ENGINE_PATH in parameters:
        try:
            release = _release(folder, parameters)
        except MedusaExportError as error:
            yield str(error)
            return
        left = {name for name, text in parameters.items() if PLACEHOLDER.fullmatch(text)}
        needed = {name for name, row in PARAMETERS.items() if row.required}
        given = {
            name: "" if name in left else text
            for name, text in parameters.items()
            if name in needed or name not in left
        }
        yield from parameter_problems(given, release, is_ours=False)


def _release(folder: Path, parameters: Mapping[str, str]) -> TrtllmRelease:
    """Of TensorRT-LLM: the engine's, where it can be read here, else the latest."""
    places = [Path(parameters.get(ENGINE_PATH, "")), *sorted(folder.glob("[0-9]*"))]
    built = next((path / "config.json" for path in places if path.name and (path / "config.json").is_file()), None)
    return release_of_engine(read_json(built).get("version"), str(built)) if built else RELEASES[-1]


def _of_steps(config: Any, configs: Mapping[str, Any]) -> Iterator[str]:
    """Of an ensemble: every step's model is there, gets what it needs, and has what is taken from it."""
    known = {tensor.name for tensor in config.input}
    for step in config.ensemble_scheduling.step:
        model = configs.get(step.model_name)
        if model is None:
            yield f"step {step.model_name}: no such model in the repository"
            known |= set(step.output_map.values())
            continue
        inputs, outputs = ({tensor.name: tensor for tensor in tensors} for tensors in (model.input, model.output))
        for name, tensor in sorted(step.input_map.items()):
            if name not in inputs:
                yield f"step {step.model_name}: it has no input {name}"
            if tensor not in known:
                yield f"step {step.model_name}: {tensor} is neither an input nor of a step before"
        needed = {name for name, port in inputs.items() if not port.optional}
        yield from (
            f"step {step.model_name}: its input {name} gets nothing" for name in sorted(needed - step.input_map.keys())
        )
        yield from (
            f"step {step.model_name}: it has no output {name}"
            for name in sorted(step.output_map.keys() - outputs.keys())
        )
        known |= set(step.output_map.values())
    for tensor in config.output if config.ensemble_scheduling.step else ():
        if tensor.name not in known:
            yield f"output {tensor.name}: no step gives it"
