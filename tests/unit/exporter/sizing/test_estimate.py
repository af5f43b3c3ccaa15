"""Sizes: against numbers worked out by hand, against files that are really written, and how they change with the flags."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.engine_dirs.onnxruntime import write_engine, write_onnx
from medusa_export.exporter.onnx.forms import onnx_form
from medusa_export.exporter.plan.spec import ExportSpec, export_spec
from medusa_export.exporter.plan.trtllm_layout import plan_ranks
from medusa_export.exporter.sizing.disk import heads_bytes
from medusa_export.exporter.sizing.estimate import size_export
from medusa_export.exporter.sizing.gpus import (
    GPUS,
    MAX_BATCH,
    activation_bytes,
    engine_bytes,
    fit,
    kv_sequence_bytes,
    kv_token_bytes,
    logits_bytes,
    rank_memory,
    why_unsupported,
)
from medusa_export.exporter.sizing.types import ExportMachine, Request, Sizing
from medusa_export.exporter.verify.trtllm_loader.modules import required_tensors
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.trees.tree import Tree, load_tree
from medusa_export.quantize.formats import FORMATS, KV_CACHE

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
PARAMETERS_8B, PARAMETERS_70B = 8_030_261_248, 70_553_706_496  # as their model cards and safetensors indices say
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
REQUEST = Request(
    calibrates=False, onnx_form=None, max_length=2048, draft_vocab=8192, stored_bytes=2, shared_lm_head=False,
    tokenizer_bytes=1000, reserve=0, batch=1, context=4096,
)  # fmt: skip
CPU = ExportMachine(disk_free=10**12, ram_available=10**11, has_gpu=False)
H100 = next(gpu for gpu in GPUS if gpu.name.startswith("H100"))


def make_spec(
    raw: dict[str, Any] = LLAMA_8B, *, weight_format: str = "none", kv_cache: str = "none", **options: Any
) -> ExportSpec:
    """Four heads of one layer and the tree of 63, unless told otherwise."""
    numbers = {"heads": 4, "layers": 1, "draft": 63, "tp": 1, "dtype": "bfloat16", "quant_heads": False} | options
    return ExportSpec(
        DecoderConfig.from_dict(raw), numbers["heads"], numbers["layers"], numbers["draft"], numbers["tp"],
        FORMATS[weight_format], numbers["dtype"], KV_CACHE[kv_cache], numbers["quant_heads"],
    )  # fmt: skip


def weights(spec: ExportSpec) -> int:
    return engine_bytes(spec, plan_ranks(spec)[0].tensors)


class TestLlama8B:
    """Worked out by hand."""

    @pytest.mark.parametrize(("raw", "expected"), [(LLAMA_8B, PARAMETERS_8B), (LLAMA_70B, PARAMETERS_70B)])
    def test_parameters(self, raw: dict[str, Any], expected: int) -> None:
        got = size_export(make_spec(raw), REQUEST, CPU)
        hidden, vocab = raw["hidden_size"], raw["vocab_size"]
        assert got.parameters == expected
        assert got.head_parameters == 4 * (hidden * hidden + hidden + vocab * hidden)
        shared = size_export(make_spec(raw), replace(REQUEST, shared_lm_head=True), CPU)
        assert shared.head_parameters == 4 * (hidden * hidden + hidden)

    @pytest.mark.parametrize(
        ("kv_cache", "tp", "expected"),
        [
            ("none", 1, 2 * 32 * 8 * 128 * 2),  # 131072: K and V, layers, heads, width, bytes
            ("fp8", 1, 65536),
            ("int8", 1, 65536),
            ("none", 2, 65536),
            ("none", 8, 16384),
            ("none", 16, 16384),  # one head is the least: two ranks hold the same one
            ("none", 32, 16384),
        ],
    )
    def test_cache_of_a_token(self, kv_cache: str, tp: int, expected: int) -> None:
        assert kv_token_bytes(make_spec(kv_cache=kv_cache, tp=tp)) == expected

    @pytest.mark.parametrize(
        ("context", "draft", "blocks"), [(4096, 63, 65), (4096, 64, 65), (4096, 65, 66), (1, 63, 1)]
    )
    def test_cache_of_a_sequence(self, context: int, draft: int, blocks: int) -> None:
        """The draft tokens lie behind the context, in blocks of 64."""
        assert kv_sequence_bytes(make_spec(draft=draft), context) == blocks * 64 * 131072

    def test_cache_of_the_batch(self) -> None:
        memory = rank_memory(make_spec(), 5, batch=7, context=4096)
        assert (memory.weights, memory.kv_batch) == (5, 7 * 65 * 64 * 131072)

    def test_weights(self) -> None:
        heads = 4 * (4096 * 4097 + 128256 * 4096)
        assert weights(make_spec()) == 2 * (PARAMETERS_8B + heads)
        linears = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
        scales = 32 * 5 * 2 * 4  # of qkv, dense, fc, gate and proj: weight's and activations', float32
        assert weights(make_spec(weight_format="fp8")) == 2 * (PARAMETERS_8B + heads) - linears + scales
        rows = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
        assert weights(make_spec(weight_format="int8_wo")) == 2 * (PARAMETERS_8B + heads) - linears + 2 * rows
        assert weights(make_spec(weight_format="int4_wo")) == 2 * (PARAMETERS_8B + heads) - 3 * linears // 2 + 2 * rows
        quantized = weights(make_spec(weight_format="fp8", quant_heads=True))
        assert quantized == weights(make_spec(weight_format="fp8")) - 4 * (4096 * 4096 + 128256 * 4096) + 4 * 2 * 2 * 4

    def test_estimates(self) -> None:
        spec = make_spec(tp=2)
        assert logits_bytes(spec, 3) == 4 * 5 * 3 * 64 * 128256
        assert activation_bytes(spec, 1) == 2 * 8192 * (2 * 4096 + 3 * 14336 // 2)
        assert activation_bytes(spec, 200) == 2 * 200 * 64 * (2 * 4096 + 3 * 14336 // 2)
        assert logits_bytes(make_spec({**LLAMA_8B, "vocab_size": 128257}, tp=2), 1) == 4 * 5 * 64 * 128258

    def test_attention_wider_than_the_mlp(self) -> None:
        spec = make_spec({**LLAMA_8B, "intermediate_size": 1024, "head_dim": 256})
        assert activation_bytes(spec, 1) == 2 * 8192 * (2 * 4096 + 2 * 32 * 256 + 2 * 8 * 256)


class TestGpus:
    def test_room_and_largest_batch(self) -> None:
        spec = make_spec()
        got = fit(H100, spec, weights(spec), batch=1, context=4096)
        left = 80 * 10**9 - weights(spec) - activation_bytes(spec, 1) - logits_bytes(spec, 1)
        assert (got.gpu, got.fits, got.reason) == ("H100-80GB", True, "")
        assert got.cache_room == int(0.9 * left)
        for batch, fits in ((got.largest_batch, True), (got.largest_batch + 1, False)):
            assert fit(H100, spec, weights(spec), batch=batch, context=4096).fits == fits
        assert got.largest_batch < got.cache_room // kv_sequence_bytes(spec, 4096)  # logits grow with the batch too

    @pytest.mark.parametrize(
        ("tp", "batches"), [(1, [0, 0, 0, 0, 0, 23]), (2, [0, 3, 0, 3, 69, 124]), (4, [0, 74, 15, 74, 186, 279])]
    )
    def test_70b_in_16_bit(self, tp: int, batches: list[int]) -> None:
        """A rank of two: of 80 GB, weights take 76.1 and activations 0.97; a sequence's logits take 0.16 and its cache 0.68."""
        spec = make_spec(LLAMA_70B, tp=tp)
        assert [fit(gpu, spec, weights(spec), batch=1, context=4096).largest_batch for gpu in GPUS] == batches

    def test_not_even_the_weights(self) -> None:
        spec = make_spec(LLAMA_70B)
        got = fit(GPUS[0], spec, weights(spec), batch=1, context=4096)
        assert (got.cache_room, got.fits, got.largest_batch, got.reason) == (0, False, 0, "")

    def test_no_more_than_is_looked_for(self) -> None:
        small = make_spec({**LLAMA_8B, "hidden_size": 256, "num_hidden_layers": 1, "vocab_size": 100, "head_dim": 8})
        assert fit(H100, small, weights(small), batch=1, context=16).largest_batch == MAX_BATCH

    @pytest.mark.parametrize(
        ("options", "refusals"),
        [
            ({}, {}),
            (
                {"weight_format": "fp8"},
                {"A100-40GB": "fp8 needs SM 89 or newer", "A100-80GB": "fp8 needs SM 89 or newer"},
            ),
            ({"weight_format": "int8_wo"}, {"B200-192GB": "int8_wo runs up to SM 99"}),
            ({"kv_cache": "int8"}, {"B200-192GB": "kv cache int8 runs up to SM 99"}),
            ({"kv_cache": "fp8"}, dict.fromkeys(("A100-40GB", "A100-80GB"), "kv cache fp8 needs SM 89 or newer")),
        ],
    )
    def test_formats_that_a_gpu_cannot_run(self, options: dict[str, str], refusals: dict[str, str]) -> None:
        spec = make_spec(**options)
        assert {gpu.name: why for gpu in GPUS if (why := why_unsupported(gpu, spec))} == refusals
        for gpu in GPUS:
            got = fit(gpu, spec, weights(spec), batch=1, context=16)
            assert got.fits == (gpu.name not in refusals)
            assert (got.largest_batch > 0) == got.fits

    def test_every_cache_format_has_a_size(self) -> None:
        for row in KV_CACHE.values():
            assert kv_token_bytes(make_spec(kv_cache=row.name)) == 131072 // (1 if row.quant_algo is None else 2)


