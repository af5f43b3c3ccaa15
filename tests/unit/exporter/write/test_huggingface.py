"""The unified Hugging Face checkpoint against ModelOpt's own export of the same model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.plan.hf_layout import plan_hf, require_hf
from medusa_export.exporter.plan.spec import export_spec
from medusa_export.exporter.write.huggingface import write_hf_configs, write_shard
from medusa_export.exporter.write.shards import shards
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize import ptq
from medusa_export.quantize.formats import KV_CACHE, get_format
from medusa_export.quantize.scales import Scales

TREE = Tree.from_choices([[0], [0, 0]])
BATCHES = [list(range(20)), list(range(30, 60))]
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 256}


def spec_of(case: Any, quant: str, *, kv_cache: str = "none", quant_heads: bool = False, **options: Any) -> Any:
    return export_spec(
        case.checkpoint, get_format(quant), tree=TREE, dtype="auto", kv_cache=kv_cache, quant_heads=quant_heads,
        **{"tp": 1, **options},
    )  # fmt: skip


def write(case: Any, out: Path, spec: Any, limit: int = 10**9) -> dict[str, torch.Tensor]:
    out.mkdir()
    files = shards(plan_hf(case.checkpoint, spec), limit)
    for name, plans in files.items():
        write_shard(out / name, case.checkpoint, spec, case.scales or Scales(), plans)
    write_hf_configs(out, case.model_dir, spec, files)
    tensors: dict[str, torch.Tensor] = {}
    for name in files:
        tensors |= load_file(out / name)
    return tensors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("quant", "quant_heads", "kv_cache"),
    [("none", False, "none"), ("fp8", True, "fp8"), ("fp8", False, "none"), ("nvfp4", True, "fp8"),
     ("fp8_rowwise", False, "none")],
)  # fmt: skip
def test_same_as_modelopt(
    quant: str, quant_heads: bool, kv_cache: str, make_case: Callable[..., Any], tmp_path: Path
) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    case, weight_format = make_case(**WIDE), get_format(quant)
    if weight_format.needs_calibration:
        case.scales = ptq.calibrate(
            case.model_dir, case.checkpoint, weight_format, kv_cache=kv_cache, quant_heads=quant_heads, batches=BATCHES
        )
    ours = write(case, tmp_path / "ours", spec_of(case, quant, kv_cache=kv_cache, quant_heads=quant_heads))
    model: Any = load_reference(case.model_dir, torch.float32)  # the dtype that calibration runs in on a CPU
    ptq.attach_heads(model, case.checkpoint)
    config = ptq.quant_config(mtq, weight_format, KV_CACHE[kv_cache], quant_heads=quant_heads)
    if quant == "fp8_rowwise":
        rows = {"quantizer_name": f"*{ptq.HEADS}*", "enable": False}
        config = {**mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG}
        config["quant_cfg"] = [*config["quant_cfg"], rows]
    if quant != "none":
        model = mtq.quantize(model, config, forward_loop=ptq.forward_loop(BATCHES, None, sys.stdout))
    export_hf_checkpoint(model, dtype=torch.float16, export_dir=str(tmp_path / "theirs"))
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if tensor.dtype == torch.float16:  # not quantized; ModelOpt keeps the float32 that its model was loaded in
            theirs[name] = theirs[name].to(torch.float16)
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        if name.endswith((".k_scale", ".v_scale")):  # ours is at least 1, as TensorRT-LLM recommends, and one for both
            assert tensor.item() == max(1.0, theirs[name].item())
        elif quant == "fp8" and tensor.dtype == torch.float8_e4m3fn:
            # ModelOpt divides in 16 bit and rounds the quotient again to FP8: a code in a hundred is the neighbouring one
            codes, other = (each.view(torch.uint8).int() for each in (tensor, theirs[name]))
            assert (codes - other).abs().max() <= 1
            assert (codes != other).float().mean() < 0.02, name
        else:
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8)), name
    if quant != "none":
        mine, his = (json.loads((tmp_path / who / "hf_quant_config.json").read_text()) for who in ("ours", "theirs"))
        for each in (mine, his):
            each["quantization"]["exclude_modules"].sort()
        assert mine == his
        configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")]
        mine, his = (config["quantization_config"] for config in configs)
        mine["ignore"].sort()
        his["ignore"].sort()
        assert mine == his
        assert configs[0]["medusa"] == configs[1]["medusa"] == {"num_medusa_heads": 2, "num_medusa_layers": 1}


def test_shards_and_round_trip(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case(tie_word_embeddings=True)
    case.scales = None
    write(case, tmp_path / "out", spec_of(case, "none"), limit=40_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    again = MedusaCheckpoint.open(tmp_path / "out")
    assert again.names == case.checkpoint.names
    assert again.config == case.checkpoint.config
    for name in again.names:
        assert torch.equal(again.read(name), case.checkpoint.read(name)), name
    assert load_reference(tmp_path / "out", torch.float16).num_parameters() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "int8_sq"}, "int8_sq.*none, fp8, fp8_rowwise or nvfp4"),
        ({"quant": "none", "tp": 2}, "--tp"),
        ({"quant": "fp8", "exclude": ("*mlp*",)}, "--exclude"),
        ({"quant": "none", "kv_cache": "int8"}, "--kv-cache int8"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, make_case: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        require_hf(spec_of(make_case(), **options))
