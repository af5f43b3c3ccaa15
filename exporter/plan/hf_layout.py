"""The layout of ModelOpt's unified Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.tensor_plan import Slice, TensorPlan
from medusa_export.heads.checkpoint import families
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.quantize.format_facts import HuggingFace
from medusa_export.quantize.formats import FORMATS, Format
from medusa_export.quantize.stored_parts import Kind

# Linears that read the same input have one input scale; vLLM fuses them, and FP4 kernels then need one weight scale too.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def require_hf(spec: ExportSpec) -> None:
    """Raise ConfigError when the unified form of this layout is not one that is written here."""
    huggingface_form(spec.weight_format)
    if spec.tp != 1 or spec.exclude or not spec.kv_cache.in_huggingface:
        got = "--tp" if spec.tp != 1 else "--exclude" if spec.exclude else f"--kv-cache {spec.kv_cache.name}"
        raise ConfigError(f"--format hf with {got}", "an option of TensorRT-LLM's form", "none", "leave it out")


def huggingface_form(weight_format: Format) -> HuggingFace:
    """How a format goes into the unified form; ConfigError when no writer makes it."""
    if weight_format.huggingface is None:
        *names, last = (name for name, row in FORMATS.items() if row.huggingface is not None)
        expected = f"{', '.join(names)} or {last}"
        raise ConfigError(f"--format hf with --quant {weight_format.name}", "no writer for it", expected, "use fp8")
    return weight_format.huggingface


def plan_hf(checkpoint: MedusaCheckpoint, spec: ExportSpec) -> list[TensorPlan]:
    """Every tensor of the checkpoint, in the order of the source."""
    return [plan for name in checkpoint.names for plan in _tensors(checkpoint, spec, name)]


def excluded_modules(spec: ExportSpec) -> list[str]:
    return ["lm_head", "model.embed_tokens", *([] if spec.quant_heads else ["medusa_heads*"])]


def _tensors(checkpoint: MedusaCheckpoint, spec: ExportSpec, name: str) -> Iterator[TensorPlan]:
    if name == families.LM_HEAD and spec.config.tie_word_embeddings:
        return  # tied again when it is loaded
    shape, module = checkpoint.shape(name), name.removesuffix(".weight")
    if not _is_quantized(spec, name):
        yield TensorPlan(name, Kind.COPY, spec.dtype, shape, (Slice(name),))
    else:
        facts = huggingface_form(spec.weight_format)
        for part in facts.parts:
            modules = _sharing(facts, module, part.kind)
            size, dtype = part.shape(shape[0], shape[1], spec.weight_format.group_size or 1), part.dtype or spec.dtype
            yield TensorPlan(f"{module}.{part.suffix}", part.kind, dtype, size, (Slice(name),), None, modules)
    if spec.kv_cache.quant_algo and module.endswith(("k_proj", "v_proj")) and name.endswith(".weight"):
        layer = int(module.split(".")[2])
        yield TensorPlan(f"{module}.{module[-6]}_scale", Kind.KV_SCALE, "float32", (), layer=layer)


def _is_quantized(spec: ExportSpec, name: str) -> bool:
    if not name.endswith(".weight") or not huggingface_form(spec.weight_format).parts:
        return False
    if name.startswith("medusa_heads."):
        return spec.quant_heads
    return name.endswith("_proj.weight")


def _sharing(facts: HuggingFace, module: str, kind: Kind) -> tuple[str, ...]:
    """The modules that this one shares a scale with."""
    owner, _, last = module.rpartition(".")
    alone = kind in (Kind.FP8, Kind.WEIGHT_SCALE) and not facts.fuses_weight_scales
    group = next((names for names in _FUSED if last in names), ()) if not alone else ()
    return tuple(f"{owner}.{name}" for name in group) or (module,)
