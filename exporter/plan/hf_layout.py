"""The layout of ModelOpt's unified Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.tensor_plan import Kind, Slice, TensorPlan
from medusa_export.heads.checkpoint import families
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.quantize.formats import FORMATS

# Storage -> suffix, kind, dtype (None is the checkpoint's), shape from (out, in, group). Smoothed formats are not here:
# in the unified form their factors move into the norms before, so that other tensors than the linears change.
_PARTS: dict[str, tuple[tuple[str, Kind, str | None, Callable[[int, int, int], tuple[int, ...]]], ...]] = {
    "float": (("weight", Kind.COPY, None, lambda o, n, g: (o, n)),),
    "fp8": (
        ("weight", Kind.FP8, "float8_e4m3fn", lambda o, n, g: (o, n)),
        ("weight_scale", Kind.WEIGHT_SCALE, "float32", lambda o, n, g: ()),
        ("input_scale", Kind.INPUT_SCALE, "float32", lambda o, n, g: ()),
    ),
    "fp8_row": (
        ("weight", Kind.FP8_ROW, "float8_e4m3fn", lambda o, n, g: (o, n)),
        ("weight_scale", Kind.ROW_SCALE, "float32", lambda o, n, g: (o,)),
    ),
    "nvfp4": (
        ("weight", Kind.FP4, "uint8", lambda o, n, g: (o, n // 2)),
        ("weight_scale", Kind.BLOCK_SCALE, "float8_e4m3fn", lambda o, n, g: (o, n // g)),
        ("weight_scale_2", Kind.WEIGHT_SCALE, "float32", lambda o, n, g: ()),
        ("input_scale", Kind.INPUT_SCALE, "float32", lambda o, n, g: ()),
    ),
}
# Linears that read the same input have one input scale; vLLM fuses them, and FP4 kernels then need one weight scale too.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


# Weight-only formats are 16 bit in a checkpoint of TensorRT-LLM's, whose builder quantizes; the unified form has no such builder.
HF_FORMATS = tuple(
    name for name, form in FORMATS.items() if form.storage in _PARTS and form.quant_algo not in ("W8A16", "W4A16")
)


def require_hf(spec: ExportSpec) -> None:
    """Raise ConfigError when the unified form of this layout is not one that is written here."""
    if spec.fmt.name not in HF_FORMATS:
        raise ConfigError(
            f"--format hf with --quant {spec.fmt.name}",
            "no writer for it",
            f"one of {', '.join(HF_FORMATS)}",
            "use fp8",
        )
    if spec.tp != 1 or spec.exclude or spec.kv_cache.name == "int8":
        got = "--tp" if spec.tp != 1 else "--exclude" if spec.exclude else "--kv-cache int8"
        raise ConfigError(f"--format hf with {got}", "an option of TensorRT-LLM's form", "none", "leave it out")


def plan_hf(checkpoint: MedusaCheckpoint, spec: ExportSpec) -> list[TensorPlan]:
    """Every tensor of the checkpoint, in the order of the source."""
    return [plan for name in checkpoint.names for plan in _tensors(checkpoint, spec, name)]


def _excluded(spec: ExportSpec) -> list[str]:
    return ["lm_head", "model.embed_tokens", *([] if spec.quant_heads else ["medusa_heads*"])]


def _tensors(checkpoint: MedusaCheckpoint, spec: ExportSpec, name: str) -> Iterator[TensorPlan]:
    if name == families.LM_HEAD and spec.config.tie_word_embeddings:
        return  # tied again when it is loaded
    shape, module = checkpoint.shape(name), name.removesuffix(".weight")
    if not _is_quantized(spec, name):
        yield TensorPlan(name, Kind.COPY, spec.dtype, shape, (Slice(name),))
    else:
        for suffix, kind, dtype, sized in _PARTS[spec.fmt.storage]:
            modules = _sharing(spec, module, kind)
            size = sized(shape[0], shape[1], spec.fmt.group_size or 1)
            yield TensorPlan(f"{module}.{suffix}", kind, dtype or spec.dtype, size, (Slice(name),), None, modules)
    if spec.kv_cache.quant_algo and module.endswith(("k_proj", "v_proj")) and name.endswith(".weight"):
        layer = int(module.split(".")[2])
        yield TensorPlan(f"{module}.{module[-6]}_scale", Kind.KV_SCALE, "float32", (), layer=layer)


def _is_quantized(spec: ExportSpec, name: str) -> bool:
    if not name.endswith(".weight") or spec.fmt.storage == "float":
        return False
    if name.startswith("medusa_heads."):
        return spec.quant_heads
    return name.endswith("_proj.weight")


def _sharing(spec: ExportSpec, module: str, kind: Kind) -> tuple[str, ...]:
    """The modules that this one shares a scale with."""
    owner, _, last = module.rpartition(".")
    alone = kind in (Kind.FP8, Kind.WEIGHT_SCALE) and spec.fmt.storage == "fp8"
    group = next((names for names in _FUSED if last in names), ()) if not alone else ()
    return tuple(f"{owner}.{name}" for name in group) or (module,)