class TestFiles:
    """What is foretold is what is written."""

    def sizes(self, case: Any, weight_format: str, tree: Tree, **options: Any) -> tuple[ExportSpec, Sizing]:
        chosen = {"tp": 1, "dtype": "auto", "kv_cache": "none", "quant_heads": False} | options
        spec = export_spec(case.checkpoint, FORMATS[weight_format], tree=tree, **chosen)
        return spec, size_export(spec, REQUEST, CPU)

    @pytest.mark.parametrize("tp", [1, 2])
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_ranks_of_every_format(
        self, weight_format: str, tp: int, make_case: Callable[..., Any], tmp_path: Path
    ) -> None:
        case, tree = make_case(**WIDE, vocab_size=101), load_tree("cpu-3")
        out = case.write(tmp_path / "out", weight_format, tree=tree, tp=tp)
        _, got = self.sizes(case, weight_format, tree, tp=tp)
        assert got.rank_bytes == tuple((out / f"rank{rank}.safetensors").stat().st_size for rank in range(tp))
        assert got.disk[0].bytes == sum(path.stat().st_size for path in out.iterdir())

    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
    @pytest.mark.parametrize("layout", ["v1", "v2"])
    def test_ranks_of_every_family(
        self, family: str, layout: str, make_case: Callable[..., Any], tmp_path: Path
    ) -> None:
        case, tree = make_case(family, layout, num_heads=3, num_layers=2, tie_word_embeddings=True), load_tree("cpu-8")
        options = {"tp": 4, "kv_cache": "fp8", "quant_heads": True, "dtype": "bfloat16"}
        out = case.write(tmp_path / "out", "fp8", tree=tree, **options)
        _, got = self.sizes(case, "fp8", tree, **options)
        assert got.rank_bytes == tuple((out / f"rank{rank}.safetensors").stat().st_size for rank in range(4))

    @pytest.mark.parametrize("tie", [False, True])
    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
    @pytest.mark.parametrize("weight_format", [name for name, row in FORMATS.items() if row.onnxruntime])
    def test_onnx(
        self, weight_format: str, family: str, tie: bool, make_case: Callable[..., Any], tmp_path: Path
    ) -> None:
        """To a page: the last tensor of a file ends before its page does."""
        case, tree = make_case(family, tie_word_embeddings=tie, **{**WIDE, "vocab_size": 512}), load_tree("cpu-3")
        spec, form = self.sizes(case, weight_format, tree)[0], onnx_form(FORMATS[weight_format]).form
        request = replace(REQUEST, onnx_form=form, max_length=96, draft_vocab=256)
        write_onnx(tmp_path / "onnx", case.checkpoint, FORMATS[weight_format], case.scales, max_length=96)
        write_engine(
            tmp_path / "engine", case.checkpoint, FORMATS[weight_format], case.scales, tree=tree, max_length=96,
            draft_vocab=torch.arange(256), save_tokenizer=lambda _: None, source={},
        )  # fmt: skip
        disk = {item.what: item.bytes for item in size_export(spec, request, CPU).disk}
        for name in ("onnx", "engine"):
            sizes = [path.stat().st_size for path in (tmp_path / name).glob("*.data")]
            foretold = disk[f"{name}/"] - (request.tokenizer_bytes if name == "engine" else 0)
            assert sum(sizes) <= foretold < sum(sizes) + 4096 * len(sizes)

    def test_all_tokens_and_a_shared_lm_head(self, make_case: Callable[..., Any], tmp_path: Path) -> None:
        case, tree = make_case(layout="v2", num_layers=2, **{**WIDE, "vocab_size": 512}), load_tree("cpu-3")
        request = replace(REQUEST, onnx_form="float", max_length=96, draft_vocab=0, shared_lm_head=True)
        write_engine(
            tmp_path / "engine", case.checkpoint, FORMATS["none"], None, tree=tree, max_length=96,
            draft_vocab=None, save_tokenizer=lambda _: None, source={},
        )  # fmt: skip
        got = heads_bytes(self.sizes(case, "none", tree)[0], request)
        written = (tmp_path / "engine/heads.onnx.data").stat().st_size
        assert written <= got < written + 4096

    def test_no_engine(self) -> None:
        got = size_export(make_spec(), REQUEST, CPU)
        assert [item.what for item in got.disk] == ["trtllm/", "tokenizer/"]
        assert got.disk_needed == sum(item.bytes for item in got.disk) == got.disk[0].bytes + 1000
        assert [item.what for item in got.ram] == ["calibration", "writing, comparing"]


