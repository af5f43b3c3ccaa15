"""What decides a TensorRT-LLM Medusa checkpoint's layout, and which combinations cannot be built.

Source: TensorRT-LLM 0.17 .. 1.2.1; the tile sizes are those of ``quantization/layers.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from medusa_export.heads.config import DecoderConfig
from medusa_export.heads.errors import ConfigError
from medusa_export.quantize.formats import Format, KvCache, check_heads

DTYPES = ("float16", "bfloat16")
MAX_TP = 64  # largest tensor-parallel size that an error suggests


@dataclass(frozen=True)
class ExportSpec:
    """Everything that decides a checkpoint's layout.

    Attributes:
        max_draft_len: draft nodes of the tree; the engine is built for exactly this many.
        tp: tensor-parallel ranks. Pipeline parallelism is not a choice: Medusa engines cannot be built with it.
        dtype: "float16" or "bfloat16", of everything that is not quantized.
        quant_heads: whether the heads' linears and vocabulary projections are quantized like the base.

    Raises:
        ConfigError: on construction, for a combination that TensorRT-LLM cannot build or would build wrongly.
    """

    config: DecoderConfig
    num_medusa_heads: int
    num_medusa_layers: int
    max_draft_len: int
    tp: int
    fmt: Format
    dtype: str
    kv_cache: KvCache
    quant_heads: bool

    def __post_init__(self) -> None:
        _check(self)

    @property
    def padded_vocab(self) -> int:
        """Rows of every vocabulary projection over all ranks."""
        return -(-self.config.vocab_size // self.tp) * self.tp

    @property
    def fp8_base(self) -> bool:
        """Whether the base's linears are stored in FP8."""
        return self.fmt.trtllm_weights == "fp8"

    @property
    def qwen_base(self) -> bool:
        """Whether TensorRT-LLM takes its Qwen model as the base: it looks for "qwen" in model_type."""
        return "qwen" in self.config.family.trtllm_model_type

    @property
    def local_kv_heads(self) -> int:
        """Key/value heads on a rank; with fewer heads than ranks, several ranks hold the same one."""
        return -(-self.config.num_key_value_heads // self.tp)


def _check(spec: ExportSpec) -> None:
    check_heads(spec.fmt, spec.quant_heads)
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
    problems = _misfits(spec, spec.tp) if spec.tp >= 1 else [("tp", str(spec.tp), "at least 1")]
    if problems:
        fits = [str(tp) for tp in range(1, MAX_TP + 1) if not _misfits(spec, tp)]
        action = f"use tp {', '.join(fits)}" if fits else f"no tp works with format {spec.fmt.name}: use another format"
        where, got, expected = problems[0]
        raise ConfigError(where, got, expected, action)


def _misfits(spec: ExportSpec, tp: int) -> list[tuple[str, str, str]]:
    """What does not divide over ``tp`` ranks: (tensor, its size, what is needed)."""
    config, kv_heads = spec.config, spec.config.num_key_value_heads
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
    return problems + _unaligned(spec, tp)


def _unaligned(spec: ExportSpec, tp: int) -> list[tuple[str, str, str]]:
    """Linears that TensorRT-LLM would pad to its kernels' tile, after which the checkpoint's shape no longer fits."""
    config, multiple = spec.config, spec.fmt.multiple * tp
    if spec.fmt.multiple == 1:
        return []
    kv_heads = -(-config.num_key_value_heads // tp) * tp
    features = {
        "attention.qkv": (config.q_size + 2 * kv_heads * config.head_dim, config.hidden_size),
        "attention.dense": (config.hidden_size, config.q_size),
        "mlp.fc": (config.intermediate_size, config.hidden_size),
        "mlp.proj": (config.hidden_size, config.intermediate_size),
    }
    return [
        (f"{name} in format {spec.fmt.name}", f"{list(shape)} features over tp {tp}", f"multiples of {multiple}")
        for name, shape in features.items()
        if any(size % multiple for size in shape)
    ]
