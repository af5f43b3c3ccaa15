"""The writer against ModelOpt's own TensorRT-LLM export of the same model: two implementations, the same bytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medusa_export.exporter.verify.trtllm_loader.check import load_problems
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.quantize import ptq
from medusa_export.quantize.formats import KV_CACHE, get_format

BATCHES = [list(range(20)), list(range(30, 60))]
WIDE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1024}
WIDE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}

# What differs on purpose: ModelOpt's value is what its file has, ours is right for TensorRT-LLM's engine backend.
CONFIG_DIFFERENCES = {
    "max_draft_len": 63,  # hard-coded there; ours is the tree's
    "logits_dtype": "float16",  # ours is TensorRT-LLM's default, which a comparison of logits needs
    "use_parallel_embedding": True,  # ours replicates the embedding: no communication, and no padding of it
}
# Written by us only: read by one of the releases and wrong by default in another, or lost there (rotary_base).
OURS_ONLY = {
    "attn_bias", "mlp_bias", "model_type", "qk_layernorm", "rotary_base", "rotary_scaling", "tie_word_embeddings",
}  # fmt: skip
LOST = {
    "attn_bias",
    "model_type",
    "rotary_base",
}  # mlp_bias has the right default; that of attn_bias follows from model_type
# Written by ModelOpt only: not read by the Medusa model.
THEIRS_ONLY = {
    "base_architecture", "bias", "decoder", "lm_head_bias", "producer", "rank", "residual_mlp", "rmsnorm", "rotary_pct",
    "share_embedding_table",
}  # fmt: skip
# ModelOpt smooths q, k and v each with its own factors, then again from those to the mean, and rounds twice in float32;
# we divide the source's weights by the mean once. A value on the edge between two codes may fall to the other side.
RESMOOTHED = ("attention.qkv",)
SMOOTHQUANT = (*RESMOOTHED, "mlp.fc", "mlp.gate")  # gate and up share a factor too
CASES = {
    "none": ("none", None),
    "fp8": ("fp8", None),
    "fp8_rowwise": ("none", None),
    "int8_sq": ("int8", None),
    "int4_awq": ("none", 64),
    "int4_awq-128": ("fp8", 128),
    "w4a8_awq": ("fp8", None),
    "nvfp4": ("fp8", None),
}


def export_with_modelopt(case: Any, out: Path, weight_format: Any, kv_cache: str, *, tp: int, heads: bool) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    model: Any = load_reference(case.model_dir, torch.float32)
    if heads:
        ptq.attach_heads(model, case.checkpoint)
    config = ptq.quant_config(mtq, weight_format, KV_CACHE[kv_cache], quant_heads=heads)
    if weight_format.name == "fp8_rowwise":  # no calibration of ours, so no recipe in the table
        rows = {"quantizer_name": f"*{ptq.HEADS}*", "enable": False}  # TensorRT-LLM has no such form for heads
        config = {**mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG}
        config["quant_cfg"] = [*config["quant_cfg"], rows]
    if weight_format.name != "none":
        model = mtq.quantize(model, config, forward_loop=ptq.forward_loop(BATCHES, None, sys.stdout))
    if weight_format.smoothing_alpha is not None:
        ptq.share_smoothing(model, weight_format)  # ModelOpt's exporter shares it among q, k and v only
    export_tensorrt_llm_checkpoint(model, "llama", torch.float16, str(out), inference_tensor_parallel=tp)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("heads", [True, False], ids=["medusa", "base"])
@pytest.mark.parametrize("name", CASES)
def test_same_tensors_and_config(name: str, heads: bool, make_case: Callable[..., Any], tmp_path: Path) -> None:
    kv_cache, group_size = CASES[name]
    weight_format = get_format(name.partition("-")[0], group_size)
    case = make_case(**WIDE)
    options: dict[str, Any] = {"kv_cache": kv_cache, "quant_heads": heads and weight_format.quantizes_heads}
    if weight_format.needs_calibration:
        case.scales = ptq.calibrate(case.model_dir, case.checkpoint, weight_format, batches=BATCHES, **options)
    resmoothed = RESMOOTHED if weight_format.smoothing_alpha is None else SMOOTHQUANT
    for tp in (1, 2, 4):
        ours, theirs = tmp_path / f"ours{tp}", tmp_path / f"theirs{tp}"
        case.write(ours, weight_format.name, group_size=group_size, tp=tp, **options)
        export_with_modelopt(case, theirs, weight_format, kv_cache, tp=tp, heads=heads)
        for rank in range(tp):
            file = f"rank{rank}.safetensors"
            compare_tensors(load_file(ours / file), load_file(theirs / file), tp, heads, resmoothed)
        configs = [json.loads((each / "config.json").read_text()) for each in (ours, theirs)]
        if heads:  # the keys that it lacks are defaults that TensorRT-LLM would take
            assert {each.split(";")[0].removeprefix("config.json: no ") for each in load_problems(theirs)} == LOST
            config = {**configs[1], **{key: configs[0][key] for key in OURS_ONLY}}
            (theirs / "config.json").write_text(json.dumps(config))
            # of releases 0.17 and 0.18 ModelOpt's list forgets what must not become a row-wise norm; ours has it
            assert [each for each in load_problems(theirs) if "exclude_modules lacks *ln_f" not in each] == []
        compare_configs(*configs, heads)


def compare_tensors(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tp: int, heads: bool, resmoothed: tuple[str, ...]
) -> None:
    # the loader merges k and v scales into the one that both files have
    merged = {name for name in theirs if name.endswith((".k_cache_scaling_factor", ".v_cache_scaling_factor"))}
    if not heads:
        ours = {name: tensor for name, tensor in ours.items() if not name.startswith("medusa_heads.")}
    assert ours.keys() == theirs.keys() - merged
    if tp > 1:  # replicated by us, cut by ModelOpt
        del ours["transformer.vocab_embedding.weight"]
    smoothed = {name.rpartition(".")[0] for name in ours if name.endswith("prequant_scaling_factor")}
    for name, tensor in ours.items():
        other = (
            theirs[name].reshape(1) if theirs[name].ndim == 0 else theirs[name]
        )  # NVFP4's single numbers, without an axis
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        module = name.rpartition(".")[0]
        if module in smoothed and module.endswith(resmoothed):
            differ = tensor.view(torch.uint8) != other.view(torch.uint8)
            assert name.endswith("weight") or torch.allclose(tensor.float(), other.float(), rtol=3e-7), name
            assert not name.endswith("weight") or differ.float().mean() < 1e-3, name
        else:
            assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name


def compare_configs(ours: dict[str, Any], theirs: dict[str, Any], heads: bool) -> None:
    medusa = set() if heads else {"max_draft_len", "num_medusa_heads", "num_medusa_layers"}
    assert ours.keys() - theirs.keys() - medusa == OURS_ONLY
    assert theirs.keys() - ours.keys() == THEIRS_ONLY - (set() if heads else {"base_architecture"})
    for key in ours.keys() & theirs.keys() - {"quantization", *([] if heads else ["architecture"])}:
        assert theirs[key] == CONFIG_DIFFERENCES.get(key, ours[key]), key
    # ModelOpt's list replaces TensorRT-LLM's, so the embedding is not in it; FP8 leaves embeddings alone all the same
    excluded = ours["quantization"].pop("exclude_modules", [])
    for pattern in theirs["quantization"].pop("exclude_modules", None) or []:
        assert pattern.rstrip("*") in (each.strip("*") for each in excluded) or pattern in excluded
    assert {key: value for key, value in theirs["quantization"].items() if value is not None} == {
        key: value for key, value in ours["quantization"].items() if value is not None
    }
