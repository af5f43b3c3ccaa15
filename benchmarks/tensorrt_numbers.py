"""The numbers of the graphs that TensorRT is given, in ONNX Runtime, against float32 PyTorch on the very weights in the file.

What differs from that reference is arithmetic alone, nothing was rounded in between; from the checkpoint, quantization too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from medusa_export.engines.tensorrt.emulation.onnx_device import OnnxDevice
from medusa_export.engines.tensorrt.emulation.torch_device import read_tensor
from medusa_export.engines.tensorrt.emulation.torch_operators import dequantize
from medusa_export.engines.tensorrt.engine import TensorRtEngine
from medusa_export.engines.verify.selfcheck import tree_error
from medusa_export.exporter.onnx.portable.linear import PORTABLE_FORMS
from medusa_export.exporter.verify.dequantize import rounded_inputs
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.contract.engine_info import DECODER_FILE
from medusa_export.quantize.format_facts import TensorRt
from medusa_export.quantize.formats import FORMATS

QKV = ("q_proj", "k_proj", "v_proj")
# As TensorRT-LLM rounds inputs, by form; see rounded_inputs.
ROUNDED = {
    row.tensorrt.form: row.trtllm.algo
    for row in FORMATS.values()
    if isinstance(row.tensorrt, TensorRt) and PORTABLE_FORMS[row.tensorrt.form].activations
}
NUDGE = 1e-6  # what float32 sums in another order differ by, in units of their result
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def figures(
    engine_dir: Path, onnx_dir: Path, ckpt: Path, form: str, dtype: str, texts: Sequence[list[int]]
) -> dict[str, Any]:
    """Teacher-forced over every position of the texts.

    Returns:
        positions; of the graph against the reference of its weights: max_error and rms_error (logits), relative_error (rms over
        the standard deviation of the logits), same_token (share of equal best tokens); own_error, the relative_error of the
        reference against itself with embeddings moved by a millionth: what float32 arithmetic in another order does to it; against
        the checkpoint: kl_mean (nats) and agreement; tree_noise (logits), between steps of a tree and of one token.
    """
    engine = TensorRtEngine(engine_dir, OnnxDevice(onnx_dir))
    exact: Any = load_reference(ckpt, torch.float32)
    stored = stored_model(onnx_dir, ckpt, form, getattr(torch, dtype))
    rows = [[_scored(engine, text), _logits(stored, text), _logits(exact, text)] for text in texts]
    ours, wanted, source = (torch.cat(column) for column in zip(*rows, strict=True))  # [T, V] each
    error, log_source, log_ours = ours - wanted, source.log_softmax(-1), ours.log_softmax(-1)
    rms, spread = float(error.pow(2).mean().sqrt()), float(wanted.std(-1).mean())
    table = stored.model.embed_tokens.weight.data
    table.mul_(1 + NUDGE * torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    nudged = torch.cat([_logits(stored, text) for text in texts]) - wanted
    return {
        "positions": len(ours), "max_error": float(error.abs().max()), "rms_error": rms,
        "relative_error": rms / spread, "own_error": float(nudged.pow(2).mean().sqrt()) / spread,
        "same_token": float((ours.argmax(-1) == wanted.argmax(-1)).float().mean()),
        "kl_mean": float((log_source.exp() * (log_source - log_ours)).sum(-1).mean()),
        "agreement": float((ours.argmax(-1) == source.argmax(-1)).float().mean()),
        "tree_noise": max(tree_error(engine, text) for text in texts[:2]),
    }  # fmt: skip


def _scored(engine: TensorRtEngine, text: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(list(engine.score(text, chunk=64))))  # [T, V]


def _logits(model: Any, text: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(text)])).logits[0]
        return logits  # [T, V]


def stored_model(onnx_dir: Path, ckpt: Path, form: str, dtype: torch.dtype) -> Any:
    """transformers' model with the weights of the graph, its rounding of inputs and its 16-bit tables, and float32 arithmetic."""
    path = onnx_dir / DECODER_FILE
    graph = onnx.load(path, load_external_data=False).graph
    protos = {tensor.name: tensor for tensor in graph.initializer}
    attributes = {
        node.input[0]: {item.name: item.i for item in node.attribute} for node in graph.node if node.op_type == "DequantizeLinear"
    }  # fmt: skip

    def read(name: str) -> torch.Tensor | None:
        return read_tensor(protos[name], path.parent).float() if name in protos else None

    model: Any = load_reference(ckpt, dtype).float()
    model.model.rotary_emb.register_forward_hook(
        lambda module, args, out: tuple(table.to(dtype).float() for table in out)
    )
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        fused = name.rsplit(".", 1)[-1] in QKV
        key = f"{name.rsplit('.', 1)[0]}.q_proj+2" if fused else name
        weight = _weight(protos, attributes, path.parent, key).T  # [N, K]
        module.weight.data.copy_(_rows(model, name, weight) if fused else weight)
        scale, smoothing = read(f"{key}.input_scale"), read(f"{key}.pre_quant_scale")
        rounded = partial(_round, ROUNDED.get(form), smoothing, None if scale is None else float(scale))
        module.register_forward_pre_hook(rounded)
    return model


def _rows(model: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Those of q, k or v in the fused weight."""
    parent = name.rsplit(".", 1)[0]
    sizes = [len(model.get_submodule(f"{parent}.{kind}").weight) for kind in QKV]
    return weight.split(sizes)[QKV.index(name.rsplit(".", 1)[-1])]


def _weight(protos: dict[str, Any], attributes: dict[str, dict[str, Any]], directory: Path, key: str) -> torch.Tensor:
    """What the stored numbers of a linear stand for.  # float32 [K, N]"""
    stored = protos[f"{key}.weight"]
    if f"{key}.weight_scale" not in protos:
        return read_tensor(stored, directory).float()
    scale = read_tensor(protos[f"{key}.weight_scale"], directory)
    if stored.data_type != onnx.TensorProto.FLOAT4E2M1:
        return dequantize(read_tensor(stored, directory), scale.float(), **attributes[stored.name])
    nibbles = onnx.TensorProto()
    nibbles.CopyFrom(stored)
    nibbles.data_type = onnx.TensorProto.INT4  # the same four bits: sign and magnitude
    codes = read_tensor(nibbles, directory).view(torch.uint8)
    values = torch.where(codes & 8 > 0, -FP4[(codes & 7).long()], FP4[(codes & 7).long()])  # [N, K]
    blocks = scale.float() * read_tensor(protos[f"{key}.weight_scale_2"], directory)
    return (values * blocks.repeat_interleave(16, dim=1)).T


def _round(
    algo: str | None, smoothing: torch.Tensor | None, scale: float | None, module: Any, inputs: tuple[torch.Tensor]
) -> tuple[torch.Tensor]:
    x = inputs[0] if smoothing is None else inputs[0] * smoothing
    return (rounded_inputs(algo, x, scale, None),)
