"""The export from end to end on tiny models: what lies where, when it is made again, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.core import threads as heads_threads
from medusa_export.core.artifacts.hashing import WrittenFile
from medusa_export.core.artifacts.manifest import read_manifest
from medusa_export.core.artifacts.staging import KEPT_BEFORE
from medusa_export.core.errors import ConfigError, InternalError, MedusaExportError, OutputError
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.tensorrt.build import TensorRtBuilder
from medusa_export.engines.tuning.auto import choose_tree
from medusa_export.engines.verify.selfcheck import check_engine
from medusa_export.exporter.job import job
from medusa_export.exporter.job.arguments import ExportArguments
from medusa_export.exporter.job.job import Job
from medusa_export.exporter.pipeline import engine_writers as engine_kinds
from medusa_export.exporter.pipeline import export as export_module
from medusa_export.exporter.pipeline import parts
from medusa_export.exporter.pipeline.export import export
from medusa_export.exporter.verify.checkpoint import verify_export
from medusa_export.exporter.verify.parts.export import verify
from medusa_export.exporter.verify.parts.source import Source
from medusa_export.exporter.write import ranks
from medusa_export.exporter.write.safetensors import SafetensorsWriter
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.contract.engine_tools import EngineTools
from medusa_export.heads.trees.acceptance import Acceptance
from medusa_export.heads.trees.followers import FOLLOWERS_FILE, Followers
from medusa_export.heads.trees.step_costs import load_costs
from medusa_export.heads.trees.tree import PRESETS, load_tree
from medusa_export.quantize import ptq
from medusa_export.quantize.scales import SCALES_FILE, Scales

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
FULL_FP8: dict[str, Any] = {"quant": "fp8", "kv_cache": "fp8", "quant_heads": True, "calib_prompts": 2}
ENDS = "end-of-sequence token: </s> (id 2)"  # the last thing that an export says
TOKENIZER = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
ALWAYS = {"tree.json", "trtllm/config.json", "trtllm/rank0.safetensors", *(f"tokenizer/{name}" for name in TOKENIZER)}
ENGINE_FILES = {
    *(f"onnx/decoder.onnx{suffix}" for suffix in ("", ".data")),
    *(f"engine/decoder{suffix}" for suffix in (".onnx", ".onnx.data", "-batch.onnx")),
    *(f"engine/{name}" for name in ("engine.json", "tree.json", *TOKENIZER)),
}
Make = Callable[..., ExportArguments]


@pytest.fixture
def make(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path], tiny_tokenizer: Any
) -> Make:
    """``make(layout="v1", num_heads=3, *, config={}, **arguments)``: a model with a tokenizer, heads, and the flags."""

    def write(
        layout: str = "v1", num_heads: int = 3, *, config: dict[str, Any] | None = None, **arguments: Any
    ) -> ExportArguments:
        config = config or {}
        model = tiny_checkpoint(tmp_path / "model", dtype=torch.float16, **config)
        tiny_tokenizer(model)
        directory = model if layout == "modelopt" else tmp_path / "heads"
        tiny_heads(directory, layout, num_heads, hidden=config.get("hidden_size", 64), dtype=torch.float16)
        heads = None if layout == "modelopt" else directory
        return ExportArguments(**{"ckpt": model, "output": tmp_path / "out", "heads": heads, **arguments})

    return write


def written(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def trtllm_config(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "trtllm/config.json").read_text())
    return config


def no_engine(*_: object) -> list[str]:
    raise AssertionError("no engine was asked for")


def engine_tools(check: Any, choose_tree: Any = no_engine) -> EngineTools:
    return EngineTools(check, choose_tree, TensorRtBuilder())


@dataclass
class Calls:
    """Stands in for the engines' check, and keeps what it was given."""

    problems: list[str] = field(default_factory=list)
    seen: list[tuple[Path, Path | None, list[list[int]]]] = field(default_factory=list)

    def __call__(self, engine: Path, checkpoint: Path | None, texts: list[list[int]]) -> list[str]:
        assert (engine / "engine.json").is_file()
        self.seen.append((engine, checkpoint, texts))
        return self.problems


FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any], str, tuple[str | None, str | None]]] = {
    # arguments, model, form of the engine, (quant_algo, kv_cache_quant_algo)
    "none": ({}, {}, "float", (None, None)),
    "fp8": (FULL_FP8, {}, "fp8", ("FP8", "FP8")),
    "int8_wo": ({"quant": "int8_wo"}, WIDE, "int8", ("W8A16", None)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_with_engine(name: str, make: Make) -> None:
    arguments, model, form, algorithms = FORMATS[name]
    given = make(config=model, **arguments)
    assert export(given, engine_tools(check_engine))  # the engines' own check, against transformers
    out = given.output
    heads = {file for file in written(out) if file.startswith("engine/heads")}
    scales = {SCALES_FILE} if name == "fp8" else set()
    assert len(heads) >= 2
    assert written(out) == ALWAYS | ENGINE_FILES | heads | scales | {"medusa.json"}
    assert verify_export(out) == []
    info = EngineInfo.load(out / "engine")
    assert (info.form, info.max_length) == (form, 128)
    files = (f"ckpt/{file}" for file in ("config.json", "model.safetensors"))
    inputs = read_manifest(given.output)["inputs"]
    lines = "".join(f"{inputs[file]}  {file.removeprefix('ckpt/')}\n" for file in files)  # as sha256sum prints them
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert info.source == {"checkpoint": "model", "sha256": digest, "quant": name}
    quantization = trtllm_config(out)["quantization"]
    assert (quantization["quant_algo"], quantization["kv_cache_quant_algo"]) == algorithms
    assert read_tokenizer(out / "engine").chat_template == read_tokenizer(given.ckpt).chat_template


@pytest.mark.parametrize("name", FORMATS)
def test_without_engine(name: str, make: Make) -> None:
    arguments, model, _, _ = FORMATS[name]
    given = make(config=model, engine="none", **arguments)
    assert export(given, engine_tools(no_engine))
    assert written(given.output) == ALWAYS | {"medusa.json"} | ({SCALES_FILE} if name == "fp8" else set())
    assert verify_export(given.output) == []


def test_scales_are_those_of_everything_that_is_quantized(make: Make) -> None:
    given = make(engine="none", **FULL_FP8)
    export(given, engine_tools(no_engine))
    scales = Scales.load(given.output / SCALES_FILE)
    base = {name for name in scales.weight_amax if name.startswith("model.layers.")}
    assert len(base) == 2 * 7
    assert scales.weight_amax.keys() - base == {
        f"medusa_heads.{h}.{part}" for h in range(3) for part in ("0.linear", "1")
    }
    assert scales.kv_amax.keys() == {0, 1}
    assert read_manifest(given.output)["scales"] == scales.summary()
    tensors = load_file(given.output / "trtllm/rank0.safetensors")
    stored = tensors["medusa_heads.1.lm_head.weights_scaling_factor"].item()
    assert stored == pytest.approx(scales.weight_amax["medusa_heads.1.1"] / 448)


def test_manifest_keeps_arguments_and_inputs(make: Make) -> None:
    given = make(engine="none", tp=2)
    export(given, engine_tools(no_engine))
    manifest = read_manifest(given.output)
    assert manifest["arguments"]["tp"] == 2
    assert "output" not in manifest["arguments"]
    names = manifest["inputs"].keys()
    assert {"ckpt/config.json", "ckpt/model.safetensors", "heads/medusa_lm_head.safetensors"} <= names
    assert {f"ckpt/{name}" for name in TOKENIZER} <= names
    assert manifest["files"].keys() == written(given.output) - {"medusa.json"}


def test_ranks_and_dtype(make: Make) -> None:
    given = make(engine="none", tp=2, dtype="bfloat16")
    export(given, engine_tools(no_engine))
    ranks = [load_file(given.output / f"trtllm/rank{rank}.safetensors") for rank in range(2)]
    assert {tensor.dtype for rank in ranks for tensor in rank.values()} == {torch.bfloat16}
    assert ranks[0].keys() == ranks[1].keys()


class TestTrees:
    @pytest.mark.parametrize("num_heads", [1, 2, 3, 5])
    def test_default_trees(self, num_heads: int, make: Make) -> None:
        given = make(num_heads=num_heads)
        export(given, engine_tools(Calls()))
        large, small = (load_tree(str(given.output / name)) for name in ("tree.json", "engine/tree.json"))
        kept = [choice for choice in PRESETS["medusa-63"] if len(choice) <= num_heads]
        assert sorted(large.choices) == sorted(kept)
        assert large.depth == min(num_heads, 4)
        assert trtllm_config(given.output)["max_draft_len"] == large.max_draft_len
        assert 1 < small.num_nodes <= 8
        assert small.depth <= num_heads
        assert set(small.choices) <= set(PRESETS["cpu-3"])

    def test_a_given_tree_serves_both(self, make: Make, tmp_path: Path) -> None:
        (tmp_path / "tree.json").write_text("[[0], [1], [0, 0], [0, 0, 0]]")
        given = make(tree=str(tmp_path / "tree.json"))
        export(given, engine_tools(Calls()))
        for name in ("tree.json", "engine/tree.json"):
            assert load_tree(str(given.output / name)).choices == ((0,), (1,), (0, 0), (0, 0, 0))
        assert trtllm_config(given.output)["max_draft_len"] == 4
        assert "tree/tree.json" in read_manifest(given.output)["inputs"]

    def test_a_given_tree_is_not_cut(self, make: Make) -> None:
        with pytest.raises(MedusaExportError, match="a path of depth 4; expected at most 2"):
            export(make(num_heads=2, tree="medusa-63"), engine_tools(no_engine))


def test_heads_inside_the_checkpoint(make: Make) -> None:
    given = make("modelopt", quant="fp8", calib_prompts=2)
    assert given.heads is None
    assert export(given, engine_tools(check_engine))
    assert trtllm_config(given.output)["num_medusa_heads"] == 3
    stored = load_file(given.ckpt / "model.safetensors")["medusa_heads.2.1.weight"]
    assert torch.equal(load_file(given.output / "trtllm/rank0.safetensors")["medusa_heads.2.lm_head.weight"], stored)


class TestFollowers:
    """The table that may lie beside heads."""

    @pytest.fixture
    def given(self, make: Make) -> ExportArguments:
        given = make()
        assert given.heads is not None
        self.table(given, 60).save(given.heads / FOLLOWERS_FILE)
        return given

    def table(self, given: ExportArguments, pairs: int) -> Followers:
        vocab_size = json.loads((given.ckpt / "config.json").read_text())["vocab_size"]
        return Followers.count([(range(pairs), [True] * pairs)], vocab_size)

    def test_it_goes_into_the_engine(self, given: ExportArguments) -> None:
        assert export(given, engine_tools(check_engine))
        copy, source = given.output / "engine" / FOLLOWERS_FILE, given.heads / FOLLOWERS_FILE  # type: ignore[operator]
        assert copy.read_bytes() == source.read_bytes()
        assert f"heads/{FOLLOWERS_FILE}" in read_manifest(given.output)["inputs"]
        assert not verify(given.output).findings
        self.table(given, 30).save(copy)
        assert any(
            "engine/followers.npz is not that of the heads" in f"{found}" for found in verify(given.output).findings
        )
        copy.write_bytes(b"PK")
        assert any("followers.npz: got something else" in f"{found}" for found in verify(given.output).findings)
        copy.unlink()
        assert any(
            "engine/followers.npz is not that of the heads" in f"{found}" for found in verify(given.output).findings
        )

    def test_heads_that_are_given_as_a_file(self, given: ExportArguments, monkeypatch: pytest.MonkeyPatch) -> None:
        (file,) = given.heads.glob("medusa_lm_head.*")  # type: ignore[union-attr]
        monkeypatch.chdir(file.parent)  # where verify looks for it
        given = replace(given, heads=file)
        assert export(given, engine_tools(check_engine))
        found = verify(given.output)
        assert not found.findings
        assert isinstance(found.source, Source), found.source

    def test_another_one_makes_another_engine(self, given: ExportArguments) -> None:
        assert export(given, engine_tools(check_engine))
        self.table(given, 30).save(given.heads / FOLLOWERS_FILE)  # type: ignore[operator]
        with pytest.raises(OutputError, match=FOLLOWERS_FILE):
            export(given, engine_tools(no_engine))

    def test_only_where_this_project_chooses_the_drafts(self, given: ExportArguments) -> None:
        export(replace(given, engine="none"), engine_tools(no_engine))
        assert not [file for file in written(given.output) if file.endswith(FOLLOWERS_FILE)]
        assert f"heads/{FOLLOWERS_FILE}" not in read_manifest(given.output)["inputs"]

    def test_of_another_model(self, given: ExportArguments) -> None:
        Followers.count([], 7).save(given.heads / FOLLOWERS_FILE)  # type: ignore[operator]
        with pytest.raises(ConfigError, match="a table of 7 tokens"):
            export(given, engine_tools(no_engine))
        assert not given.output.exists()


class TestAgain:
    def test_up_to_date(self, make: Make) -> None:
        given = make(engine="none")
        assert export(given, engine_tools(no_engine))
        before = {path: path.stat().st_mtime_ns for path in given.output.rglob("*")}
        assert not export(given, engine_tools(no_engine))
        assert {path: path.stat().st_mtime_ns for path in given.output.rglob("*")} == before

    def test_a_changed_argument_is_named(self, make: Make, tmp_path: Path) -> None:
        given = make(engine="none")
        export(given, engine_tools(no_engine))
        (tmp_path / "calib.jsonl").write_text('{"prompt": "w1 w2"}\n')
        changes: dict[str, Any] = {
            "quant": "fp8", "kv_cache": "fp8", "dtype": "bfloat16", "tp": 2, "tree": "cpu-8", "calib_prompts": 7,
            "engine": "onnxruntime", "max_length": 64, "draft_vocab": 0,
        }  # fmt: skip
        for name, value in changes.items():
            with pytest.raises(OutputError, match=rf"other arguments \({name}\).*choose another directory"):
                export(replace(given, **{name: value}), engine_tools(no_engine))
        with pytest.raises(OutputError, match=r"other inputs \(.*calib.jsonl\)"):
            export(replace(given, calib=tmp_path / "calib.jsonl"), engine_tools(no_engine))
        assert verify_export(given.output) == []

    @pytest.mark.parametrize("name", ["model/model.safetensors", "heads/medusa_lm_head.safetensors"])
    def test_changed_weights_are_named(self, name: str, make: Make) -> None:
        given = make(engine="none")
        export(given, engine_tools(no_engine))
        path = given.ckpt.parent / name
        tensors = load_file(path)
        first = sorted(tensors)[0]
        save_file({**tensors, first: tensors[first] + 1}, path, {"format": "pt"})
        with pytest.raises(OutputError, match=rf"other inputs \({name.replace('model/', 'ckpt/')}\)"):
            export(given, engine_tools(no_engine))

    def test_a_changed_tokenizer_is_named(self, make: Make) -> None:
        given = make(engine="none")
        export(given, engine_tools(no_engine))
        with (given.ckpt / "chat_template.jinja").open("a") as file:
            file.write(" ")
        with pytest.raises(OutputError, match=r"other inputs \(.*chat_template.jinja\)"):
            export(given, engine_tools(no_engine))

    def test_a_damaged_output_is_not_up_to_date(self, make: Make) -> None:
        given = make(engine="none")
        export(given, engine_tools(no_engine))
        (given.output / "tree.json").unlink()
        with pytest.raises(OutputError, match=r"damaged output \(.*tree.json: missing"):
            export(given, engine_tools(no_engine))


@pytest.mark.slow
def test_parallel_ranks_are_the_same_bytes(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, found = make(engine="none", tp=4, **FULL_FP8), []
    for cores in (1, 4):
        monkeypatch.setattr(heads_threads, "cpus", lambda cores=cores: cores)
        export(given, engine_tools(no_engine))
        found.append(contents(given.output))
        given.output.rename(tmp_path / f"{cores} cores")
    assert found[0] == found[1]
    assert len({found[0][f"trtllm/rank{rank}.safetensors"] for rank in range(4)}) == 4


def contents(out: Path) -> dict[str, bytes]:
    """Every file; of the manifest, what does not depend on the time."""
    found = {name: (out / name).read_bytes() for name in written(out)}
    manifest = json.loads(found["medusa.json"])
    return {**found, "medusa.json": json.dumps({**manifest, "created": ""}).encode()}


@dataclass
class Ranks:
    """Counts the ranks that are written, and fails at those asked for."""

    failing: tuple[int, ...] = ()
    error: Exception = field(default_factory=lambda: ZeroDivisionError("a bug"))
    begun: list[int] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        write = ranks.write_rank

        def counted(path: Path, checkpoint: Any, spec: Any, scales: Any, rank: int, *more: Any) -> WrittenFile:
            self.begun.append(rank)
            written = write(path, checkpoint, spec, scales, rank, *more)
            if rank in self.failing:
                raise self.error
            return written

        monkeypatch.setattr(ranks, "write_rank", counted)
        monkeypatch.setattr(heads_threads, "cpus", lambda: 1)

    def interrupted(self, given: ExportArguments) -> Path:
        """Export until the failure; returns the working directory."""
        with pytest.raises(type(self.error)):
            export(given, engine_tools(no_engine))
        self.failing = ()
        self.begun.clear()
        return given.output.parent / ".out.partial"

    def again(self, given: ExportArguments) -> None:
        """The same command once more."""
        self.notices.clear()
        assert export(given, engine_tools(no_engine), notice=self.notices.append)
        assert verify_export(given.output) == []
        assert not (given.output.parent / ".out.partial").exists()


class TestContinued:
    @pytest.fixture
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> Ranks:
        counted = Ranks(failing=(2,))
        counted.install(monkeypatch)
        return counted

    @pytest.mark.slow
    def test_the_same_bytes_and_nothing_twice(
        self, make: Make, tmp_path: Path, counted: Ranks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = make(engine="none", tp=4, **FULL_FP8)
        partial = counted.interrupted(given)
        files = partial / "files"
        inodes = {name: (files / f"trtllm/rank{name}.safetensors").stat().st_ino for name in (0, 1)}
        assert not (files / "trtllm/rank3.safetensors").exists()
        monkeypatch.setattr(parts, "calibrate", no_engine)
        counted.again(given)
        assert counted.begun == [2, 3]
        assert counted.notices == ["continuing: 6 of 8 parts were finished", ENDS]
        trtllm = given.output / "trtllm"
        assert {name: (trtllm / f"rank{name}.safetensors").stat().st_ino for name in (0, 1)} == inodes
        continued = contents(given.output)
        given.output.rename(tmp_path / "continued")
        monkeypatch.undo()
        monkeypatch.setenv("MEDUSA_EXPORT_CACHE", "off")
        assert export(given, engine_tools(no_engine))
        assert contents(given.output) == continued

    def test_a_flipped_byte_costs_that_rank(self, make: Make, counted: Ranks, caplog: pytest.LogCaptureFixture) -> None:
        given = make(engine="none", tp=4)
        path = counted.interrupted(given) / "files/trtllm/rank1.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
        counted.again(given)
        assert counted.begun == [1, 2, 3]
        assert "trtllm/rank1.safetensors: changed since it was finished; made again" in caplog.text

    def test_other_arguments_start_anew(self, make: Make, counted: Ranks, caplog: pytest.LogCaptureFixture) -> None:
        given = make(engine="none", tp=4)
        counted.interrupted(given)
        counted.again(replace(given, dtype="bfloat16"))
        assert counted.begun == [0, 1, 2, 3]
        assert counted.notices == [ENDS]
        assert "other arguments (dtype); discarded" in caplog.text

    def test_after_a_refusal_nothing_is_left(self, make: Make, tmp_path: Path, counted: Ranks) -> None:
        counted.error = OutputError("rank2", "a bad weight", "a good one", "look at it")
        given = make(engine="none", tp=4)
        before = set(os.listdir(tmp_path))
        counted.interrupted(given)
        assert set(os.listdir(tmp_path)) == before

    def test_an_interrupt_before_it_continues(
        self, make: Make, counted: Ranks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise SystemExit(143)

        given = make(engine="none", tp=4)
        with monkeypatch.context() as patch:
            patch.setattr(Job, "check", interrupt)
            with pytest.raises(SystemExit) as first:
                export(given, engine_tools(no_engine))
            patch.undo()
            counted.interrupted(given)
            patch.setattr(Job, "check", interrupt)
            with pytest.raises(SystemExit) as second:
                export(given, engine_tools(no_engine))
        assert not hasattr(first.value, "__notes__")
        assert second.value.__notes__ == [KEPT_BEFORE]
        counted.again(given)
        assert counted.begun == [2, 3]

    def test_an_interrupted_engine(self, make: Make, counted: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
        given = make(tp=2)
        with monkeypatch.context() as patch:
            patch.setattr(engine_kinds, "write_engine", counted.interrupted)  # with other arguments: a TypeError
            with pytest.raises(TypeError):
                export(given, engine_tools(no_engine))
        counted.begun.clear()
        monkeypatch.setattr(engine_kinds, "write_onnx", no_engine)
        assert export(given, engine_tools(Calls()), notice=counted.notices.append)
        assert counted.begun == [0, 1]
        assert counted.notices == ["continuing: 1 of 7 parts were finished", ENDS]
        assert verify_export(given.output) == []

    def test_what_is_there_needs_no_room(self, make: Make, counted: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []
        monkeypatch.setattr(export_module, "check_free_space", lambda out, needed: asked.append(needed))
        given = make(engine="none", tp=4)
        files = counted.interrupted(given) / "files"
        there = sum((files / f"trtllm/rank{rank}.safetensors").stat().st_size for rank in (0, 1))
        counted.again(given)
        assert there < asked[0] - asked[1] < there + 50_000  # config, tokenizer, tree


class TestScales:
    @pytest.fixture
    def calibrations(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Grows with every calibration."""
        seen: list[str] = []

        def counted(*given: Any, **options: Any) -> Scales:
            seen.append(options["kv_cache"])
            return ptq.calibrate(*given, **options)

        monkeypatch.setattr(parts, "calibrate", counted)
        return seen

    @pytest.mark.slow
    def test_another_tp_needs_no_second_calibration(
        self, make: Make, tmp_path: Path, calibrations: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MEDUSA_EXPORT_CACHE", str(tmp_path / "cache"))
        given = make(engine="none", **FULL_FP8)
        export(given, engine_tools(no_engine))
        for number, same in enumerate(({"tp": 2}, {"dtype": "bfloat16"}, {"tree": "cpu-8"})):
            other = replace(given, output=tmp_path / f"same{number}", **same)  # type: ignore[arg-type]
            export(other, engine_tools(no_engine))
            assert (other.output / SCALES_FILE).read_bytes() == (given.output / SCALES_FILE).read_bytes()
        assert calibrations == ["fp8"]
        export(replace(given, output=tmp_path / "other", kv_cache="none"), engine_tools(no_engine))
        export(replace(given, output=tmp_path / "fewer", calib_prompts=1), engine_tools(no_engine))
        export(replace(given, output=tmp_path / "16-bit heads", quant_heads=False), engine_tools(no_engine))
        assert calibrations == ["fp8", "none", "fp8", "fp8"]

    @pytest.mark.parametrize(("quant_heads", "calibrated"), [(True, 2), (False, 1)])
    def test_heads_count_when_they_are_quantized(
        self, quant_heads: bool, calibrated: int, make: Make, tmp_path: Path, calibrations: list[str], monkeypatch: Any
    ) -> None:
        monkeypatch.setenv("MEDUSA_EXPORT_CACHE", str(tmp_path / "cache"))
        given = make(engine="none", quant="fp8", quant_heads=quant_heads, calib_prompts=1)
        export(given, engine_tools(no_engine))
        path = tmp_path / "heads/medusa_lm_head.safetensors"
        save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
        export(replace(given, output=tmp_path / "other"), engine_tools(no_engine))
        assert len(calibrations) == calibrated

    @pytest.mark.parametrize("name", ["", SCALES_FILE], ids=["export", "file"])
    def test_given(self, name: str, make: Make, tmp_path: Path, calibrations: list[str]) -> None:
        first = make(engine="none", **FULL_FP8)
        export(first, engine_tools(no_engine))
        (tmp_path / "model/chat_template.jinja").unlink()  # no prompt is run
        given = replace(first, output=tmp_path / "other", scales=first.output / name, calib_prompts=1, tp=2)
        export(given, engine_tools(no_engine))
        assert calibrations == ["fp8"]
        assert (given.output / SCALES_FILE).read_bytes() == (first.output / SCALES_FILE).read_bytes()
        manifest = read_manifest(given.output)
        assert manifest["inputs"][f"scales/{SCALES_FILE}"]
        assert manifest["arguments"]["scales"] == (first.output / name).name

    def test_given_ones_that_do_not_fit(self, make: Make, tmp_path: Path) -> None:
        first = make(engine="none", quant="fp8", calib_prompts=1)
        export(first, engine_tools(no_engine))
        before = set(os.listdir(tmp_path))
        other = replace(first, output=tmp_path / "other", scales=first.output)
        for changes, message in (
            ({"quant_heads": True}, "missing"),
            ({"kv_cache": "fp8"}, "missing"),
            ({"quant": "none"}, "--scales: got a calibration for --quant none --kv-cache none; expected a format"),
            ({"scales": tmp_path / "absent"}, "absent"),
            ({"scales": tmp_path / "model/config.json"}, r"config\.json"),
        ):
            with pytest.raises(MedusaExportError, match=message):
                export(replace(other, **changes), engine_tools(no_engine))
        assert set(os.listdir(tmp_path)) == before


class TestChecks:
    def test_what_the_engine_check_gets(self, make: Make) -> None:
        check, given = Calls(), make()
        export(given, engine_tools(check))
        ((engine, checkpoint, texts),) = check.seen
        assert (engine.name, checkpoint) == ("engine", given.ckpt)
        assert len(texts) == 4
        assert all(1 < len(text) <= 64 for text in texts)

    def test_a_large_model_is_not_loaded_beside_its_engine(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(export_module, "SMALL_MODEL", 1000)
        check = Calls()
        export(make(), engine_tools(check))
        assert check.seen[0][1] is None

    def test_a_bad_engine_is_not_published(self, make: Make, tmp_path: Path) -> None:
        given = make()
        before = set(os.listdir(tmp_path))
        with pytest.raises(InternalError, match=r"KL 9\.9 nats and 1 more"):
            export(given, engine_tools(Calls(["KL 9.9 nats", "wrong"])))
        with pytest.raises(OutputError, match=r"KL 9\.9 nats; .*stands --quant fp8; take another --quant, or --calib"):
            export(replace(given, quant="fp8"), engine_tools(Calls(["KL 9.9 nats"])))
        assert set(os.listdir(tmp_path)) == before

    def test_a_bad_checkpoint_is_not_published(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The check is of what the file holds: a byte that changes on its way there is found."""
        write = SafetensorsWriter.write

        def write_and_flip(self: SafetensorsWriter[Any], chunks: Any) -> None:
            write(self, chunks)
            if self._next == len(self.entries):
                data = self.path.read_bytes()
                with self.path.open("r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    file.write(bytes([data[-1] ^ 0x40]))

        monkeypatch.setattr(SafetensorsWriter, "write", write_and_flip)
        given = make(engine="none")
        before = set(os.listdir(tmp_path))
        with pytest.raises(InternalError, match=r"1 of .* values are not the source's"):
            export(given, engine_tools(no_engine))
        assert set(os.listdir(tmp_path)) == before


def test_progress(make: Make) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    given = make(quant="fp8", calib_prompts=3)
    export(given, engine_tools(Calls()), lambda stage, done, total: seen.setdefault(stage, []).append((done, total)))
    assert list(seen) == ["calibrate", "ONNX graph", "engine", "TensorRT-LLM checkpoint", "verify"]
    assert seen["calibrate"] == [(1, 3), (2, 3), (3, 3)]
    assert all(done == total for done, total in (calls[-1] for calls in seen.values()))


def test_refusals_come_before_any_work(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make()
    (given.ckpt / "chat_template.jinja").rename(tmp_path / "chat_template.jinja")
    before = set(os.listdir(tmp_path))
    monkeypatch.setattr(job, "InputFiles", no_engine)
    with pytest.raises(ConfigError, match="no chat template"):
        export(given, engine_tools(no_engine))
    with pytest.raises(ConfigError, match="at least 1 of each"):
        export(replace(given, quant="fp8", engine="none", calib_prompts=0), engine_tools(no_engine))
    assert set(os.listdir(tmp_path)) == before


def test_no_chat_template_is_needed_where_nothing_runs(make: Make) -> None:
    given = make(engine="none")
    (given.ckpt / "chat_template.jinja").unlink()
    assert export(given, engine_tools(no_engine))


def test_a_full_disk_is_seen_before_writing(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = make(engine="none")
    before = set(os.listdir(tmp_path))
    real = export_module.check_free_space
    monkeypatch.setattr(export_module, "check_free_space", lambda out, needed: real(out, needed + 10**18))
    monkeypatch.setattr(export_module, "PartWriter", no_engine)
    with pytest.raises(OutputError, match="GB free; expected"):
        export(given, engine_tools(no_engine))
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("engine", "tp", "num_heads", "vocab_size"),
    [("onnxruntime", 1, 4, 97), ("none", 1, 4, 97), ("none", 4, 1, 2000), ("onnxruntime", 1, 1, 2000)],
)
def test_the_estimate_is_an_upper_bound(
    engine: str, tp: int, num_heads: int, vocab_size: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank holds the whole embedding; heads without an lm_head are written with one."""
    asked: list[int] = []
    monkeypatch.setattr(export_module, "check_free_space", lambda out, needed: asked.append(needed))
    config = {"vocab_size": vocab_size, "tie_word_embeddings": True}
    given = make("v2", num_heads, engine=engine, tp=tp, config=config)
    export(given, engine_tools(Calls()))
    weights = [path for path in given.output.rglob("*") if path.suffix in (".safetensors", ".data")]
    assert asked[0] > sum(path.stat().st_size for path in weights)


@pytest.mark.slow
class TestMeasuredTree:
    """--prompts: the tree comes from the written engine, and TensorRT-LLM's checkpoint is built for it."""

    @pytest.fixture
    def given(self, make: Make, tmp_path: Path) -> ExportArguments:
        prompts = tmp_path / "served.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"w{n} w{n + 1}"}) + "\n" for n in range(6)))
        return make(prompts=prompts, tp=2)

    def test_both_trees(self, given: ExportArguments) -> None:
        assert export(given, engine_tools(check_engine, choose_tree))
        engine, trtllm = given.output / "engine", given.output / "trtllm"
        counted = Acceptance.load(engine / "acceptance.json")
        seen = {tuple(choice) for choice in json.loads((engine / "tree.json").read_text())["medusa_choices"]}
        assert seen <= set(counted.paths)
        costs = load_costs(engine / "cost.json")
        assert costs[0]["verify"][0]["nodes"] == 1
        tree = load_tree(str(given.output / "tree.json"))
        expected = sorted(counted.paths, key=lambda path: -counted.paths[path])[:63]
        assert tree.max_draft_len == len(expected)
        assert min(counted.paths[choice] for choice in tree.choices) == counted.paths[expected[-1]]
        assert json.loads((trtllm / "config.json").read_text())["max_draft_len"] == tree.max_draft_len
        assert verify_export(given.output) == []
        assert not export(given, engine_tools(check_engine, choose_tree))  # nothing is measured again

    def test_costs_of_another_machine(self, given: ExportArguments, tmp_path: Path) -> None:
        costs = tmp_path / "gpu.json"
        rows = [{"nodes": 1, "ms": 1.0}, {"nodes": 4, "ms": 1.0}, {"nodes": 5, "ms": 9.0}, {"nodes": 64, "ms": 9.0}]
        costs.write_text(json.dumps({"curves": [{"verify": rows}]}))
        assert export(replace(given, tree_cost=costs), engine_tools(check_engine, choose_tree))
        assert json.loads((given.output / "trtllm/config.json").read_text())["max_draft_len"] == 3

    def test_costs_estimated_for_a_gpu(self, given: ExportArguments, caplog: pytest.LogCaptureFixture) -> None:
        """A model so small that launches take all the time: nodes are free, and the heads' launches are what a tree costs."""
        assert export(replace(given, gpu_model="h100"), engine_tools(check_engine, choose_tree))
        body = json.loads((given.output / "gpu-estimate.json").read_text())
        draft_len = json.loads((given.output / "trtllm/config.json").read_text())["max_draft_len"]
        assert (
            body["predicted"]["max_draft_len"] == draft_len == load_tree(str(given.output / "tree.json")).max_draft_len
        )
        assert body["predicted"]["estimated"] == load_costs(given.output / "gpu-estimate.json")[0]["estimated"]
        low, high = body["predicted"]["speedup_interval"]
        assert low < body["predicted"]["speedup"] < high
        assert body["estimated"]["tp"] == 2
        assert verify_export(given.output) == []
        assert "cost the same" not in caplog.text

    def test_a_long_prompt_is_left_out(self, given: ExportArguments) -> None:
        """It fills the context by itself; the others are what the tree is measured on."""
        assert given.prompts is not None
        with given.prompts.open("a") as file:
            file.write(json.dumps({"prompt": " ".join(f"w{n % 60}" for n in range(300)), "id": "long"}) + "\n")
        assert export(given, engine_tools(check_engine, choose_tree))
        answers = Acceptance.load(given.output / "engine/acceptance.json").answers
        assert len(answers) == 6
        assert "long" not in {answer.prompt for answer in answers}

    def test_the_assumption_is_said(self, given: ExportArguments, caplog: pytest.LogCaptureFixture) -> None:
        assert export(given, engine_tools(check_engine, choose_tree))
        assert "as if all trees up to 64 nodes cost the same" in caplog.text
        assert not (given.output / "gpu-estimate.json").exists()

    def test_an_interruption_costs_no_measurement(
        self, given: ExportArguments, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: object) -> None:
            raise SystemExit(143)

        with monkeypatch.context() as patch:
            patch.setattr(parts, "write_config", stop)
            with pytest.raises(SystemExit):
                export(given, engine_tools(check_engine, choose_tree))
        assert export(given, engine_tools(check_engine))  # without anything that could measure
        assert (given.output / "engine/cost.json").is_file()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tree": "auto", "prompts": None}, "no --prompts"),
            ({"tree": "cpu-3"}, "requires --tree auto, which measures the tree"),
            ({"engine": "none"}, "the engine that it is measured on"),
            ({"tree_cost": Path("absent.json")}, "absent.json"),
            ({"prompts": None, "tree_cost": Path("cost.json")}, "requires --tree auto, which measures the tree"),
            ({"prompts": None, "gpu_model": "h100"}, "requires --tree auto, which measures the tree"),
            ({"gpu_model": "v100"}, "'v100'"),
            ({"gpu_model": "a100-80gb", "quant": "fp8"}, "fp8 needs SM 89"),
            ({"gpu_model": "h100", "tree_cost": Path("cost.json")}, "--tree-cost too"),
            (
                {"max_length": 101},
                "--tree auto: got prompts of 6 tokens and more; expected one of at most 5; raise --max-",
            ),
        ],
    )
    def test_refusals(self, change: dict[str, Any], message: str, given: ExportArguments) -> None:
        with pytest.raises(MedusaExportError, match=message):
            export(replace(given, **change), engine_tools(no_engine))  # before an engine is written
        assert not given.output.exists()
