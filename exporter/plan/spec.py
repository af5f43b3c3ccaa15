"""What decides a TensorRT-LLM Medusa checkpoint's layout, and which combinations cannot be built.

Source: TensorRT-LLM 0.17 .. 1.2.1; the tile sizes are those of ``quantization/layers.py``.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize.formats import FORMATS, Format, KvCache, check_heads, get_kv_cache

DTYPES = ("float16", "bfloat16")
ALWAYS_16_BIT = ("*router", "*vocab_embedding", "*position_embedding", "*block_embedding")
HEADS_16_BIT = ("*lm_head", *ALWAYS_16_BIT, "*medusa_heads*")
HEADS_QUANTIZED = ("lm_head*", *ALWAYS_16_BIT)  # "*lm_head" would also match the heads' own
MAX_TP = 64  # largest tensor-parallel size that an error suggests


@dataclass(frozen=True)
class ExportSpec:
    """Everything that decides a checkpoint's layout.

    Attributes:
        max_draft_len: draft nodes of the tree; the engine is built for exactly this many.
        tp: tensor-parallel ranks. Pipeline parallelism is not a choice: Medusa engines cannot be built with it.
        dtype: "float16" or "bfloat16", of everything that is not quantized.
        quant_heads: whether the heads' linears and vocabulary projections are quantized like the base.
        exclude: patterns of TensorRT-LLM module names to leave in 16 bit besides those that always are.

    Raises:
        ConfigError: on construction, for a combination that TensorRT-LLM cannot build or would build wrongly.
    """

    config: DecoderConfig
    num_medusa_heads: int
    num_medusa_layers: int
    max_draft_len: int
    tp: int
    weight_format: Format
    dtype: str
    kv_cache: KvCache
    quant_heads: bool
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    @property
    def padded_vocab(self) -> int:
        """Rows of every vocabulary projection over all ranks."""
        return -(-self.config.vocab_size // self.tp) * self.tp

    @property
    def exclude_modules(self) -> list[str]:
        """TensorRT-LLM's ``exclude_modules``; it replaces the default list, so that is in it."""
        given = [pattern if pattern.endswith("*") else f"{pattern}*" for pattern in self.exclude]
        return [*(HEADS_QUANTIZED if self.quant_heads else HEADS_16_BIT), *self.weight_format.trtllm.excludes, *given]

    def is_quantized(self, module: str) -> bool:
        """Whether a linear is stored quantized in the file, by TensorRT-LLM's name of it."""
        return bool(self.weight_format.trtllm.parts) and not self.is_excluded(module)

    def is_excluded(self, module: str) -> bool:
        """Whether a linear stays in 16 bit in the engine, by TensorRT-LLM's name of it."""
        return any(fnmatchcase(module, pattern) for pattern in self.exclude_modules)

    def linear_shapes(self) -> dict[str, tuple[tuple[int, int], int]]:
        """TensorRT-LLM's name of every linear but lm_head -> ([out, in] as fused, over all ranks; the axis that ranks split)."""
        config, hidden = self.config, self.config.hidden_size
        qkv = (config.q_size + 2 * self.local_kv_heads * self.tp * config.head_dim, hidden)
        layer = {
            "attention.qkv": (qkv, 0),
            "attention.dense": ((hidden, config.q_size), 1),
            "mlp.fc": ((config.intermediate_size, hidden), 0),
            "mlp.gate": ((config.intermediate_size, hidden), 0),
            "mlp.proj": ((hidden, config.intermediate_size), 1),
        }
        shapes = {
            f"transformer.layers.{index}.{name}": shape
            for index in range(config.num_hidden_layers)
            for name, shape in layer.items()
        }
        for head in range(self.num_medusa_heads):
            for index in range(self.num_medusa_layers):
                shapes[f"medusa_heads.{head}.medusa_layers.{index}.linear"] = ((hidden, hidden), 0)
            shapes[f"medusa_heads.{head}.lm_head"] = ((self.padded_vocab, hidden), 0)
        return shapes

    @property
    def qwen_base(self) -> bool:
        """Whether TensorRT-LLM takes its Qwen model as the base."""
        return self.config.family.trtllm.is_qwen

    @property
    def local_kv_heads(self) -> int:
        """Key/value heads on a rank; with fewer heads than ranks, several ranks hold the same one."""
        return -(-self.config.num_key_value_heads // self.tp)


def _check(spec: ExportSpec) -> None:
    check_heads(spec.weight_format, spec.quant_heads)
    if spec.dtype not in DTYPES:
        raise ConfigError(f"dtype {spec.dtype!r}", "an unsupported dtype", " or ".join(DTYPES), "choose one of these")
    if spec.max_draft_len < 1:
        raise ConfigError(
            "tree", "no draft tokens", "at least one (TensorRT-LLM refuses an empty tree)", "pick another tree"
        )
    if spec.num_medusa_heads < 1 or spec.num_medusa_layers < 1:
        counts = f"{spec.num_medusa_heads} heads of {spec.num_medusa_layers} layers"
        raise ConfigError("Medusa heads", counts, "at least 1 of each", "use a checkpoint with heads")
    if spec.qwen_base and spec.config.o_bias:
        expected = "no bias there (TensorRT-LLM's Qwen model has none and would drop it)"
        raise ConfigError("attention_bias", "a bias on o_proj", expected, "use a model without it")
    _check_excludes(spec)
    problems = _misfits(spec) if spec.tp >= 1 else [("tp", str(spec.tp), "at least 1")]
    if problems:
        where, got, expected = problems[0]
        raise ConfigError(where, got, expected, _way_out(spec))


def _check_excludes(spec: ExportSpec) -> None:
    if spec.exclude and not spec.weight_format.trtllm.excludable:
        raise ConfigError(
            f"--exclude {spec.exclude[0]}",
            f"format {spec.weight_format.name}",
            "a format that quantizes linear by linear (fp8_rowwise takes whole attention and MLP blocks)",
            "leave --exclude out, or use fp8",
        )
    for pattern, written in zip(
        spec.exclude, spec.exclude_modules[-len(spec.exclude) :] if spec.exclude else (), strict=True
    ):
        if not any(fnmatchcase(module, written) for module in spec.linear_shapes()):
            raise ConfigError(
                f"--exclude {pattern}",
                "no such module",
                "a pattern of TensorRT-LLM's names, such as '*mlp.proj*' or 'transformer.layers.0.*'",
                "correct it",
            )
    for layer in range(spec.config.num_hidden_layers if spec.exclude else 0):
        fc, gate = (spec.is_excluded(f"transformer.layers.{layer}.mlp.{name}") for name in ("fc", "gate"))
        if fc != gate:
            got = f"only {'mlp.fc' if fc else 'mlp.gate'} of layer {layer}"
            raise ConfigError("--exclude", got, "both or none (trtllm-build fuses them)", "exclude mlp.gate and mlp.fc")


def _way_out(spec: ExportSpec) -> str:
    """The smallest change that fits: other ranks, another group size, then the nearest format."""
    fits = [str(tp) for tp in range(1, MAX_TP + 1) if not _misfits(_with(spec, tp=tp))]
    if fits:
        return f"use tp {', '.join(fits)}"
    for size in spec.weight_format.group_sizes:
        if not _misfits(_with(spec, weight_format=replace(spec.weight_format, group_size=size))):
            return f"use --group-size {size}"
    nearest = spec.weight_format
    while nearest.nearest != nearest.name:
        nearest = FORMATS[nearest.nearest]
        quant_heads = spec.quant_heads and nearest.quantizes_heads
        if any(not _misfits(_with(spec, weight_format=nearest, tp=tp, quant_heads=quant_heads)) for tp in {spec.tp, 1}):
            return f"no tp works with format {spec.weight_format.name}: use --quant {nearest.name}"
    return "no tp and no format works for this model: use the ONNX Runtime engine"


def _with(spec: ExportSpec, **changes: Any) -> ExportSpec:
    """The spec with changes, unchecked: whether it fits is what the caller wants to know."""
    other = copy(spec)
    for name, value in changes.items():
        object.__setattr__(other, name, value)
    return other


def _misfits(spec: ExportSpec) -> list[tuple[str, str, str]]:
    """What does not divide over the ranks: (tensor, its size, what is needed)."""
    config, kv_heads, tp = spec.config, spec.config.num_key_value_heads, spec.tp
    sizes = {
        "attention.qkv": (config.num_attention_heads, "query heads"),
        "mlp.fc": (config.intermediate_size, "intermediate features"),
        "medusa_layers linear": (config.hidden_size, "hidden features"),
    }
    problems = [
        (name, f"{size} {what} over tp {tp}", f"a multiple of {tp}")
        for name, (size, what) in sizes.items()
        if size % tp
    ]
    if max(kv_heads, tp) % min(kv_heads, tp):
        got = f"{kv_heads} key/value heads over tp {tp}"
        problems.append(("attention.qkv", got, "one a multiple of the other"))
    return problems or _unaligned(spec)


def _unaligned(spec: ExportSpec) -> list[tuple[str, str, str]]:
    """Linears that TensorRT-LLM would pad to its kernels' tile, after which the checkpoint's shape no longer fits."""
    facts = spec.weight_format.trtllm
    multiple = max(facts.multiple, spec.weight_format.group_size or 1)
    tiles = [multiple * spec.tp] * 2 if facts.multiple > 1 else list(facts.rank_tile)
    problems = []
    for module, (shape, axis) in spec.linear_shapes().items():
        if tiles == [1, 1] or spec.is_excluded(module):
            continue
        needed = [tile * (spec.tp if facts.multiple == 1 and axis == index else 1) for index, tile in enumerate(tiles)]
        if any(size % need for size, need in zip(shape, needed, strict=True)):
            name = module.removeprefix("transformer.layers.0.")
            got = f"{list(shape)} features over tp {spec.tp}"
            problems.append((f"{name} in format {spec.weight_format.name}", got, f"multiples of {needed}"))
    return problems


def export_spec(
    checkpoint: MedusaCheckpoint,
    weight_format: Format,
    *,
    tree: Tree,
    tp: int,
    dtype: str,
    kv_cache: str,
    quant_heads: bool,
    exclude: tuple[str, ...] = (),
) -> ExportSpec:
    """The layout that :func:`write_trtllm` would write; raises what it would refuse, without touching the disk.

    Args:
        checkpoint: base model and heads.
        weight_format: of the linears.
        tree: what the engine will verify.
        tp: tensor-parallel ranks.
        dtype: "float16", "bfloat16" or "auto", the checkpoint's own.
        kv_cache: name of the key/value cache's format.
        quant_heads: whether the heads are quantized too.
        exclude: patterns of TensorRT-LLM's names to leave in 16 bit.
    """
    tree.require_heads(checkpoint.num_medusa_heads)
    return ExportSpec(
        checkpoint.config,
        checkpoint.num_medusa_heads,
        checkpoint.num_medusa_layers,
        tree.max_draft_len,
        tp,
        weight_format,
        resolve_dtype(dtype, checkpoint.config.dtype),
        get_kv_cache(kv_cache),
        quant_heads,
        exclude,
    )


def resolve_dtype(dtype: str, stored: str) -> str:
    """What "auto" stands for: the checkpoint's dtype, or float16 where that is float32."""
    if dtype != "auto":
        return dtype
    return "float16" if stored == "float32" else stored
