"""Portable graphs of a tiny model with an engine directory beside them, as an export to TensorRT leaves them, without engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from medusa_export.engines.tensorrt.emulation.torch_device import NoTensorRt
from medusa_export.exporter.engine_dirs.tensorrt import write_portable, write_tensorrt_engine
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.trees.tree import load_tree
from medusa_export.quantize.formats import get_format
from medusa_export.quantize.scales import Scales


@dataclass
class Portable:
    """What was written where."""

    checkpoint: MedusaCheckpoint
    model_dir: Path
    onnx_dir: Path
    engine_dir: Path


@pytest.fixture
def portable(
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    tiny_heads: Callable[..., Path],
    predictable: Callable[..., None],
) -> Callable[..., Portable]:
    """``portable(family="llama", dtype="float16", quant="none", **config)``: a context of 64 and heads that draft well.

    Scales are the weights' true maxima and 8 for all inputs.
    """

    def make(family: str = "llama", dtype: str = "float16", quant: str = "none", **config: Any) -> Portable:
        root = tmp_path / f"portable{len(list(tmp_path.iterdir()))}"
        sizes = {"hidden": config["hidden_size"]} if "hidden_size" in config else {}
        model_dir = tiny_checkpoint(root / "model", family, **config)
        heads_dir = tiny_heads(root / "heads", **sizes)
        predictable(model_dir, heads_dir)
        checkpoint = MedusaCheckpoint.open(model_dir, heads_dir)
        linears = [name.removesuffix(".weight") for name in checkpoint.names if name.endswith("proj.weight")]
        amax = {name: float(checkpoint.read(f"{name}.weight").abs().max()) for name in linears}
        smoothing = {
            name: checkpoint.read(f"{name}.weight").new_ones(checkpoint.shape(f"{name}.weight")[1]) for name in linears
        }
        scales = Scales(
            dict.fromkeys(amax, 8.0), amax, {}, {name: factor.float() for name, factor in smoothing.items()}
        )
        tree, weight_format = load_tree("cpu-8"), get_format(quant, 64 if quant == "int4_awq" else None)
        made = Portable(checkpoint, model_dir, root / "onnx", root / "engine")
        write_portable(
            made.onnx_dir, checkpoint, weight_format, scales, dtype=dtype, tree=tree, max_length=64, draft_vocab=None
        )
        write_tensorrt_engine(
            made.engine_dir, made.onnx_dir, checkpoint, weight_format, gpus=(89,), dtype=dtype, tree=tree, max_length=64,
            builder=NoTensorRt(), progress=lambda *step: None, save_tokenizer=lambda path: None, source={},
        )  # fmt: skip
        return made

    return make
