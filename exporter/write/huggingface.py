"""ModelOpt's unified Hugging Face checkpoint with Medusa heads: what ModelOpt and vLLM's quantization loaders take.

Source: ``modelopt.torch.export.export_hf_checkpoint`` 0.47, whose files these are compared with in the tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medusa_export.core.json_fields import HUGGING_FACE, read_json
from medusa_export.exporter.plan.hf_layout import excluded_modules, huggingface_form
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.tensor_plan import TensorPlan
from medusa_export.exporter.write.safetensors import SafetensorsWriter
from medusa_export.exporter.write.shards import write_index
from medusa_export.exporter.write.tensor_maker import TensorMaker
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.quantize.scales import Scales


def write_shard(
    path: Path, checkpoint: MedusaCheckpoint, spec: ExportSpec, scales: Scales, plans: list[TensorPlan]
) -> None:
    """One safetensors file.

    Args:
        path: the file.
        checkpoint: what the weights are read from.
        spec: the layout.
        scales: as :func:`require_scales` returned them.
        plans: the shard's tensors.
    """
    maker = TensorMaker(checkpoint, spec, scales)
    with SafetensorsWriter(path, plans, {"format": "pt"}) as writer:
        for plan in writer.entries:
            writer.write(maker.rows(plan))


def write_hf_configs(out: Path, ckpt: Path, spec: ExportSpec, files: dict[str, list[TensorPlan]]) -> None:
    """config.json, hf_quant_config.json and the index of shards.

    Args:
        out: an existing directory.
        ckpt: the source, whose config.json is carried over.
        spec: the layout.
        files: shard name -> its tensors.
    """
    counts = {"num_medusa_heads": spec.num_medusa_heads, "num_medusa_layers": spec.num_medusa_layers}
    config = {**read_json(ckpt / "config.json", *HUGGING_FACE), "dtype": spec.dtype, "medusa": counts}
    config.pop("torch_dtype", None)
    if spec.weight_format.is_quantized or spec.kv_cache.quant_algo:
        config["quantization_config"] = _quantization_config(spec)
        _write(out / "hf_quant_config.json", {"producer": _PRODUCER, "quantization": _quantization(spec)})
    _write(out / "config.json", config)
    write_index(out, files)


# ModelOpt's and vLLM's readers look for this name to know the format.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def _write(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def _quantization(spec: ExportSpec) -> dict[str, Any]:
    group = {"group_size": spec.weight_format.group_size} if spec.weight_format.group_size else {}
    return {
        "quant_algo": spec.weight_format.trtllm.algo,
        "kv_cache_quant_algo": spec.kv_cache.quant_algo,
        **group,
        "exclude_modules": excluded_modules(spec),
    }


def _quantization_config(spec: ExportSpec) -> dict[str, Any]:
    """The same in the form of config.json, which is what loaders read first."""
    body: dict[str, Any] = {
        "ignore": excluded_modules(spec),
        "quant_algo": spec.weight_format.trtllm.algo,
        "producer": _PRODUCER,
    }
    body["quant_method"] = "modelopt"
    if spec.kv_cache.quant_algo:
        body["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    bits = huggingface_form(spec.weight_format).group_bits
    if bits is not None:
        group = {"group_size": spec.weight_format.group_size} if spec.weight_format.group_size else {}
        numbers = {"dynamic": False, "num_bits": bits, "type": "float", **group}
        targets = {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
        body["config_groups"] = {"group_0": targets}
    return body
