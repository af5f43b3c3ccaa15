"""A whole output directory, or a TensorRT-LLM checkpoint of any tool: every part, with its source where that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_export.core.artifacts.manifest import MANIFEST, read_manifest, verify_manifest
from medusa_export.exporter.verify.checkpoint import file_problems
from medusa_export.exporter.verify.comparison import compare_ranks, config_differences
from medusa_export.exporter.verify.contradictions import (
    config_contradictions,
    shared_scale_contradictions,
    weight_contradictions,
)
from medusa_export.exporter.verify.error_table import Recorded, recorded
from medusa_export.exporter.verify.findings import Findings
from medusa_export.exporter.verify.graphs.check import GraphCheck
from medusa_export.exporter.verify.graphs.facts import Facts
from medusa_export.exporter.verify.numbers import Numbers, RankNumbers, SourceNumbers
from medusa_export.exporter.verify.parts.engine_files import EngineFiles
from medusa_export.exporter.verify.parts.head_files import check_heads
from medusa_export.exporter.verify.parts.source import Source, find_source
from medusa_export.exporter.verify.parts.tokenizers import tokenizer_notes, tokenizer_problems
from medusa_export.exporter.verify.parts.trees import expected_tree, tree_problems
from medusa_export.exporter.verify.parts.unified import check_unified
from medusa_export.exporter.verify.rebuild import open_ranks
from medusa_export.exporter.verify.scales_file import ScalesFile, scale_differences
from medusa_export.exporter.verify.trtllm_loader.config import config_problems, read_config
from medusa_export.heads.trees.tree import load_tree

RunEngine = Callable[[Path, Path | None], list[str]]  # (engine directory, checkpoint) -> problems
GPU_TREE, SCALES, TREE = "medusa-63", "scales.safetensors", "tree.json"
# --quant -> quant_algo of what is written.
ALGOS: dict[str, str | None] = {
    "none": None, "fp8": "FP8", "fp8_rowwise": "FP8_PER_CHANNEL_PER_TOKEN", "int8_sq": "W8A8_SQ_PER_CHANNEL",
    "int8_wo": "W8A16", "int4_wo": "W4A16", "int4_awq": "W4A16_AWQ", "w4a8_awq": "W4A8_AWQ", "nvfp4": "NVFP4",
}  # fmt: skip
NEVER = ("*router", "*vocab_embedding", "*position_embedding", "*block_embedding")  # quantized
HEADS_TOO = ("lm_head*", *NEVER)  # what stays in 16 bit where the heads do not
KV_ALGOS = {"none": None, "fp8": "FP8", "int8": "INT8"}


@dataclass
class Verification:
    """What was found, and what it was compared with.

    Attributes:
        source: what it was compared with, or why it was not.
        errors: what quantization did to the weights; empty where nothing was quantized.
        measured: whether ``errors`` was measured now; otherwise it was recorded at export.
        notes: what is unusual without being an error.
    """

    out: Path
    source: Source | str
    findings: Findings = field(default_factory=Findings)
    errors: Recorded = field(default_factory=dict)
    measured: bool = False
    notes: list[str] = field(default_factory=list)


def verify(
    out: Path, *, ckpt: Path | None = None, heads: Path | None = None, run_engine: RunEngine | None = None
) -> Verification:
    """Check everything that lies in a directory.

    Args:
        out: what medusa-export wrote, or a TensorRT-LLM Medusa checkpoint.
        ckpt, heads: the source; None: what the manifest records.
        run_engine: opens an engine and runs it; None leaves that out.

    Raises:
        MedusaExportError: a source that was named and cannot be read.
    """
    has_manifest = (out / MANIFEST).is_file()
    if not has_manifest and (out / "config.json").is_file():
        return _Parts(out, out, {}, find_source(None, ckpt, heads), None).check()
    findings = Findings()
    findings.say("files", verify_manifest(out))
    with findings.guarded("files"):
        manifest = read_manifest(out)
        parts = _Parts(out, out / "trtllm", manifest, find_source(manifest, ckpt, heads, out=out), run_engine)
        parts.result.findings = findings
        return parts.check()
    del findings[1:]  # that the manifest cannot be read is said once
    return Verification(out, "no manifest", findings)


def verify_engine(engine: Path, result: Verification, run_engine: RunEngine | None) -> None:
    """An engine directory that lies somewhere else, as in a Triton repository; adds to the findings of ``result``.

    Args:
        engine: its directory.
        result: gets the findings; has the source, where there is one.
        run_engine: runs the engine; None leaves that out.
    """
    source = None if isinstance(result.source, str) else result.source
    facts = Facts.of_source(source.checkpoint.config, source.checkpoint.num_medusa_heads) if source else None
    before = len(result.findings)
    if source and facts and (engine / "decoder.onnx").is_file():
        GraphCheck(facts, SourceNumbers(source.checkpoint), "the source's").directory(engine, "engine", result.findings)
    EngineFiles(facts, source, {}).check(engine, result.findings)
    if len(result.findings) == before and run_engine is not None:
        result.findings.say("engine-run", run_engine(engine, source.ckpt if source else None))


class _Parts:
    """One directory's parts, in the order in which a fault of one explains those of the next."""

    def __init__(
        self, out: Path, trt_dir: Path, manifest: dict[str, Any], source: Source | str, run_engine: RunEngine | None
    ) -> None:
        self.out, self.trt_dir, self.manifest, self.run_engine = out, trt_dir, manifest, run_engine
        self.arguments: dict[str, Any] = manifest.get("arguments", {})
        self.result = Verification(out, source)
        self.source = None if isinstance(source, str) else source
        self.facts = None
        if self.source is not None:
            checkpoint = self.source.checkpoint
            self.facts = Facts.of_source(checkpoint.config, checkpoint.num_medusa_heads)
        self.config: dict[str, Any] = {}
        self.scales: ScalesFile | None = None

    def check(self) -> Verification:
        found = self.result.findings
        with found.guarded("scales"):
            if (self.out / SCALES).is_file():
                self.scales = ScalesFile(self.out / SCALES)
                found.say("scales", self.scales.problems())
        if self.trt_dir.is_dir():
            with found.guarded("config"):
                self._check_trtllm()
        with found.guarded("record"):
            found.say("record", self._record_problems())
        if (self.out / "hf").is_dir():
            own = bool(self.arguments.get("chat_template"))
            check_unified(self.out / "hf", self.source, self.scales, self._algos(), found, own_template=own)
        if (self.out / "heads").is_dir():
            check_heads(self.out / "heads", self.source, str(self.arguments.get("ckpt")), found)
        self._check_graphs()
        places = [self.out / name for name in ("tokenizer", "hf", "engine") if (self.out / name).is_dir()]
        if self.facts is not None and places and not found:
            self.result.notes += tokenizer_notes(places[0], self.facts.vocab_size)
        if not self.result.errors and self.manifest:
            self.result.errors = self.manifest.get("quantization_error") or {}
        return self.result

    def _check_trtllm(self) -> None:
        found, config = self.result.findings, read_config(self.trt_dir)
        if found.say("config", config_problems(config)):
            return
        self.config = config
        if self.facts is None:
            self.facts = Facts.of_trtllm(config)
        found.say("config", config_contradictions(config))
        if self.source is not None:
            found.say("config", config_differences(config, self.source.checkpoint))
        if found.say("tensors", file_problems(self.trt_dir, config, values=self.source is None)):
            return
        with found.guarded("weights"):
            self._check_values(config)
        if (self.out / TREE).is_file():
            nodes, heads = config["max_draft_len"], config["num_medusa_heads"]
            found.say("tree", tree_problems(self.out / TREE, heads=heads, nodes=nodes))
            expected = expected_tree(self.arguments, GPU_TREE, heads) if self.manifest else None
            with found.guarded("tree"):
                if expected is not None and load_tree(str(self.out / TREE)) != expected:
                    found.say("tree", [f"{TREE} is not the tree that the manifest's arguments give"])
        if (self.out / "tokenizer").is_dir():
            with found.guarded("tokenizer"):
                other = self.source.ckpt if self.source else None
                path, own = self.out / "tokenizer", bool(self.arguments.get("chat_template"))
                problems = tokenizer_problems(path, config["vocab_size"], other, "the source's", own_template=own)
                found.say("tokenizer", problems)

    def _check_values(self, config: dict[str, Any]) -> None:
        found, files = self.result.findings, open_ranks(self.trt_dir, config)
        found.say("contradictions", shared_scale_contradictions(config, files))
        if self.scales is not None:
            found.say("scales", scale_differences(config, files, self.scales))
        if self.source is None:
            found.say("contradictions", weight_contradictions(config, files))
        else:
            compared = compare_ranks(self.trt_dir, self.source.checkpoint)
            found.say("weights", compared.problems())
            self.result.errors, self.result.measured = recorded(compared.errors()), True

    def _algos(self) -> dict[str, str | None]:
        """What the recorded arguments make of the weights and of the cache."""
        quant, cache = (self.arguments.get(name, "none") for name in ("quant", "kv_cache"))
        return {
            "quant_algo": ALGOS.get(quant, f"that of {quant}"),
            "kv_cache_quant_algo": KV_ALGOS.get(cache, f"that of {cache}"),
        }

    def _record_problems(self) -> Iterator[str]:
        """What the manifest says of what was written, against what is there."""
        if not self.manifest:
            return
        quantization = self.config.get("quantization", {})
        if self.config:
            for key, value in self._algos().items():
                if quantization.get(key) != value:
                    yield f"{MANIFEST}: the arguments give {key} {value}; config.json has {quantization.get(key)}"
            if self.arguments.get("dtype") not in ("auto", self.config["dtype"]):
                yield f"{MANIFEST}: --dtype {self.arguments.get('dtype')}; config.json has {self.config['dtype']}"
            if quantization.get("quant_algo") is not None:
                given = [
                    pattern if pattern.endswith("*") else f"{pattern}*"
                    for pattern in self.arguments.get("exclude") or ()
                ]
                first = HEADS_TOO if self.arguments.get("quant_heads") else ("*lm_head", *NEVER, "*medusa_heads*")
                if quantization.get("exclude_modules") != [*first, *given]:
                    yield f"{MANIFEST}: the arguments exclude {[*first, *given]}; config.json {quantization.get('exclude_modules')}"
            if self.config["mapping"]["tp_size"] != self.arguments.get("tp"):
                yield f"{MANIFEST}: --tp {self.arguments.get('tp')}; config.json has {self.config['mapping']['tp_size']}"
        if self.scales is not None and self.manifest.get("scales") != self.scales.summary():
            yield f"{MANIFEST}: its summary of the scales is not that of {SCALES}"
        table = self.manifest.get("quantization_error") or {}
        if self.result.measured and not _alike(table, self.result.errors):
            yield f"{MANIFEST}: its table of quantization errors is not what is measured now"

    def _check_graphs(self) -> None:
        found, engine, onnx = self.result.findings, self.out / "engine", self.out / "onnx"
        if self.facts is None or not (engine.is_dir() or onnx.is_dir()):
            return
        before = len(found)
        with found.guarded("onnx-graph"):
            numbers, owner = self._numbers()
            check = GraphCheck(self.facts, numbers, owner, self.scales)
            if onnx.is_dir():
                check.directory(onnx, "onnx", found)
            if (engine / "decoder.onnx").is_file():
                check.directory(engine, "engine", found)
        if engine.is_dir():
            tokenizer = self.out / "tokenizer"
            other = tokenizer if tokenizer.is_dir() else None
            inputs = self.manifest.get("inputs", {})
            EngineFiles(self.facts, self.source, self.arguments, other, inputs).check(engine, found)
            if len(found) == before and self.run_engine is not None:
                found.say("engine-run", self.run_engine(engine, self.source.ckpt if self.source else None))

    def _numbers(self) -> tuple[Numbers | None, str]:
        """What graphs are compared with: the source, or the rank files of the same export."""
        if self.source is not None:
            return SourceNumbers(self.source.checkpoint), "the source's"
        broken = any(finding.check in ("config", "tensors") for finding in self.result.findings)
        return (None, "") if broken or not self.config else (RankNumbers(self.trt_dir), "those of the rank files")


def _alike(table: Recorded, errors: Recorded) -> bool:
    """Within the rounding of the table, and of sums that machines order differently."""
    return table.keys() == errors.keys() and all(
        abs(table[name]["snr_db"] - errors[name]["snr_db"]) <= 0.05
        and abs(table[name]["max"] - errors[name]["max"]) <= 1e-3 * max(errors[name]["max"], 1e-12)
        for name in table
    )
