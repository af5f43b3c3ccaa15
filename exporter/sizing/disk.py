"""Bytes that an export writes, from what the ONNX writers store tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from medusa_export.exporter.onnx.builder import ALIGNMENT, INLINE_BYTES
from medusa_export.exporter.onnx.forms import onnx_form
from medusa_export.exporter.onnx.linear import LINEAR_FORMS, is_one_product
from medusa_export.exporter.onnx.vocabulary import BLOCKS, Vocabulary
from medusa_export.exporter.plan.module_names import STORED_LINEARS, trtllm_linear
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.trtllm_config import trtllm_config
from medusa_export.exporter.sizing.linears import linear_bytes
from medusa_export.exporter.sizing.portable import portable_decoder_bytes, portable_heads_bytes
from medusa_export.exporter.sizing.types import ENGINE_CODE, FLOAT32, Item, Request
from medusa_export.heads.checkpoint import families
from medusa_export.quantize.formats import FLOAT_CODES


def disk_items(spec: ExportSpec, request: Request, rank_bytes: int) -> Iterator[Item]:
    """What an export writes, in bytes, folder by folder.

    Args:
        spec: the layout.
        request: what is written besides the checkpoint.
        rank_bytes: of all rank files.
    """
    config = json.dumps(trtllm_config(spec), indent=2, sort_keys=True) + "\n"
    files = "the rank file" if spec.tp == 1 else f"{spec.tp} rank files"
    yield Item("trtllm/", rank_bytes + len(config.encode()), f"{files} and config.json, exact")
    if request.onnx_form is not None:
        decoder, heads = decoder_bytes(spec, request, request.onnx_form), heads_bytes(spec, request)
        yield Item("onnx/", decoder, f"decoder, {request.onnx_form}")
        yield Item("engine/", decoder + heads + request.tokenizer_bytes, "the decoder again, heads, tokenizer")
    if request.portable is not None:
        graphs = portable_bytes(spec, request)
        yield Item("onnx/", graphs, f"decoder and heads, {request.portable}")
        built = graphs + ENGINE_CODE + request.tokenizer_bytes
        yield Item("engine/", built, "the same weights in the engines, some code, tokenizer: an estimate")
    if request.of_checkpoint:
        yield Item("engine/", 2 * rank_bytes, "where trtllm-build is: one with Medusa, one without; an estimate")
    yield Item("tokenizer/", request.tokenizer_bytes, "as in the checkpoint")


def portable_bytes(spec: ExportSpec, request: Request) -> int:
    heads = portable_heads_bytes(spec, request.draft_vocab, request.shared_lm_head)
    return portable_decoder_bytes(spec, request.max_length) + heads


def _aligned(tensors: Iterable[int]) -> int:
    """Bytes of a data file: each tensor begins on a page, and small ones lie in the graph's file."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in tensors if size > INLINE_BYTES)


def decoder_bytes(spec: ExportSpec, request: Request, onnx_form: str) -> int:
    """decoder.onnx.data: embedding, vocabulary projection, cosines and sines, the last norm, and the layers.

    Args:
        spec: the layout.
        request: context, and how tensors are stored.
        onnx_form: of the linears, a row of ``LINEAR_FORMS``.
    """
    config, stored = spec.config, request.stored_bytes
    table = config.vocab_size * config.hidden_size
    tensors = [table * stored, *[FLOAT32 * request.max_length * config.head_dim // 2] * 2, FLOAT32 * config.hidden_size]
    vocabulary = LINEAR_FORMS[onnx_form].vocabulary
    if vocabulary is not None:
        tensors += _int8(vocabulary, config.vocab_size, config.hidden_size)
    elif not config.tie_word_embeddings:
        tensors.append(table * stored)
    layers = (_layer_tensors(spec, layer, onnx_form, stored) for layer in range(config.num_hidden_layers))
    return _aligned(tensors) + sum(map(_aligned, layers))


def _layer_tensors(spec: ExportSpec, layer: int, onnx_form: str, stored: int) -> Iterator[int]:
    """Norms and biases are float32."""
    config, shapes = spec.config, spec.config.linear_shapes()
    shapes[families.Q_PROJ] = (config.q_size + 2 * config.kv_size, config.hidden_size)
    excluded = {name: spec.is_excluded(trtllm_linear(name, layer)) for name in STORED_LINEARS}
    gate, up, down = families.GATE_PROJ, families.UP_PROJ, families.DOWN_PROJ
    in_up = LINEAR_FORMS[onnx_form].integers and not excluded[up] and not excluded[down]  # the smoothing of down_proj
    if is_one_product(onnx_form, [excluded[gate], excluded[up]]):
        shapes[gate], shapes[up] = (2 * config.intermediate_size, config.hidden_size), (0, 0)
    for name in STORED_LINEARS:
        smooths = spec.weight_format.smooths and not (in_up and name == down)
        yield from _matrix(spec, shapes[name], stored, excluded=excluded[name], smooths=smooths)
        yield FLOAT32 * shapes[name][0] * config.has_bias(name)
    yield FLOAT32 * (shapes[up][0] or shapes[gate][0]) * in_up
    yield from [FLOAT32 * config.hidden_size] * 2
    yield from [FLOAT32 * config.head_dim * config.family.qk_norm] * 2


def _matrix(spec: ExportSpec, shape: tuple[int, ...], stored: int, *, excluded: bool, smooths: bool) -> tuple[int, ...]:
    """A linear's tensors in the ONNX form of the format."""
    codes = FLOAT_CODES if excluded else onnx_form(spec.weight_format).codes
    return linear_bytes(codes, shape, spec.weight_format.group_size, smooths=smooths, weight=stored, number=FLOAT32)


def _int8(vocabulary: Vocabulary, rows: int, width: int) -> tuple[int, ...]:
    return linear_bytes(vocabulary.codes, (rows, width), None, smooths=False, weight=FLOAT32, number=FLOAT32)


def heads_bytes(spec: ExportSpec, request: Request) -> int:
    """heads.onnx.data: the heads' matrices and projections to the draft vocabulary in 8 bits, biases, and its token ids."""
    hidden, vocab = spec.config.hidden_size, spec.config.vocab_size
    restricted = 0 < request.draft_vocab < vocab
    rows = request.draft_vocab if restricted else vocab

    def matrix(height: int) -> tuple[int, ...]:
        return _int8(BLOCKS, height, hidden) if hidden % 16 == 0 else (FLOAT32 * height * hidden,)

    blocks = [*matrix(hidden), FLOAT32 * hidden] * spec.num_medusa_heads * spec.num_medusa_layers
    projections = matrix(rows) * (1 if request.shared_lm_head else spec.num_medusa_heads)
    return _aligned([*blocks, *projections, 8 * rows * restricted])
