"""docs/adding.md, followed: a made-up format, a made-up family and a made-up backend, carried through an export of a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.core.text.prompts import Prompt
from medusa_export.engines import backends
from medusa_export.engines.backends import Backend, engine_builder, open_engine
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.tensorrt.emulation.torch_device import NoTensorRt
from medusa_export.engines.verify import selfcheck
from medusa_export.engines.verify.selfcheck import BackendCheck, check_engine
from medusa_export.exporter.doctor import abilities
from medusa_export.exporter.engine_dirs.tensorrt import write_portable, write_tensorrt_engine
from medusa_export.exporter.job import engine_kinds, output_forms
from medusa_export.exporter.job.arguments import ExportArguments
from medusa_export.exporter.job.engine_kinds import EngineKind
from medusa_export.exporter.job.output_forms import OutputForm
from medusa_export.exporter.onnx import linear
from medusa_export.exporter.onnx.portable import linear as portable
from medusa_export.exporter.pipeline import engine_writers, parts
from medusa_export.exporter.pipeline.export import export
from medusa_export.exporter.sizing.estimate import plan_export
from medusa_export.exporter.verify import agreement, dequantize, scales_file
from medusa_export.exporter.verify.agreement import logits_agree
from medusa_export.exporter.verify.checkpoint import verify_export
from medusa_export.exporter.verify.parts import engine_files, unified
from medusa_export.exporter.verify.parts import export as export_part
from medusa_export.exporter.verify.trtllm_loader import modules
from medusa_export.heads.checkpoint import families
from medusa_export.heads.checkpoint.families import LLAMA, Family
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.contract.engine_info import TREE_FILE, EngineInfo
from medusa_export.heads.contract.engine_tools import EngineTools
from medusa_export.heads.trees.tree import load_tree
from medusa_export.quantize import formats
from medusa_export.quantize.format_facts import OnnxRuntime, TensorRt
from medusa_export.quantize.formats import get_format
from medusa_export.quantize.qat import QatArguments
from medusa_export.quantize.tensorrt_targets import parse_gpus
from tests import format_tables
from tests.paths import ROOT

Make = Callable[..., ExportArguments]
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
PROMPT = [*range(5, 25)]


def no_tree(path: Path, prompts: list[Prompt], progress: Any) -> str:
    raise AssertionError("no tree was to be measured")


def run_export(arguments: ExportArguments) -> Path:
    """An export with the engines' own check, and everything that can be asked of it afterwards."""
    assert plan_export(arguments).rank_bytes
    assert export(arguments, EngineTools(check_engine, no_tree, engine_builder(arguments.engine)))  # type: ignore[arg-type]
    assert verify_export(arguments.output) == []
    checkpoint = MedusaCheckpoint.open(arguments.ckpt, arguments.heads)
    assert logits_agree(arguments.output / "trtllm", arguments.ckpt, checkpoint, [PROMPT]) == []
    return arguments.output


def decode(engine_dir: Path, tree: str = "") -> list[int]:
    """What an engine answers, opened as medusa-run opens it."""
    engine = open_engine(engine_dir)
    found = generate(
        engine, PROMPT, load_tree(tree or str(engine_dir / TREE_FILE)), max_new_tokens=12, eos_token_ids=()
    )
    return found.tokens


@pytest.fixture
def make(tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any, tiny_tokenizer: Any) -> Make:
    """``make(*, config={}, **arguments)``: a model with a tokenizer, heads, and the flags of an export."""

    def write(*, config: dict[str, Any] | None = None, **arguments: Any) -> ExportArguments:
        config = config or {}
        model = tiny_checkpoint(tmp_path / "model", dtype=torch.float16, **config)
        tiny_tokenizer(model)
        heads = tiny_heads(tmp_path / "heads", hidden=config.get("hidden_size", 64), dtype=torch.float16)
        return ExportArguments(**{"ckpt": model, "output": tmp_path / "out", "heads": heads, **arguments})

    return write


def test_the_document_names_what_is_edited_here() -> None:
    """Every file whose table a test below adds to, or whose row, stands in the document, and nothing that is not there."""
    text = (ROOT / "docs" / "adding.md").read_text("utf-8")
    named = set(re.findall(r"`([a-z_/]+\.py)`", text))
    assert {"quantize/formats.py", "heads/checkpoint/families.py", "tests/format_tables.py"} <= named
    assert {table.place.split(" ")[0] for table in format_tables.tables()} <= named | NOT_EXTENDED
    assert all((ROOT / name).is_file() for name in named)


