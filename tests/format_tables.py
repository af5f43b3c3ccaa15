"""Every table of the project that is keyed by a format, a family or a backend, and where such names stand in the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medusa_export.engines import backends
from medusa_export.engines.measure import machine
from medusa_export.engines.serving import decoders
from medusa_export.engines.serving.triton import repository
from medusa_export.engines.trtllm import command
from medusa_export.engines.verify import selfcheck
from medusa_export.exporter.cli import data
from medusa_export.exporter.doctor import abilities
from medusa_export.exporter.job import engine_kinds, gpu_costs, output_forms
from medusa_export.exporter.onnx import linear
from medusa_export.exporter.onnx.portable import linear as portable
from medusa_export.exporter.pipeline import engine_writers, parts
from medusa_export.exporter.verify import agreement, contradictions, dequantize, scales_file
from medusa_export.exporter.verify.parts import engine_files, unified
from medusa_export.exporter.verify.parts import export as export_part
from medusa_export.exporter.verify.trtllm_loader import modules
from medusa_export.exporter.write import heads as head_writer
from medusa_export.exporter.write import tensor_maker
from medusa_export.heads.checkpoint import families
from medusa_export.heads.roofline.gpus import GPUS
from medusa_export.heads.training.full import arguments
from medusa_export.heads.trees import step_costs
from medusa_export.quantize import formats
from medusa_export.quantize.format_facts import QAT_TARGETS, NotOffered, TensorRt
from medusa_export.quantize.stored_parts import Kind
from tests.paths import ROOT

Keys = set[object]


@dataclass(frozen=True)
class Table:
    """A table beside the code that computes.

    Attributes:
        place: file and name.
        keys: those that it has.
        needed: those that the rows ask for.
        is_subset: a table of those rows that something holds of: it may lack some, and has no others.
    """

    place: str
    keys: Keys
    needed: Keys
    is_subset: bool = False

    def problems(self) -> Iterator[str]:
        """What it lacks and what is stray."""
        missing = set() if self.is_subset else self.needed - self.keys
        yield from (f"{self.place} lacks {key!r}" for key in sorted(missing, key=str))
        yield from (
            f"{self.place} has {key!r}, which no row asks for" for key in sorted(self.keys - self.needed, key=str)
        )


def tables() -> list[Table]:
    """All of them, as they are now."""
    written = Table("exporter/pipeline/parts.py FORM_WRITERS", {*parts.FORM_WRITERS}, {*output_forms.OUTPUT_FORMS})
    return [*format_tables(), *backend_tables(), written]


def format_tables() -> list[Table]:
    """Those keyed by a format, or by what the format's row says of a target."""
    rows = formats.FORMATS.values()
    onnxruntime: Keys = {row.onnxruntime.form for row in rows if row.onnxruntime}
    tensorrt: Keys = {row.tensorrt.form for row in rows if isinstance(row.tensorrt, TensorRt)}
    algos: Keys = {row.trtllm.algo for row in rows}
    stored: Keys = {row.trtllm.algo for row in rows if row.trtllm.parts}
    rounded: Keys = {name for name, form in portable.PORTABLE_FORMS.items() if form.activations}
    unified_algos: Keys = {row.trtllm.algo for row in rows if row.huggingface}
    input_scaled: Keys = {row.trtllm.algo for row in rows if row.input_bound is not None and row.trtllm.parts}
    caches: Keys = {row.quant_algo for row in formats.KV_CACHE.values()}
    return [
        Table("exporter/onnx/linear.py LINEAR_FORMS", {*linear.LINEAR_FORMS}, onnxruntime),
        Table("exporter/onnx/portable/linear.py PORTABLE_FORMS", {*portable.PORTABLE_FORMS}, tensorrt),
        Table("exporter/verify/agreement.py BOUNDS", {*agreement.BOUNDS}, algos),
        Table("exporter/verify/dequantize.py DECODERS", {*dequantize.DECODERS}, stored),
        Table("exporter/verify/dequantize.py INPUT_ROUNDING", {*dequantize.INPUT_ROUNDING}, stored, is_subset=True),
        Table("exporter/verify/trtllm_loader/modules.py ALGOS", {*modules.ALGOS}, algos - {None}),
        Table("exporter/verify/trtllm_loader/modules.py KV_ALGOS", {*modules.KV_ALGOS}, caches - {None}),
        Table("engines/trtllm/command.py PAGED_CONTEXT_FMHA", {*command.PAGED_CONTEXT_FMHA}, caches),
        Table("engines/verify/selfcheck.py BOUNDS", {*selfcheck.BOUNDS}, onnxruntime),
        Table("engines/verify/selfcheck.py MEASURED", {*selfcheck.MEASURED}, tensorrt),
        Table("engines/verify/selfcheck.py ROUNDING", {*selfcheck.ROUNDING}, rounded),
        Table("engines/verify/selfcheck.py EXACT", {*selfcheck.EXACT}, tensorrt, is_subset=True),
        Table("exporter/job/gpu_costs.py COMPARED", {*gpu_costs.COMPARED}, {*formats.FORMATS}, is_subset=True),
        Table("exporter/verify/parts/export.py ALGOS", {*export_part.ALGOS}, {*formats.FORMATS}),
        Table("exporter/verify/parts/export.py KV_ALGOS", {*export_part.KV_ALGOS}, {*formats.KV_CACHE}),
        Table("exporter/verify/parts/engine_files.py FORMS", {*engine_files.FORMS}, onnxruntime),
        Table("exporter/verify/parts/unified.py PARTS", {*unified.PARTS}, unified_algos - {None}),
        Table("exporter/verify/scales_file.py CODES", {*scales_file.CODES}, input_scaled),
        Table("exporter/verify/scales_file.py KV_CODES", {*scales_file.KV_CODES}, caches - {None}),
        Table(
            "exporter/verify/contradictions.py SHARED_BY_MLP", {*contradictions.SHARED_BY_MLP}, stored, is_subset=True
        ),
        Table("engines/trtllm/command.py AWQ_ALGOS", {*command.AWQ_ALGOS}, stored, is_subset=True),
        Table("exporter/write/tensor_maker.py", {*tensor_maker.NUMBERS, *tensor_maker.CHUNKS}, {*Kind}),
    ]