class TestTensors:
    def groups(self, **options: Any) -> dict[str, tuple[int, str, str]]:
        got = size_export(make_spec(**options), REQUEST, CPU)
        header = max(got.rank_bytes) - sum(group.bytes for group in got.tensors)
        assert 0 < header < 300_000
        return {group.name: (group.count, group.stored, group.note) for group in got.tensors}

    def test_fp8(self) -> None:
        groups = self.groups(weight_format="fp8", kv_cache="fp8")
        assert groups["attention.qkv"] == (32, "fp8", "")
        assert groups["mlp.proj"] == (32, "fp8", "")
        assert groups["lm_head"] == (1, "bfloat16", "excluded")
        assert groups["medusa_heads.lm_head"] == (4, "bfloat16", "excluded")
        assert groups["medusa_heads.linear"] == (4, "bfloat16", "excluded")
        assert groups["norms"] == (65, "bfloat16", "")
        assert groups["scales"] == (32 * 11, "float32", "")
        assert groups["biases"] == (4, "bfloat16", "")

    def test_quantized_heads(self) -> None:
        groups = self.groups(weight_format="fp8", quant_heads=True)
        assert groups["lm_head"] == (1, "bfloat16", "excluded")
        assert groups["medusa_heads.lm_head"] == (4, "fp8", "")

    def test_what_trtllm_build_quantizes(self) -> None:
        groups = self.groups(weight_format="int8_wo")
        assert groups["mlp.gate"] == (32, "bfloat16", "8 bit in the engine")
        assert groups["vocab_embedding"] == (1, "bfloat16", "excluded")
        assert "scales" not in groups

    def test_16_bit_excludes_nothing(self) -> None:
        assert {note for _, _, note in self.groups().values()} == {""}


