"""Whether the operators of a graph are the model's: their attributes, their order, and that all layers are wired alike."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from onnx import NodeProto

from medusa_export.exporter.verify.graphs.facts import Facts
from medusa_export.exporter.verify.graphs.onnx_file import OnnxFile, attributes

LAYER = re.compile(
    r"(?P<kind>model\.layers|medusa_heads|past_key_values|present|attention)\.(?P<number>\d+)(?P<rest>.*)"
)
ROTARY_TOLERANCE = {
    torch.float32: 2e-3,
    torch.float16: 3e-3,
    torch.bfloat16: 1e-2,
}  # float32 angles of thousands of radians
Signature = tuple[Any, ...]


def operator_problems(file: OnnxFile, facts: Facts, *, of: str = "model.layers") -> list[str]:
    """Attributes that do not follow from the model, and layers that differ from each other.

    Args:
        file: the graph.
        facts: of the model.
        of: prefix of the layers' names.
    """
    return [
        *_attribute_problems(file, facts),
        *_int_problems(file),
        *_factor_problems(file),
        *_rotary_problems(file, facts),
        *_layer_problems(file, of),
    ]


def _expected(facts: Facts) -> dict[str, dict[str, Any]]:
    """Operator -> attributes that it has to have."""
    scale = 1 / math.sqrt(facts.head_dim)
    norm = {"epsilon": facts.rms_norm_eps}
    heads = {"num_heads": facts.num_attention_heads, "kv_num_heads": facts.num_key_value_heads}
    return {
        "SimplifiedLayerNormalization": {**norm, "axis": -1},
        "SkipSimplifiedLayerNormalization": norm,
        "RMSNormalization": {**norm, "axis": -1},
        "GroupQueryAttention": {**heads, "do_rotary": 1, "rotary_interleaved": 0, "scale": scale},
        "Attention": {"is_causal": 0, "scale": scale},
        "QuickGelu": {"alpha": 1.0},
        "ArgMax": {"axis": -1, "keepdims": 0},
    }


def _attribute_problems(file: OnnxFile, facts: Facts) -> Iterator[str]:
    expected = _expected(facts)
    for node in file.graph.node:
        given = attributes(node)
        for name, value in expected.get(node.op_type, {}).items():
            if name not in given or not math.isclose(float(given[name]), float(value), rel_tol=1e-5, abs_tol=1e-12):
                yield f"{node.op_type} {node.name}: {name} is {given.get(name)}; the model's is {value:.6g}"


def _int_problems(file: OnnxFile) -> Iterator[str]:
    """Shape constants carry their values in their names."""
    for name in file.initializers:
        parts = name.split("_")
        if parts[0] == "int64" and file.value(name).flatten().tolist() != [int(part) for part in parts[1:]]:
            yield f"{name} holds {file.value(name).flatten().tolist()}"


def _factor_problems(file: OnnxFile) -> Iterator[str]:
    """Factors of outputs that have none, and the scale of rows that were divided by their largest value."""
    for name in file.initializers:
        if "+1.output_factor" in name and not bool((file.value(name).chunk(2)[0] == 1).all()):
            yield f"{name} changes the outputs of gate_proj"
    if "unit_scale" in file.initializers and not math.isclose(float(file.value("unit_scale")), 1 / 127, rel_tol=1e-6):
        yield f"unit_scale is {float(file.value('unit_scale')):.6g}; expected 1/127"
    if "smallest" in file.initializers and not 0 < float(file.value("smallest")) < 1e-6:
        yield f"smallest is {float(file.value('smallest')):.6g}; expected a value next to 0"


def _rotary_problems(file: OnnxFile, facts: Facts) -> Iterator[str]:
    if "cos_cache" not in file.initializers:
        return
    expected = facts.rotary(file.constant("cos_cache").shape[0])
    for name, values in zip(("cos_cache", "sin_cache"), expected or (None, None), strict=True):
        stored = file.value(name)
        if values is None:
            if not bool(torch.isfinite(stored.float()).all()) or float(stored.float().abs().max()) > 2:
                yield f"{name} holds no sines or cosines"
        elif stored.shape != values.shape:
            yield f"{name} is {list(stored.shape)}; the model's head_dim gives {list(values.shape)}"
        elif not float((stored.double() - values).abs().max()) <= ROTARY_TOLERANCE[stored.dtype]:  # NaN too
            yield f"{name} is up to {float((stored.double() - values).abs().max()):.3g} off: another rotary base or scaling"


def _layer_problems(file: OnnxFile, of: str) -> Iterator[str]:
    """Every layer's operators, seen from its first one, have to be those of the first layer."""
    starts = _starts(file, of)
    numbers = sorted(starts)
    if numbers != list(range(len(numbers))) or [starts[n] for n in numbers] != sorted(starts.values()):
        yield f"the {of} are used in the order {sorted(starts, key=lambda number: starts[number])}"
        return
    if len(numbers) < 2:
        return
    layers = [_signatures(file, starts, number) for number in numbers]
    usual = Counter(tuple(signatures) for signatures in layers[1:]).most_common(1)[0][0]
    for number, signatures in enumerate(layers):
        pairs = enumerate(zip(signatures, usual, strict=False))
        at = next((index for index, pair in pairs if not _alike(*pair, is_first=number == 0)), None)
        if at is None and number < len(layers) - 1 and len(signatures) != len(usual) and len(layers) > 2:
            at = len(usual)
        if at is not None:
            yield f"{of}.{number} is wired differently from the others: its operator {at + 1} differs"


