"""Every format with every cache, head form, source dtype and target dtype on one and two ranks: exported and verified.

Families take turns, so that each meets every value of everything else.

The models differ in what families differ in, and in what a writer may get wrong: a vocabulary that ranks do not divide, a tied
embedding, fewer key/value heads than ranks, a head width of its own, biases, and both spellings of config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.core.errors import CheckpointError
from medusa_export.exporter.verify.checkpoint import verify_trtllm
from medusa_export.exporter.write.trtllm import write_trtllm
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize.formats import FORMATS, KV_CACHE, get_format
from medusa_export.quantize.scales import Scales

HIDDEN = 256  # w4a8_awq on two ranks takes no less
ODD, EVEN = 97, 256  # words; linears of four bits take no odd number of them
TREE = Tree.from_choices([[0], [1]])
DTYPES = ("float16", "bfloat16", "float32")
TARGETS = ("float16", "bfloat16")
OLD = {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
NEW = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # what config.json calls the dtype, and what else is in it
    "llama": ("torch_dtype", {**OLD, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("dtype", {**NEW, "num_key_value_heads": 1, "sliding_window": None}),
    "qwen2": ("torch_dtype", {**OLD, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("dtype", {**NEW, "num_key_value_heads": 2, "head_dim": 128}),
}
GROUP_SIZES = {"int4_awq": 64}  # smaller ones show a wrong order sooner


@dataclass(frozen=True)
class Model:
    checkpoint: MedusaCheckpoint
    scales: Scales


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices this small take longer to share out than to multiply."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], Model]:
    """By family, dtype and words."""
    return {
        key: _model(tmp_path_factory.mktemp("-".join(map(str, key))), *key)
        for key in product(FAMILIES, DTYPES, (ODD, EVEN))
    }


def _model(directory: Path, family: str, dtype: str, words: int) -> Model:
    spelling, own = FAMILIES[family]
    raw = {
        "model_type": family, "vocab_size": words, "hidden_size": HIDDEN, "intermediate_size": HIDDEN, spelling: dtype,
        "num_hidden_layers": 1, "num_attention_heads": 4, "tie_word_embeddings": False, **own,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(raw))
    shapes = dict(DecoderConfig.from_dict(raw).tensor_shapes())
    shapes |= {"medusa_heads.0.0.linear.weight": (HIDDEN, HIDDEN), "medusa_heads.0.0.linear.bias": (HIDDEN,)}
    shapes["medusa_heads.0.1.weight"] = (words, HIDDEN)
    generator = torch.Generator().manual_seed(len(family))
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    save_file(
        {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    checkpoint = MedusaCheckpoint.open(directory)
    return Model(checkpoint, _scales(checkpoint))


def _scales(checkpoint: MedusaCheckpoint) -> Scales:
    """True weight maxima; factors that are no numbers of 16 bits."""
    names = [name for name in checkpoint.names if name.endswith(".weight") and len(checkpoint.shape(name)) == 2]
    weights = {name.removesuffix(".weight"): checkpoint.read(name).float() for name in names}
    factors = torch.rand(HIDDEN * 2, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.5
    return Scales(
        input_amax={name: 3.0 + index for index, name in enumerate(weights)},
        weight_amax={name: float(weight.abs().max()) for name, weight in weights.items()},
        kv_amax={0: 100.0},
        pre_quant_scale={name: factors[: weight.shape[1]].clone() for name, weight in weights.items()},
    )


Combination = tuple[str, str, str, int, bool, str]  # cache, stored dtype, written dtype, ranks, quantized heads, family


def _combinations(weight_format: str) -> Iterator[Combination]:
    """All of them but for the family, which takes its turn."""
    heads = (False, True) if FORMATS[weight_format].quantizes_heads else (False,)
    families = list(FAMILIES)
    for index, (cache, stored, dtype, tp, quantized) in enumerate(product(KV_CACHE, DTYPES, TARGETS, (1, 2), heads)):
        turn = index + index // (len(families) * len(heads)) + list(FORMATS).index(weight_format)
        yield cache, stored, dtype, tp, quantized, families[turn % len(families)]


def test_a_format_meets_every_family_with_every_value() -> None:
    for weight_format in FORMATS:
        found = list(_combinations(weight_format))
        for place in range(5):
            values = {each[place] for each in found}
            assert {(each[place], each[5]) for each in found} == set(product(values, FAMILIES)), (weight_format, place)


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_combination_verifies(
    weight_format: str, models: dict[tuple[str, str, int], Model], tmp_path: Path
) -> None:
    form, found = get_format(weight_format, GROUP_SIZES.get(weight_format)), {}
    for combination in _combinations(weight_format):
        cache, stored, dtype, tp, heads, family = combination
        needs_even = heads and (form.trtllm.multiple > 1 or form.trtllm.rank_tile != (1, 1))
        model = models[family, stored, EVEN if needs_even else ODD]
        options: dict[str, Any] = {"tp": tp, "dtype": dtype, "kv_cache": cache, "quant_heads": heads, "tree": TREE}
        write_trtllm(tmp_path, model.checkpoint, form, model.scales, **options)
        if problems := verify_trtllm(tmp_path, model.checkpoint):
            found[combination] = problems[0]
        for file in tmp_path.iterdir():
            file.unlink()
    assert found == {}


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("weight_format", ["int8_sq", "int4_awq", "w4a8_awq"])
def test_a_wrong_factor_is_found(
    weight_format: str, dtype: str, models: dict[tuple[str, str, int], Model], tmp_path: Path
) -> None:
    """One of 256, off by 2 %: five half steps of bfloat16, and half a code of int4."""
    model = models["llama", "bfloat16", ODD]
    form = get_format(weight_format, GROUP_SIZES.get(weight_format))
    write_trtllm(tmp_path, model.checkpoint, form, model.scales, tree=TREE, dtype=dtype)
    assert verify_trtllm(tmp_path, model.checkpoint) == []
    tensors = load_file(tmp_path / "rank0.safetensors")
    tensors["transformer.layers.0.mlp.fc.prequant_scaling_factor"][7] *= 1.02
    save_file(tensors, tmp_path / "rank0.safetensors")
    (problem,) = verify_trtllm(tmp_path, model.checkpoint)
    assert problem.startswith("model.layers.0.mlp.gate_proj.weight: ")


def test_factors_that_float16_cannot_hold(models: dict[tuple[str, str, int], Model], tmp_path: Path) -> None:
    model = models["llama", "bfloat16", ODD]
    scales = replace(model.scales, pre_quant_scale={name: x * 1e-9 for name, x in model.scales.pre_quant_scale.items()})
    write = partial(write_trtllm, tmp_path, model.checkpoint, get_format("int8_sq"), scales, tree=TREE)
    with pytest.raises(CheckpointError, match=r"prequant_scaling_factor: got factors of .* in float16; use --dtype bf"):
        write(dtype="float16")
    write(dtype="bfloat16")
    assert verify_trtllm(tmp_path, model.checkpoint) == []
