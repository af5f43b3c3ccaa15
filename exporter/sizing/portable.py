"""Sizes of the portable ONNX graphs and of the TensorRT engines that are built from them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from medusa_export.exporter.onnx.builder import ALIGNMENT, INLINE_BYTES
from medusa_export.exporter.plan.module_names import STORED_LINEARS, trtllm_linear
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.sizing.linears import linear_bytes
from medusa_export.heads.checkpoint import families
from medusa_export.quantize.formats import FLOAT_CODES
from medusa_export.quantize.tensorrt_targets import tensorrt_form

HALF = 2  # bytes of what is not quantized, and of scales


def portable_decoder_bytes(spec: ExportSpec, max_length: int) -> int:
    """decoder.onnx.data: the tables, cosines and sines, the last norm, and the layers."""
    config = spec.config
    tables = [HALF * config.vocab_size * config.hidden_size] * (1 if config.tie_word_embeddings else 2)
    positions = [HALF * max_length * config.head_dim // 2] * 2 + [8 * max_length]
    layers = (size for layer in range(config.num_hidden_layers) for size in _layer(spec, layer))
    return _aligned([*tables, *positions, HALF * config.hidden_size, *layers])


def portable_heads_bytes(spec: ExportSpec, draft_vocab: int, shared_lm_head: bool) -> int:
    """heads.onnx.data: blocks, projections to the draft vocabulary, and its token ids.

    Args:
        draft_vocab: tokens that drafts are drawn from; 0 is all.
    """
    hidden, vocab = spec.config.hidden_size, spec.config.vocab_size
    restricted = 0 < draft_vocab < vocab
    rows = draft_vocab if restricted else vocab
    blocks = [HALF * hidden * hidden, HALF * hidden] * spec.num_medusa_heads * spec.num_medusa_layers
    projections = [HALF * rows * hidden] * (1 if shared_lm_head else spec.num_medusa_heads)
    return _aligned([*blocks, *projections, 8 * rows * restricted])


def _layer(spec: ExportSpec, layer: int) -> Iterator[int]:
    config, shapes = spec.config, spec.config.linear_shapes()
    shapes[families.Q_PROJ] = (config.q_size + 2 * config.kv_size, config.hidden_size)
    for name in STORED_LINEARS:
        codes = FLOAT_CODES if spec.is_excluded(trtllm_linear(name, layer)) else tensorrt_form(spec.weight_format).codes
        yield from linear_bytes(
            codes,
            shapes[name],
            spec.weight_format.group_size,
            smooths=spec.weight_format.smooths,
            weight=HALF,
            number=HALF,
        )
        yield HALF * shapes[name][0] * config.has_bias(name)
    yield from [HALF * config.hidden_size] * 2
    yield from [HALF * config.head_dim * config.family.qk_norm] * 2


def _aligned(tensors: list[int]) -> int:
    return sum(math.ceil(size / ALIGNMENT) * ALIGNMENT for size in tensors if size > INLINE_BYTES)