def _starts(file: OnnxFile, of: str) -> dict[int, int]:
    """Layer -> index of its first product with constants of its own."""
    starts: dict[int, int] = {}
    for index, node in enumerate(file.graph.node):
        for number in _numbers(file, node, of):
            starts.setdefault(number, index)
    return starts


def _numbers(file: OnnxFile, node: NodeProto, of: str) -> Iterator[int]:
    """Layers whose constants a node reads; norms aside, which are the end of the layer before."""
    for name in node.input:
        match = LAYER.fullmatch(name)
        if match and match["kind"] == of and name in file.initializers and not _is_of_norm(file, node):
            yield int(match["number"])


def _is_of_norm(file: OnnxFile, node: NodeProto) -> bool:
    """A norm, or the product of its weight with smoothing factors."""
    return "Norm" in node.op_type or (node.op_type == "Mul" and all(name in file.initializers for name in node.input))


def _signatures(file: OnnxFile, starts: dict[int, int], layer: int) -> list[Signature]:
    """A layer's operators, up to the next one's first; of the last layer, up to its last product."""
    nodes, first = file.graph.node, starts[layer]
    period = starts[1] - starts[0]
    own = [index for index, node in enumerate(nodes) if layer in _numbers(file, node, _kind_of(file, starts))]
    end = starts.get(layer + 1, max(index for index in own if index < first + period) + 1)
    positions = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    return [_signature(file, nodes[index], index, layer, first, starts[0], positions) for index in range(first, end)]


def _kind_of(file: OnnxFile, starts: dict[int, int]) -> str:
    names = file.graph.node[starts[0]].input
    return next(match["kind"] for name in names if name in file.initializers and (match := LAYER.fullmatch(name)))


def _signature(
    file: OnnxFile, node: NodeProto, index: int, layer: int, first: int, prologue: int, positions: dict[str, int]
) -> Signature:
    """An operator without its place: what it is, and where its inputs come from, counted from here."""
    inputs: list[Any] = []
    for name in node.input:
        at = positions.get(name)
        if at is None:
            inputs.append(_relative(name, layer))
        elif at < prologue:
            inputs.append(("shared", at))
        else:
            inputs.append(index - at if at >= first else ("before", first - at))
    given = str(sorted(attributes(node).items()))
    return (node.op_type, node.domain, given, tuple(inputs), tuple(map(bool, node.output)))


def _alike(one: Signature, usual: Signature, *, is_first: bool) -> bool:
    """The first layer has before it what the others have of a layer."""
    if not is_first:
        return one == usual
    inputs = zip(one[3], usual[3], strict=False)
    same = all(a == b or (_is(a, "shared") and _is(b, "before")) for a, b in inputs)
    return one[:3] == usual[:3] and len(one[3]) == len(usual[3]) and same


def _is(place: Any, kind: str) -> bool:
    return isinstance(place, tuple) and place[0] == kind


def _relative(name: str, layer: int) -> str:
    """A constant's or an input's name, counted from the layer."""
    if name == "model.norm.weight":  # what follows the last layer is not the next one's norm
        return "model.layers.+1.input_layernorm.weight"
    match = LAYER.fullmatch(name)
    return f"{match['kind']}.{int(match['number']) - layer:+d}{match['rest']}" if match else name