class TestRam:
    def stages(self, spec: ExportSpec, request: Request = REQUEST, *, has_gpu: bool = False) -> dict[str, int]:
        got = size_export(spec, request, replace(CPU, has_gpu=has_gpu))
        assert got.ram_needed == 400_000_000 + max(item.bytes for item in got.ram)
        return {item.what: item.bytes for item in got.ram}

    def test_streaming_does_not_grow_with_the_model(self) -> None:
        deep = make_spec({**LLAMA_8B, "num_hidden_layers": 64})
        assert self.stages(make_spec()) == self.stages(deep)
        assert self.stages(deep) == {"calibration": 0, "writing, comparing": 300_000_000}

    def test_calibration(self) -> None:
        calibrates, spec = replace(REQUEST, calibrates=True), make_spec(weight_format="fp8")
        largest, tokens = 128256 * 4096, 512
        expected = 4 * (PARAMETERS_8B + largest + tokens * (4 * 4096 + 3 * 14336))
        assert self.stages(spec, calibrates)["calibration"] == expected
        assert self.stages(spec, calibrates, has_gpu=True)["calibration"] == 2 * (PARAMETERS_8B + largest)
        heads = 4 * (4096 * 4097 + largest)
        quantized = self.stages(make_spec(weight_format="fp8", quant_heads=True), calibrates)["calibration"]
        assert quantized == expected + 4 * (heads + tokens * 128256)

    @pytest.mark.parametrize("form", ["float", "fp8", "int8"])
    def test_engine(self, form: str) -> None:
        """No less than the float32 weights that ONNX Runtime folds, where it does; a small model's reference comes on top."""
        spec, request = make_spec(), replace(REQUEST, onnx_form=form)
        expected = 2 * PARAMETERS_8B if form == "int8" else 4 * (PARAMETERS_8B - 128256 * 4096)
        assert expected < self.stages(spec, request)["checking the engine"] < 8 * PARAMETERS_8B
        small = make_spec({**LLAMA_8B, "num_hidden_layers": 1})
        assert self.stages(small, request)["checking the engine"] > 4 * size_export(small, request, CPU).parameters


