"""Writes a Triton model repository for a TensorRT-LLM engine, and checks one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from medusa_export.core import errors
from medusa_export.core.artifacts.hashing import list_files
from medusa_export.core.artifacts.manifest import MANIFEST, hash_files, output_directory, read_manifest, verify_manifest
from medusa_export.core.errors import ConfigError, MedusaExportError
from medusa_export.core.json_fields import read_json
from medusa_export.core.text import encoding, special_tokens
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.core.typed_paths import as_recorded
from medusa_export.engines.serving import text_stream as stream_text
from medusa_export.engines.serving.triton import dialect
from medusa_export.engines.serving.triton.config_files import CONFIG_FILE, differences, parse, render
from medusa_export.engines.serving.triton.repository import LEFT_BY_USE
from medusa_export.engines.serving.triton_trtllm import model_bls as trtllm_bls
from medusa_export.engines.serving.triton_trtllm import model_postprocessing as trtllm_postprocessing
from medusa_export.engines.serving.triton_trtllm import model_preprocessing as trtllm_preprocessing
from medusa_export.engines.serving.triton_trtllm.configs import (
    BLS,
    ENGINE,
    ENSEMBLE,
    POSTPROCESSING,
    PREPROCESSING,
    EngineFacts,
    TrtllmServing,
    model_configs,
)
from medusa_export.engines.serving.triton_trtllm.deployment import deployment_files
from medusa_export.engines.serving.triton_trtllm.parameters import (
    FREE,
    TRUE,
    parameter_fault,
    parameter_problems,
    parse_choices,
)
from medusa_export.engines.serving.triton_trtllm.standalone import model_sources
from medusa_export.engines.trtllm.build import BUILD_FILE
from medusa_export.engines.trtllm.command import MEDUSA
from medusa_export.engines.trtllm.scripts import BUILD_SCRIPT, PLAIN_CONFIG, RUN_SCRIPT
from medusa_export.heads.contract.engine_info import ENGINE_FILE, TREE_FILE, EngineInfo
from medusa_export.heads.contract.trtllm_releases import release_of_engine
from medusa_export.heads.trees.acceptance import ACCEPTANCE_FILE
from medusa_export.heads.trees.tree import load_tree

KIND, VERSION, BACKEND = "tensorrt-llm", "1", "tensorrt-llm"
TOKENIZER = "tokenizer"
WITH_TOKENIZER = (PREPROCESSING, POSTPROCESSING, BLS)
SOURCES = {PREPROCESSING: trtllm_preprocessing, POSTPROCESSING: trtllm_postprocessing, BLS: trtllm_bls}
# Modules that lie in a model's own lib, under the names that its model.py and they themselves import them by.
LIBRARIES: dict[str, dict[str, ModuleType]] = {
    BLS: {"stream_text": stream_text},
    PREPROCESSING: {"dialect": dialect, "encoding": encoding, "special_tokens": special_tokens, "errors": errors},
}
OURS = (ENGINE_FILE, TREE_FILE)
NEEDS_PAGED_CONTEXT = ("enable_kv_cache_reuse", "enable_chunked_context")


def is_trtllm_engine(path: Path) -> bool:
    """Whether a directory is one that medusa-export wrote for TensorRT-LLM."""
    return (path / ENGINE_FILE).is_file() and read_json(path / ENGINE_FILE).get("backend") == BACKEND


def engine_facts(engine_dir: Path, built: Path) -> EngineFacts:
    """What decides the configurations.

    Args:
        engine_dir: where engine.json and tree.json are.
        built: where the engine's own config.json and its ranks are.

    Raises:
        ConfigError: no built engine, one without Medusa, or of a release that Triton has no container of.
    """
    if not (built / "config.json").is_file():
        raise ConfigError(str(built), "no engine", "a built one", "run build.sh of the export where the GPU is")
    info, config = EngineInfo.load(engine_dir), read_json(built / "config.json")
    release = release_of_engine(config.get("version"), f"{built}/config.json")
    if release.triton is None:
        raise ConfigError(
            str(built),
            f"an engine of TensorRT-LLM {release.name}",
            "one that a container of Triton has",
            "build it with 1.2.1",
        )
    if not info.eos_token_ids:
        action = "export again with eos_token_id in the model's generation_config.json"
        raise ConfigError(
            str(engine_dir / ENGINE_FILE), "no end-of-sequence token", "one, as Triton's models need", action
        )
    pretrained, numbers = config["pretrained_config"], config["build_config"]
    tree = load_tree(str(engine_dir / TREE_FILE), num_medusa_heads=pretrained.get("num_medusa_heads"))
    if tree.max_draft_len != pretrained.get("max_draft_len"):
        raise ConfigError(
            f"{engine_dir / TREE_FILE}", f"{tree.max_draft_len} choices",
            f"{pretrained.get('max_draft_len')}, which the engine was built for", "use the tree of its export",
        )  # fmt: skip
    tp = int(pretrained["mapping"]["tp_size"])
    missing = [f"rank{rank}.engine" for rank in range(tp) if not (built / f"rank{rank}.engine").is_file()]
    if missing:
        raise ConfigError(str(built), f"no {missing[0]}", f"{tp} ranks", "build it again")
    return EngineFacts(
        release, tree, tp, int(numbers["max_batch_size"]), info.max_length, info.eos_token_ids,
        paged_context=bool(numbers.get("plugin_config", {}).get("use_paged_context_fmha")),
        logits=str(pretrained.get("logits_dtype", "float32")), vocab_size=info.vocab_size, window=info.source.get("sliding_window"),
        heads=pretrained.get("num_medusa_heads"),
    )  # fmt: skip


def write_trtllm_repository(engine_dir: Path, output: Path, serving: TrtllmServing | None = None) -> None:
    """A complete model repository; it appears all at once or not at all.

    Args:
        engine_dir: what build.sh or medusa-export left, with the engine in ``medusa``; it is copied.

    Raises:
        MedusaExportError: an engine that cannot be served, choices that do not fit it, or an output that is there already.
    """
    serving, built = serving or TrtllmServing(), engine_dir / MEDUSA
    facts = engine_facts(engine_dir, built)
    if serving.chunked_context and not facts.paged_context:
        raise ConfigError(
            "--chunked-context", "an engine built without use_paged_context_fmha", "one with it", "leave it out"
        )
    configs = model_configs(facts, serving)
    _require_parameters(configs[ENGINE], facts)
    files = {f"{ENGINE}/{VERSION}/{path.name}": path for path in sorted(built.iterdir()) if path.is_file()}
    files |= {f"{ENGINE}/{VERSION}/{name}": engine_dir / name for name in OURS}
    files |= {
        f"{model}/{VERSION}/{TOKENIZER}/{path.name}": path
        for model in WITH_TOKENIZER
        for path in _tokenizer_files(engine_dir)
    }
    texts = {f"{model}/{CONFIG_FILE}": render(config) for model, config in configs.items()}
    for model, module in SOURCES.items():
        texts |= {f"{model}/{VERSION}/{name}": text for name, text in model_sources(module, LIBRARIES.get(model, {}))}
    texts |= {f"{ENSEMBLE}/{VERSION}/README.md": "An ensemble has no files of its own; Triton wants the folder.\n"}
    texts |= deployment_files(facts, serving)
    arguments = {
        "kind": KIND,
        "engine": as_recorded(engine_dir),
        **{name: str(value) for name, value in asdict(serving).items()},
    }
    with output_directory(output, inputs=_inputs(engine_dir, files.values()), arguments=arguments) as work:
        for name, path in files.items():
            work.copy(name, path)
        for name, text in texts.items():
            work.write_text(name, text)


def _inputs(engine_dir: Path, files: Iterable[Path]) -> dict[str, str]:
    """What a manifest calls the files of an engine -> SHA-256."""
    hashes = hash_files(dict.fromkeys(files))
    return {f"engine/{Path(path).relative_to(engine_dir).as_posix()}": digest for path, digest in hashes.items()}


# Field of engine.json -> key of TensorRT-LLM's config.json.
SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_hidden_layers": "num_hidden_layers",
    "num_key_value_heads": "num_key_value_heads", "head_dim": "head_size", "max_depth": "num_medusa_heads",
}  # fmt: skip


def built_config(repository: Path) -> Path:
    """What trtllm-build left of the model's configuration."""
    return repository / ENGINE / VERSION / "config.json"