def backend_tables() -> list[Table]:
    """Those keyed by what --engine and engine.json name."""
    names: Keys = {*backends.BACKENDS}
    return [
        Table("engines/backends.py BACKENDS", names, {*engine_kinds.ENGINES}),
        Table("exporter/doctor/abilities.py ENGINES", {*abilities.ENGINES}, names),
        Table("exporter/job/engine_kinds.py ENGINES", {*engine_kinds.ENGINES}, names),
        Table("exporter/pipeline/engine_writers.py WRITERS", {*engine_writers.WRITERS}, names),
        Table("engines/verify/selfcheck.py CHECKS", {*selfcheck.CHECKS}, names),
        Table(
            "exporter/verify/parts/engine_files.py GRAPH_CHECKS", {*engine_files.GRAPH_CHECKS}, names, is_subset=True
        ),
        Table("exporter/verify/parts/engine_files.py DEFAULT_TREES", {*engine_files.DEFAULT_TREES}, names),
        Table("heads/trees/step_costs.py PRIOR_COSTS", {*step_costs.PRIOR_COSTS}, names, is_subset=True),
        Table("engines/measure/machine.py GPU_BACKENDS", {*machine.GPU_BACKENDS}, names, is_subset=True),
        Table("engines/serving/decoders.py SERVED", {*decoders.SERVED}, names, is_subset=True),
        Table("engines/serving/triton/repository.py README_WORDS", {*repository.README_WORDS}, {*decoders.SERVED}),
    ]