SHAPES = st.builds(
    lambda layers, hidden, heads, vocab: {
        **LLAMA_8B, "num_hidden_layers": layers, "hidden_size": 256 * hidden, "intermediate_size": 512 * hidden,
        "num_attention_heads": 16, "num_key_value_heads": heads, "head_dim": 64, "vocab_size": vocab,
    },
    st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4, 8, 16]), st.integers(100, 5000),
)  # fmt: skip


class TestProperties:
    @settings(deadline=None, max_examples=40)
    @given(SHAPES, st.sampled_from(["none", "fp8"]), st.sampled_from([1, 2, 4]))
    def test_more_ranks_hold_less_each_and_no_less_in_all(
        self, raw: dict[str, Any], weight_format: str, tp: int
    ) -> None:
        few, many = (
            size_export(make_spec(raw, weight_format=weight_format, tp=ranks), REQUEST, CPU) for ranks in (tp, 2 * tp)
        )
        assert max(many.rank_bytes) < max(few.rank_bytes)
        assert sum(many.rank_bytes) > sum(few.rank_bytes)  # the embedding and the norms are on every rank
        assert many.memory.weights < few.memory.weights
        kv_heads = raw["num_key_value_heads"]
        assert many.memory.kv_token * (2 if kv_heads >= 2 * tp else 1) == few.memory.kv_token

    @settings(deadline=None, max_examples=40)
    @given(SHAPES, st.sampled_from([1, 2]))
    def test_fewer_bits_take_less(self, raw: dict[str, Any], tp: int) -> None:
        heads_too = size_export(make_spec(raw, weight_format="fp8", tp=tp, quant_heads=True), REQUEST, CPU)
        fp8, wide = (
            size_export(make_spec(raw, weight_format=weight_format, tp=tp), REQUEST, CPU)
            for weight_format in ("fp8", "none")
        )
        assert max(heads_too.rank_bytes) < max(fp8.rank_bytes) < max(wide.rank_bytes)
        assert heads_too.memory.weights < fp8.memory.weights < wide.memory.weights
        cache = size_export(make_spec(raw, kv_cache="fp8", tp=tp), REQUEST, CPU)
        assert 2 * cache.memory.kv_batch == wide.memory.kv_batch

    @settings(deadline=None, max_examples=40)
    @given(SHAPES, st.integers(1, 300), st.integers(1, 300), st.integers(1, 20_000), st.integers(1, 20_000))
    def test_more_sequences_or_tokens_never_fit_better(
        self, raw: dict[str, Any], batch: int, more: int, context: int, longer: int
    ) -> None:
        spec = make_spec(raw)
        for gpu in GPUS:
            base = fit(gpu, spec, weights(spec), batch=batch, context=context)
            larger = fit(gpu, spec, weights(spec), batch=batch + more, context=context)
            deeper = fit(gpu, spec, weights(spec), batch=batch, context=context + longer)
            assert (base.fits, base.largest_batch) >= (deeper.fits, deeper.largest_batch)
            assert base.fits >= larger.fits
            assert base.largest_batch == larger.largest_batch
            assert base.fits == (batch <= base.largest_batch)

    @settings(deadline=None, max_examples=40)
    @given(SHAPES, st.integers(1, 63))
    def test_a_larger_tree_takes_more(self, raw: dict[str, Any], draft: int) -> None:
        small, large = (size_export(make_spec(raw, draft=nodes), REQUEST, CPU).memory for nodes in (draft, draft + 64))
        assert large.logits > small.logits
        assert large.kv_sequence > small.kv_sequence
        assert large.weights == small.weights