def tokenizer_of(repository: Path) -> Path:
    """The tokenizer that texts are encoded with."""
    return repository / PREPROCESSING / VERSION / TOKENIZER


def verify_trtllm_repository(repository: Path) -> list[str]:
    """What is wrong with a repository, one line each: files, configurations, parameters, engine, tree and tokenizer."""
    problems = verify_manifest(repository, left_by_use=LEFT_BY_USE)
    if not (repository / MANIFEST).is_file():
        return problems
    try:
        serving = _serving(read_manifest(repository)["arguments"])
        built = repository / ENGINE / VERSION
        facts = engine_facts(built, built)
        for model, config in model_configs(facts, serving).items():
            problems += _config_problems(repository / model / CONFIG_FILE, config, facts)
        for model in WITH_TOKENIZER:
            read_tokenizer(repository / model / VERSION / TOKENIZER)
        problems += _copy_problems(repository)
        problems += _engine_problems(built)
    except MedusaExportError as error:
        problems.append(str(error))
    return problems


def _copy_problems(repository: Path) -> Iterator[str]:
    """Models that have another tokenizer than the first one: they would read each other's tokens wrong."""
    first, *others = (repository / model / VERSION / TOKENIZER for model in WITH_TOKENIZER)
    for other in others:
        mine, theirs = list_files(first, first), list_files(other, other)
        for name in sorted(mine.keys() | theirs.keys()):
            if name not in mine or name not in theirs or mine[name].read_bytes() != theirs[name].read_bytes():
                yield f"{other / name}: it is not that of {first.parents[1].name}"


