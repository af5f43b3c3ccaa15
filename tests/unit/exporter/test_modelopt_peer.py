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

from medusa_export.heads.model import load_reference
from medusa_export.quantize import ptq
from medusa_export.quantize.formats import get_format, get_kv_cache

BATCHES = [list(range(20)), list(range(30, 60))]

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
# Written by ModelOpt only: not read by the Medusa model.
THEIRS_ONLY = {
    "base_architecture", "bias", "decoder", "lm_head_bias", "producer", "rank", "residual_mlp", "rmsnorm", "rotary_pct",
    "share_embedding_table",
}  # fmt: skip


def export_with_modelopt(case: Any, out: Path, *, tp: int, fp8: bool) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    model: Any = load_reference(case.model_dir, torch.float32)
    ptq._attach_heads(model, case.checkpoint)
    if fp8:
        config = ptq._quant_config(mtq, get_format("fp8"), get_kv_cache("fp8"), quant_heads=True)
        model = mtq.quantize(model, config, forward_loop=ptq._forward_loop(BATCHES, None, sys.stdout))
    export_tensorrt_llm_checkpoint(model, "llama", torch.float16, str(out), inference_tensor_parallel=tp)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("fp8", [False, True])
def test_same_tensors_and_config(tp: int, fp8: bool, make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case()
    options: dict[str, Any] = {}
    if fp8:
        options = {"kv_cache": "fp8", "quant_heads": True}
        case.scales = ptq.calibrate(case.model_dir, case.checkpoint, get_format("fp8"), batches=BATCHES, **options)
    ours, theirs = case.write(tmp_path / "ours", "fp8" if fp8 else "none", tp=tp, **options), tmp_path / "theirs"
    export_with_modelopt(case, theirs, tp=tp, fp8=fp8)
    for rank in range(tp):
        name = f"rank{rank}.safetensors"
        compare_tensors(load_file(ours / name), load_file(theirs / name), tp)
    compare_configs(*(json.loads((each / "config.json").read_text()) for each in (ours, theirs)))


def compare_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tp: int) -> None:
    # the loader merges k and v scales into the one that both files have
    merged = {name for name in theirs if name.endswith((".k_cache_scaling_factor", ".v_cache_scaling_factor"))}
    assert ours.keys() == theirs.keys() - merged
    if tp > 1:  # replicated by us, cut by ModelOpt
        del ours["transformer.vocab_embedding.weight"]
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def compare_configs(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() - theirs.keys() == OURS_ONLY
    assert theirs.keys() - ours.keys() == THEIRS_ONLY
    for key in ours.keys() & theirs.keys() - {"quantization"}:
        assert theirs[key] == CONFIG_DIFFERENCES.get(key, ours[key]), key
    # ModelOpt's list replaces TensorRT-LLM's, so the embedding is not in it; FP8 leaves embeddings alone all the same
    excluded = ours["quantization"].pop("exclude_modules", [])
    for pattern in theirs["quantization"].pop("exclude_modules", None) or []:
        assert pattern in (each.rstrip("*") for each in excluded)
    assert {key: value for key, value in theirs["quantization"].items() if value is not None} == {
        key: value for key, value in ours["quantization"].items() if value is not None
    }