def test_agrees_with_the_specification() -> None:
    """The bytes of what TensorRT-LLM's loader asks for, read from config.json by the verifier."""
    from medusa_export.exporter.plan.trtllm_config import trtllm_config

    spec = make_spec(LLAMA_70B, weight_format="fp8", kv_cache="fp8", tp=8)
    need = required_tensors(trtllm_config(spec))
    total = sum(math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in need.values())
    got = size_export(spec, REQUEST, CPU)
    assert sum(group.bytes for group in got.tensors) == got.memory.weights == total


def test_heads_that_are_not_read(tmp_path: Path, tiny_checkpoint: Any, head_tensors: Any) -> None:
    """``check_values=False`` keeps every check of names and shapes, and leaves out only what reads weights."""
    from safetensors.torch import save_file

    model = tiny_checkpoint(tmp_path / "model")
    tensors = head_tensors()
    tensors["medusa_heads.0.0.linear.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    with pytest.raises(Exception, match="NaN"):
        MedusaCheckpoint.open(model, tmp_path / "medusa_lm_head.safetensors")
    opened = MedusaCheckpoint.open(model, tmp_path / "medusa_lm_head.safetensors", check_values=False)
    assert opened.num_medusa_heads == 3
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(Exception, match=r"model.layers.2.*no such tensor"):
        MedusaCheckpoint.open(model, tmp_path / "medusa_lm_head.safetensors", check_values=False)


def test_what_cannot_be_built_is_refused_before(make_case: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="use tp 1"):
        make_spec(tp=3)