def _engine_problems(built: Path) -> Iterator[str]:
    """Sizes that the engine's config.json and engine.json say both."""
    info, config = EngineInfo.load(built), read_json(built / "config.json")["pretrained_config"]
    for ours, theirs in SIZES.items():
        if theirs in config and config[theirs] != getattr(info, ours):
            yield f"{built / 'engine.json'}: {ours} {getattr(info, ours)}; config.json has {theirs} {config[theirs]}"


def _config_problems(path: Path, expected: dict[str, Any], facts: EngineFacts) -> list[str]:
    """How a configuration differs from what it should be, and whether its model takes it so."""

    def fault_of(name: str, text: str | None) -> str:
        if path.parent.name == ENGINE:
            return parameter_fault(name, text, facts.release) or _engine_fault(name, text or "", facts)
        return _model_fault(name, text, expected["parameters"])

    return [f"{path}: {problem}" for problem in differences(parse(path), expected, fault_of, _field_faults(facts))]


def _field_faults(facts: EngineFacts) -> dict[str, Callable[[Any], str]]:
    """What is wrong with a changed field, by its name."""
    most = facts.max_batch_size

    def instances(found: Any) -> str:
        if any(group.kind != group.KIND_CPU for group in found.instance_group):
            return "expected KIND_CPU: the backend places the engine on the GPUs itself"
        several = found.name == ENGINE and sum(group.count for group in found.instance_group) > 1
        return "expected one instance: a further one loads the engine again" if several else ""

    return {
        "name": lambda found: "expected the name of its folder, by which the other models ask for it",
        "max_batch_size": lambda found: (
            "" if 1 <= found.max_batch_size <= most else f"expected 1 to {most}, the engine's"
        ),
        "instance_group": instances,
        "dynamic_batching": lambda found: "",
        "model_transaction_policy": lambda found: (
            "expected what was written: medusa-triton --no-decoupled changes all models"
        ),
    }


def _engine_fault(name: str, text: str, facts: EngineFacts) -> str:
    """What is wrong with a right value for this engine: a tree that it was not built for, or what its kernels cannot."""
    if name in NEEDS_PAGED_CONTEXT and text in TRUE and not facts.paged_context:
        return "expected false: the engine was built without use_paged_context_fmha"
    if name == "medusa_choices":
        tree, size = parse_choices(text), facts.tree.max_draft_len
        if tree.max_draft_len != size or tree.depth > (facts.heads or tree.depth):
            return f"expected {size} choices, as the engine was built for, and no more levels than it has heads"
    return ""


def _model_fault(name: str, text: str | None, written: dict[str, Any]) -> str:
    """What is wrong with a changed parameter of a model around the engine; most follow from the engine."""
    if name not in written:
        return "there is no such parameter, and the model would ignore it"
    if name in FREE:
        return "" if text is not None and FREE[name].is_right(text) else f"expected {FREE[name].expected}"
    return f"expected {written[name]['string_value']!r}, which follows from the engine"


def _require_parameters(config: dict[str, Any], facts: EngineFacts) -> None:
    parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
    for problem in parameter_problems(parameters, facts.release):
        where, _, rest = problem.partition(": got ")
        got, _, expected = rest.partition("; expected ")
        raise ConfigError(where, got or problem, expected or "what the backend takes", "choose another value")


def _serving(arguments: dict[str, Any]) -> TrtllmServing:
    """The choices that a manifest recorded.

    Raises:
        ConfigError: one that is missing, or no value of its kind.
    """
    values: dict[str, Any] = {}
    for item in fields(TrtllmServing):
        text = arguments.get(item.name)
        try:
            values[item.name] = text == "True" if isinstance(item.default, bool) else type(item.default)(text)  # type: ignore[misc]
        except (TypeError, ValueError) as error:
            where, expected = f"{MANIFEST}: arguments.{item.name}", f"a value such as {item.default!r}"
            raise ConfigError(where, repr(text), expected, "write the repository again") from error
    return TrtllmServing(**values)


def _tokenizer_files(engine_dir: Path) -> list[Path]:
    """The tokenizer's files beside an engine, and nothing else of it."""
    read_tokenizer(engine_dir)
    others = {*OURS, BUILD_FILE, PLAIN_CONFIG, BUILD_SCRIPT, RUN_SCRIPT, ACCEPTANCE_FILE}
    return [path for name, path in list_files(engine_dir, engine_dir).items() if "/" not in name and name not in others]
