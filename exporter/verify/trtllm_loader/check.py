"""Loads a TensorRT-LLM Medusa checkpoint as ``trtllm-build`` would, from headers alone, and calls errors what it passes over.

TensorRT-LLM refuses a missing tensor or a wrong shape. It warns of surplus tensors and wrong dtypes, and says nothing of a missing
``lm_head``, of a Medusa head's too, which then holds whatever was in memory. Source: ``load`` in
tensorrt_llm/models/modeling_utils.py, parameter.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medusa_export.core.errors import CheckpointError, ConfigError
from medusa_export.core.json_fields import read_json
from medusa_export.exporter.verify.trtllm_loader.config import config_notes, config_problems, read_config
from medusa_export.exporter.verify.trtllm_loader.modules import (
    ALGOS,
    BUFFERS,
    BUILDER_QUANTIZES,
    Needs,
    is_quantized,
    medusa_modules,
    module_needs,
    required_tensors,
)
from medusa_export.heads.checkpoint.tensor_source import TensorSource

KV_SCALE = "kv_cache_scaling_factor"
BYTES = "int8"  # the dtype that some writers give FP8 codes


def load_problems(trt_dir: Path) -> list[str]:
    """Why ``trtllm-build`` would not build what the checkpoint means, one line each; an empty list is a good checkpoint."""
    try:
        config = read_config(trt_dir)
        return config_problems(config) or [
            f"{name}: {problem}"
            for name, source in open_ranks(trt_dir, config).items()
            for problem in ([source] if isinstance(source, str) else rank_problems(source, config))
        ]
    except (CheckpointError, ConfigError) as error:
        return [str(error)]


def load_notes(trt_dir: Path) -> list[str]:
    """What is unusual in a checkpoint that builds right, one line each: keys left to their defaults, and buffers in the files.

    Args:
        trt_dir: of a checkpoint without :func:`load_problems`.
    """
    config = read_json(trt_dir / "config.json")
    return config_notes(config) + [
        f"{name}: {buffer} is in the file; TensorRT-LLM makes it itself where it is not"
        for name, source in open_ranks(trt_dir, read_config(trt_dir)).items()
        if not isinstance(source, str)
        for buffer in BUFFERS
        if buffer in source
    ]


def open_ranks(trt_dir: Path, config: Mapping[str, Any]) -> dict[str, TensorSource | str]:
    """Every rank's file, or what is wrong with it as a file."""
    expected = {f"rank{rank}.safetensors" for rank in range(config["mapping"]["tp_size"])}
    present = {path.name for path in trt_dir.glob("*.safetensors")}
    files: dict[str, TensorSource | str] = dict.fromkeys(sorted(expected - present), "missing")
    files |= dict.fromkeys(sorted(present - expected), "belongs to no rank")
    for name in sorted(expected & present):
        files[name] = TensorSource.open(trt_dir / name)
    return files


def rank_problems(source: TensorSource, config: Mapping[str, Any]) -> Iterator[str]:
    """What the loader would refuse or pass over in one rank's file."""
    given = {name: (source.dtype(name), source.shape(name)) for name in source.names}
    need = _accepted(required_tensors(config), given, config)
    for name in sorted(need.keys() - given.keys()):
        silent = name.endswith("lm_head.weight")
        yield f"{name} is missing" + (
            "; TensorRT-LLM would leave it random without a word" if silent else _why(name, config)
        )
    for name in sorted(given.keys() - need.keys() - {*BUFFERS}):
        yield f"{name} is not expected; TensorRT-LLM would drop it with a warning"
    for name in sorted(need.keys() & given.keys()):
        (dtype, shape), (got_dtype, got_shape) = need[name], given[name]
        if (got_dtype, got_shape) != (dtype, shape):
            yield f"{name} is {got_dtype} {list(got_shape)}; expected {dtype} {list(shape)}"


def _why(name: str, config: Mapping[str, Any]) -> str:
    """What asks for a tensor that people do not expect."""
    module, _, suffix = name.rpartition(".")
    built = module.rsplit(".", 1)[-1] in BUILDER_QUANTIZES
    algo = config["quantization"].get("quant_algo")
    if suffix != "per_channel_scale" or built or not ALGOS[algo].by_builder:
        return ""
    return f"; exclude {module}*: trtllm-build itself quantizes {', '.join(BUILDER_QUANTIZES)} only"


def _accepted(need: Needs, given: Needs, config: Mapping[str, Any]) -> Needs:
    """The needs, with the other forms that the loader takes where the file holds them."""
    need = dict(need)
    for name in [name for name in need if name.endswith(KV_SCALE)]:
        pair = [name.replace("kv_cache", f"{x}_cache") for x in "kv"]
        if all(each in given for each in pair):  # the loader makes the larger one of them, in place of what is there
            need |= dict.fromkeys(pair, need[name])
            if name not in given:
                del need[name]
    algo = config["quantization"].get("quant_algo")
    if algo is not None and ALGOS[algo].by_builder:
        need = _processed(need, given, config)
    for name, (dtype, shape) in list(need.items()):
        as_bytes = dtype == "float8_e4m3fn" and given.get(name) == (BYTES, shape)
        without_axis = shape == (1,) and given.get(name) == (dtype, ())  # as ModelOpt leaves NVFP4's single numbers
        if as_bytes or without_axis:
            need[name] = given[name]
    return need


def _processed(need: Needs, given: Needs, config: Mapping[str, Any]) -> Needs:
    """Linears that the file holds as INT8 or INT4 already instead of in the 16 bit that trtllm-build quantizes."""
    for module in medusa_modules(config):
        built = module.name.rsplit(".", 1)[-1] in BUILDER_QUANTIZES and is_quantized(config, module)
        if built and f"{module.name}.per_channel_scale" in given:
            need |= module_needs(config, module, processed=True)
    return need
