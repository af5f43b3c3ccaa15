"""What the files of a TensorRT-LLM checkpoint say against each other: seen without the model that they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from medusa_export.exporter.verify.rebuild import RankPiece, Rebuilt, layout
from medusa_export.heads.checkpoint.families import FAMILIES
from medusa_export.heads.checkpoint.rope import SCALINGS
from medusa_export.heads.checkpoint.tensor_source import TensorSource

Config = Mapping[str, Any]
Files = Sequence[TensorSource]
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHARED_BY_MLP = ("FP8", "NVFP4")  # trtllm-build fuses fc and gate, and would round the weights of one again
MLP_SCALES = ("weights_scaling_factor", "weights_scaling_factor_2", "activation_scaling_factor")
ALMOST = 0.9  # share of equal rows from which on two matrices are meant to be one


def config_contradictions(config: Config) -> Iterator[str]:
    """Values of config.json that cannot be together."""
    scaling = config.get("rotary_scaling")
    if scaling is not None:
        kind = scaling.get("type")
        if kind not in SCALINGS:
            yield f"config.json: rotary_scaling of type {kind!r}; expected one of {', '.join(SCALINGS)}"
        for key in SCALINGS.get(kind, ()):
            if not isinstance(scaling.get(key), (int, float)) or isinstance(scaling.get(key), bool):
                yield f"config.json: rotary_scaling of type {kind} without {key}"
        if scaling.get("rope_type", kind) != kind:
            yield f"config.json: rotary_scaling has type {kind!r} and rope_type {scaling['rope_type']!r}"
    family = FAMILIES.get(str(config.get("qwen_type", config["model_type"])))
    if family is not None and family.qkv_bias and not config["attn_bias"]:
        yield f"config.json: attn_bias is false, and {family.model_type} always has biases of q, k and v"
    if config["num_attention_heads"] * config["head_size"] <= 0 or config["head_size"] % 2:
        yield f"config.json: head_size {config['head_size']}; the rotary embedding turns pairs"


def shared_scale_contradictions(config: Config, files: Files) -> Iterator[str]:
    """Scales a tensor that differ between ranks, or between linears that are built as one."""
    algo = config["quantization"].get("quant_algo")
    for name in files[0].names if len(files) > 1 else ():
        if _is_shared(files[0], name) and not _equal([file.read(name) for file in files]):
            yield f"{name} differs between ranks"
    for rank, file in enumerate(files) if algo in SHARED_BY_MLP else ():
        for layer in range(config["num_hidden_layers"]):
            for kind in MLP_SCALES:
                pair = [f"transformer.layers.{layer}.mlp.{linear}.{kind}" for linear in ("fc", "gate")]
                if all(name in file and file.shape(name) in ((1,), ()) for name in pair) and not _equal(
                    map(file.read, pair)
                ):
                    yield f"rank{rank}: {pair[0]} and that of gate differ; trtllm-build fuses the two"


def _is_shared(file: TensorSource, name: str) -> bool:
    """Single numbers, and the factors of inputs that every rank has whole."""
    column = name.endswith("prequant_scaling_factor") and ".dense." not in name and ".proj." not in name
    return file.shape(name) == (1,) or column


def _equal(tensors: Any) -> bool:
    first, *others = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors)
    return all(torch.equal(first, other) for other in others)


def weight_contradictions(config: Config, files: Files) -> Iterator[str]:
    """Copies that differ, padding that is not zero, ranks in the wrong order, and matrices that are one and differ."""
    items = {item.name: item for item in layout(config, files)}
    for item in items.values():
        yield from _copy_problems(item)
        yield from _padding_problems(item)
    if config.get("tie_word_embeddings"):
        rows = _unequal_rows(items[LM_HEAD], items[EMBEDDING])
        if rows:
            yield f"lm_head is tied to the embedding, and {rows} of its {config['vocab_size']} rows differ"
    yield from _head_projections(config, items)


def _copy_problems(item: Rebuilt) -> Iterator[str]:
    whole = Single(item)
    for piece, row in item.copies:
        for first, rows in piece.chunks():
            start = row + first
            if not _equal([rows.values, whole.rows(start, start + len(rows.values))]):
                yield f"{item.name}: rank {piece.rank} holds a different copy than the ranks before it"
                break


def _padding_problems(item: Rebuilt) -> Iterator[str]:
    wrong = [piece for piece in item.padding if any(rows.values.any() for _, rows in piece.chunks())]
    if not wrong:
        return
    pieces = [line[0] for line in item.grid if len(line) == 1]
    height = wrong[0].height
    early = [piece.rank for piece in pieces if piece.rank != wrong[0].rank and _ends_in_zeros(piece, height)]
    if early:
        yield f"{item.name}: rank {early[0]} ends in the padding of rank {wrong[0].rank}: the ranks are swapped"
    else:
        yield f"{item.name}: padding rows of rank {wrong[0].rank} that are not zero"


def _ends_in_zeros(piece: RankPiece, height: int) -> bool:
    return piece.height >= height and not bool(piece.stored.rows(piece.stop - height, piece.stop).values.any())


class Single:
    """Rows of a tensor that ranks hold whole or in rows."""

    def __init__(self, item: Rebuilt) -> None:
        self.item = item

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start .. stop - 1``."""
        parts, first = [], 0
        for line in self.item.grid:
            piece = line[0]
            low, high = max(start - first, 0), min(stop - first, piece.height)
            if low < high:
                parts.append(piece.stored.rows(piece.start + low, piece.start + high).values)
            first += piece.height
        return torch.cat(parts)


def _unequal_rows(one: Rebuilt, other: Rebuilt) -> int:
    """Rows of two matrices of one shape that are not the same bits, some at a time."""
    left, right, count, step = Single(one), Single(other), 0, 4096
    for start in range(0, one.shape[0], step):
        stop = min(start + step, one.shape[0])
        pair = [each.rows(start, stop).contiguous().view(torch.uint8) for each in (left, right)]
        count += stop - start if pair[0].shape != pair[1].shape else int((pair[0] != pair[1]).any(dim=1).sum())
    return count


def _head_projections(config: Config, items: Mapping[str, Rebuilt]) -> Iterator[str]:
    """Heads that share the model's lm_head do so all of them, and whole."""
    heads = {
        head: items[f"medusa_heads.{head}.{config['num_medusa_layers']}.weight"]
        for head in range(config["num_medusa_heads"])
    }
    if any(item.is_quantized for item in heads.values()):
        return
    unequal = {head: _unequal_rows(item, items[LM_HEAD]) for head, item in heads.items()}
    shared = [head for head, rows in unequal.items() if not rows]
    for head, rows in unequal.items():
        if rows and (rows <= (1 - ALMOST) * config["vocab_size"] or len(shared) * 2 > len(heads)):
            of = f"{rows} of {config['vocab_size']} rows"
            yield f"medusa_heads.{head}.lm_head differs from lm_head in {of}, and equals it elsewhere"