def row_problems() -> Iterator[str]:
    """What a row says of itself and a table says otherwise."""
    for name, row in formats.FORMATS.items():
        if row.name != name:
            yield f"{name}: the row is named {row.name}"
        if row.onnxruntime and row.onnxruntime.form in linear.LINEAR_FORMS:
            form = linear.LINEAR_FORMS[row.onnxruntime.form]
            keeps_codes = row.onnxruntime.codes.reach.value == "group" or row.onnxruntime.integers
            said = (row.smooths, keeps_codes, row.onnxruntime.integers)
            if (form.smooths, form.keeps_codes, form.integers) != said:
                yield f"{name}: LINEAR_FORMS and the row differ on smoothing, codes or integers"
        portable_form = portable.PORTABLE_FORMS.get(getattr(row.tensorrt, "form", ""))
        if portable_form and portable_form.smooths != row.smooths:
            yield f"{name}: PORTABLE_FORMS and the row differ on smoothing"
        if not isinstance(row.qat, NotOffered) and {*row.qat} != {*QAT_TARGETS}:
            yield f"{name}: qat has {sorted(row.qat)}"
        if row.smooths and row.huggingface:
            yield f"{name}: a smoothed format in the unified checkpoint"
        if not any(row.trtllm.products in gpu.operations for gpu in GPUS):
            yield f"{name}: no GPU has products in {row.trtllm.products}"
        if not row.trtllm.parts and row.needs_calibration:
            yield f"{name}: calibrated, and nothing of it is stored"
    for family in families.FAMILIES.values():  # TensorRT-LLM's own rule, as the verifier has it
        if modules.is_qwen({"model_type": family.trtllm.model_type}) != family.trtllm.is_qwen:
            yield f"{family.model_type}: is_qwen is not what TensorRT-LLM makes of {family.trtllm.model_type}"


# What the sources say. Where a table stands, its module's name of it; the rows themselves are in these two files.
ROWS = ("quantize/formats.py", "heads/checkpoint/families.py")
SOURCES = ("core", "heads", "quantize", "exporter", "engines", "benchmarks")


def names() -> set[str]:
    """What a branch must not compare with, and what keys a table: names of formats, forms, algorithms, families and backends."""
    rows = formats.FORMATS.values()
    found = (
        {row.name for row in rows} | {str(row.trtllm.algo) for row in rows} | {*families.FAMILIES, *backends.BACKENDS}
    )
    found |= {row.onnxruntime.form for row in rows if row.onnxruntime} | {"qwen", "int4_fp8"}
    found |= {row.tensorrt.form for row in rows if isinstance(row.tensorrt, TensorRt)}
    return (found | {str(row.quant_algo) for row in formats.KV_CACHE.values()}) - {"None"}


def choices() -> set[str]:
    """What flags choose among besides, which no branch may compare with either; each has one table."""
    return {*output_forms.OUTPUT_FORMS, *head_writer.LAYOUTS, *arguments.LAYOUTS, *arguments.BASES, *data.EXECUTORS}


def constants(node: ast.AST) -> set[str]:
    """The strings in an expression."""
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def branches(text: str, known: set[str]) -> Iterator[str]:
    """Comparisons with such a name: ``x == "fp8"``, ``x in ("int4", "int8")``, ``case "fp8":``."""
    for node in ast.walk(ast.parse(text)):
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        sides += [node.value] if isinstance(node, ast.MatchValue) else []
        literal = [side for side in sides if isinstance(side, (ast.Constant, ast.Tuple, ast.List, ast.Set))]
        if any(constants(side) & known for side in literal):
            yield ast.unparse(node)


def literal_tables(text: str, known: set[str]) -> Iterator[str]:
    """Module-level names, or functions, that hold a literal with two such names or more as keys or elements."""
    for statement in ast.parse(text).body:
        for node in ast.walk(statement):
            keys: Iterable[ast.AST | None] = ()
            if isinstance(node, ast.Dict):
                keys = node.keys
            elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
                keys = node.elts
            if len({key.value for key in keys if isinstance(key, ast.Constant) and key.value in known}) > 1:
                yield _name(statement)
                break


def _name(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Assign):
        return ast.unparse(statement.targets[0])
    if isinstance(statement, ast.AnnAssign):
        return ast.unparse(statement.target)
    return str(getattr(statement, "name", ast.unparse(statement)))


def source_files(root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """(name, text) of every source but the rows."""
    for top in SOURCES:
        for path in sorted((root / top).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if name not in ROWS:
                yield name, path.read_text("utf-8")