NOT_EXTENDED = {  # keyed by what no new format brings along
    "exporter/job/gpu_costs.py",
    "engines/trtllm/command.py",
}


@pytest.fixture
def made_up_format(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """``made_up_format("fp8") -> "fp8_mine"``: the numbers of a format under another name, algorithm and forms."""

    def add(base: str) -> str:
        row, name = formats.FORMATS[base], f"{base}_mine"
        assert isinstance(row.onnxruntime, OnnxRuntime)
        assert isinstance(row.tensorrt, TensorRt)
        algo, (ours, theirs) = f"{row.trtllm.algo}_MINE", (row.onnxruntime.form, row.tensorrt.form)
        new = replace(
            row, name=name, description="a made-up format", trtllm=replace(row.trtllm, algo=algo),
            onnxruntime=replace(row.onnxruntime, form=f"{ours}_mine"), tensorrt=replace(row.tensorrt, form=f"{theirs}_mine"),
        )  # fmt: skip
        monkeypatch.setitem(formats.FORMATS, name, new)
        assert any(problems()), "a row alone is not enough: the tables beside the code are missed"
        for table, old, key in (
            (linear.LINEAR_FORMS, ours, f"{ours}_mine"),
            (portable.PORTABLE_FORMS, theirs, f"{theirs}_mine"),
            (modules.ALGOS, row.trtllm.algo, algo),
            (agreement.BOUNDS, row.trtllm.algo, algo),
            (dequantize.DECODERS, row.trtllm.algo, algo),
            (dequantize.INPUT_ROUNDING, row.trtllm.algo, algo),
            (unified.PARTS, row.trtllm.algo, algo),
            (scales_file.CODES, row.trtllm.algo, algo),
            (engine_files.FORMS, ours, f"{ours}_mine"),
            (selfcheck.BOUNDS, ours, f"{ours}_mine"),
            (selfcheck.MEASURED, theirs, f"{theirs}_mine"),
            (selfcheck.TENSORRT_BOUNDS, theirs, f"{theirs}_mine"),
        ):
            if old in table:
                monkeypatch.setitem(table, key, table[old])  # type: ignore[index, arg-type]
        monkeypatch.setitem(export_part.ALGOS, name, algo)
        if theirs in selfcheck.ROUNDING:
            monkeypatch.setattr(selfcheck, "ROUNDING", selfcheck.ROUNDING | {f"{theirs}_mine"})
        assert list(problems()) == []
        return name

    return add


def problems() -> list[str]:
    """What the tables lack."""
    found = [problem for table in format_tables.tables() for problem in table.problems()]
    return [*found, *format_tables.row_problems()]


@pytest.mark.parametrize(("base", "config"), [("int8_wo", WIDE), ("fp8", {})])
def test_a_format(base: str, config: dict[str, Any], made_up_format: Callable[[str], str], make: Make) -> None:
    name = made_up_format(base)
    given = make(config=config, quant=name, calib_prompts=2)
    out = run_export(given)
    algo, info = formats.FORMATS[name].trtllm.algo, EngineInfo.load(out / "engine")
    assert str(algo).endswith("_MINE")
    assert json.loads((out / "trtllm/config.json").read_text())["quantization"]["quant_algo"] == algo
    assert info.form.endswith("_mine")
    assert decode(out / "engine") == decode(out / "engine", "none")
    assert QatArguments(name).check()[0].name == name
    assert parse_gpus("sm89", get_format(name)) == (89,)


def test_a_format_through_tensorrts_graphs(made_up_format: Callable[[str], str], make: Make, tmp_path: Path) -> None:
    name = made_up_format("int8_wo")
    given, tree = make(config=WIDE), load_tree("cpu-3")
    checkpoint, weight_format = MedusaCheckpoint.open(given.ckpt, given.heads), get_format(name)
    onnx, engine = tmp_path / "graphs/onnx", tmp_path / "graphs/engine"
    onnx.parent.mkdir()
    write_portable(onnx, checkpoint, weight_format, None, dtype="float16", tree=tree, max_length=64, draft_vocab=None)
    write_tensorrt_engine(
        engine, onnx, checkpoint, weight_format, gpus=(89,), dtype="float16", tree=tree, max_length=64, builder=NoTensorRt(),
        progress=lambda *step: None, save_tokenizer=lambda path: None, source={},
    )  # fmt: skip
    assert EngineInfo.load(engine).form == "int8_mine"
    assert selfcheck.bound_of(EngineInfo.load(engine)) == selfcheck.TENSORRT_BOUNDS["int8"]


def test_a_family(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row. transformers has to know it too, as it knows every family that is released."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    class MineConfig(LlamaConfig):
        model_type = "mine"

    class MineForCausalLM(LlamaForCausalLM):
        config_class = MineConfig

    AutoConfig.register("mine", MineConfig, exist_ok=True)
    AutoModelForCausalLM.register(MineConfig, MineForCausalLM, exist_ok=True)
    monkeypatch.setitem(families.FAMILIES, "mine", Family("mine", "MineForCausalLM", LLAMA))
    assert list(format_tables.row_problems()) == []
    given = make()
    config = given.ckpt / "config.json"
    text = {**json.loads(config.read_text()), "model_type": "mine", "architectures": ["MineForCausalLM"]}
    config.write_text(json.dumps(text))
    out = run_export(given)
    assert json.loads((out / "trtllm/config.json").read_text())["model_type"] == "llama"
    assert decode(out / "engine") == decode(out / "engine", "none")


def test_a_family_on_the_wrong_base_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Family("qwen4", "Qwen4ForCausalLM", replace(families.QWEN3, model_type="qwen4", is_qwen=False))
    monkeypatch.setitem(families.FAMILIES, "qwen4", wrong)
    assert list(format_tables.row_problems()) == ["qwen4: is_qwen is not what TensorRT-LLM makes of qwen4"]


class MineEngine(OnnxRuntimeEngine):
    """Opened under another name; what it runs is ONNX Runtime's."""


def test_a_form_of_output(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its facts, and what writes it."""

    def write(writer: parts.PartWriter, scales: Any) -> None:
        writer.work.run_once("mine.txt", lambda path: path.write_text(str(writer.job.checkpoint.num_medusa_heads)))

    monkeypatch.setitem(output_forms.OUTPUT_FORMS, "mine", OutputForm("a made-up form"))
    assert problems() == ["exporter/pipeline/parts.py FORM_WRITERS lacks 'mine'"]
    writer = parts.FormWriter(lambda job: None, lambda job: ["mine.txt"], write)
    monkeypatch.setitem(parts.FORM_WRITERS, "mine", writer)
    assert problems() == []
    given = make(format="mine")
    assert export(given, EngineTools(check_engine, no_tree, engine_builder(given.engine)))  # type: ignore[arg-type]
    assert (given.output / "mine.txt").read_text() == "3"
    assert not (given.output / "trtllm").exists()


def test_a_backend(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kind, its writer, its row of the engines, and its check."""

    def write(job: Any, scales: Any, path: Path, builder: Any, progress: Any) -> None:
        engine_writers.WRITERS["onnxruntime"].write_engine(job, scales, path, builder, progress)
        replace(EngineInfo.load(path), backend="mine", precision="made up").save(path)

    kind = EngineKind("a made-up backend", "cpu-3", has_graph=True, runs_here=True)
    monkeypatch.setitem(engine_kinds.ENGINES, "mine", kind)
    assert "engines/backends.py BACKENDS lacks 'mine'" in problems()
    writer = replace(engine_writers.WRITERS["onnxruntime"], write_engine=write)
    monkeypatch.setitem(engine_writers.WRITERS, "mine", writer)
    monkeypatch.setitem(backends.BACKENDS, "mine", Backend(lambda path, options: MineEngine(path)))
    monkeypatch.setitem(engine_files.DEFAULT_TREES, "mine", kind.tree)
    monkeypatch.setitem(selfcheck.CHECKS, "mine", BackendCheck(selfcheck.BOUNDS, MineEngine))
    monkeypatch.setitem(abilities.ENGINES, "mine", abilities.ENGINES["onnxruntime"])
    assert problems() == []
    out = run_export(make(engine="mine"))
    engine = open_engine(out / "engine")
    assert isinstance(engine, MineEngine)
    assert engine.info.backend == "mine"
    assert decode(out / "engine") == decode(out / "engine", "none")
