"""The graphs of one directory: ``decoder.onnx``, ``decoder-batch.onnx`` and those of the heads, weights and operators."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from medusa_export.core.errors import CheckpointError
from medusa_export.exporter.verify.findings import Findings
from medusa_export.exporter.verify.graphs.facts import Facts
from medusa_export.exporter.verify.graphs.input_scales import input_scale_problems
from medusa_export.exporter.verify.graphs.onnx_file import OnnxFile, attributes
from medusa_export.exporter.verify.graphs.structure import operator_problems
from medusa_export.exporter.verify.graphs.weights import GraphWeight, graph_weights, placed
from medusa_export.exporter.verify.numbers import Numbers, weight_differences
from medusa_export.exporter.verify.scales_file import ScalesFile
from medusa_export.heads.contract.engine_info import BATCH_DECODER_FILE, DECODER_FILE

HEADS_GRAPH = re.compile(r"heads(-(?P<depth>\d+))?\.onnx")


@dataclass(frozen=True)
class GraphCheck:
    """What graphs are checked against.

    Attributes:
        numbers: weights by Hugging Face name; None: nothing to compare with.
        owner: whose they are, for messages: "the source's".
        scales: the recorded calibration, for the scales of activations in a graph.
    """

    facts: Facts
    numbers: Numbers | None
    owner: str
    scales: ScalesFile | None = None

    def directory(self, path: Path, name: str, findings: Findings) -> None:
        """Check all graphs that lie in a directory.

        Args:
            name: of the checks: "engine" or "onnx".
        """
        with findings.guarded(f"{name}-graph"):
            decoder = OnnxFile(path / DECODER_FILE)
            self._graph(decoder, name, findings)
            findings.say(f"{name}-graph", (f"{DECODER_FILE}: {line}" for line in self._decoder_problems(decoder)))
            batch = path / BATCH_DECODER_FILE
            if batch.is_file():
                self._beside(OnnxFile(batch), decoder, name, findings)
        with findings.guarded(f"{name}-heads"):
            self._heads(path, name, findings)

    def _decoder_problems(self, file: OnnxFile) -> Iterator[str]:
        """The last product, and outputs that have the model's sizes."""
        source = "model.embed_tokens.weight" if self.facts.tie_word_embeddings else "lm_head.weight"
        product = next((node for node in file.graph.node if node.op_type in ("MatMul", "Gemm", "FusedMatMul")
                        and _constants(file, node.input[1]) & {source, "lm_head.weight", "lm_head.weight.weight"}), None)  # fmt: skip
        if product is None:
            yield f"no product with {source} gives the logits"
        layers = {name.split(".")[2] for name in file.initializers if name.startswith("model.layers.")}
        if len(layers) != self.facts.num_hidden_layers:
            yield f"{len(layers)} layers; the model has {self.facts.num_hidden_layers}"

    def _graph(self, file: OnnxFile, name: str, findings: Findings, of: str = "model.layers") -> None:
        where = file.path.name
        findings.say(f"{name}-graph", (f"{where}: {line}" for line in operator_problems(file, self.facts, of=of)))
        if self.scales is not None:
            findings.say("scales", (f"{name}/{where}: {line}" for line in input_scale_problems(file, self.scales)))
        if self.numbers is not None:
            weights = placed(graph_weights(file), self.numbers.shape)
            lines = list(_known(weights, self.numbers))
            findings.say(
                f"{name}-weights", (f"{where}: {line}" for line in weight_differences(lines, self.numbers, self.owner))
            )
            findings.say(f"{name}-weights", (f"{where}: {line}" for line in _missing(lines, self.facts)))

    def _beside(self, file: OnnxFile, decoder: OnnxFile, name: str, findings: Findings) -> None:
        """Another graph on the same constants."""
        findings.say(f"{name}-graph", (f"{file.path.name}: {line}" for line in operator_problems(file, self.facts)))
        findings.say(f"{name}-weights", (f"{file.path.name}: {line}" for line in _other_places(file, decoder)))
        unused = {each for each in decoder.initializers if each.startswith("model.")} - file.initializers.keys()
        findings.say(f"{name}-weights", (f"{file.path.name}: nothing reads {each}" for each in sorted(unused)))

    def _heads(self, path: Path, name: str, findings: Findings) -> None:
        found = {file.name: HEADS_GRAPH.fullmatch(file.name) for file in sorted(path.glob("heads*.onnx"))}
        files = {int(match["depth"] or 0): OnnxFile(path / file) for file, match in found.items() if match}
        if not files:
            return
        largest = files[max(files)]
        heads = self.facts.num_medusa_heads
        expected = [0] if 0 in files else list(range(1, heads + 1))
        findings.say(
            f"{name}-heads",
            [] if sorted(files) == expected else [f"graphs of the depths {sorted(files)}, heads are {heads}"],
        )
        for file in files.values():
            findings.say(f"{name}-heads", (f"{file.path.name}: {line}" for line in _heads_problems(file, self.facts)))
            findings.say(f"{name}-heads", (f"{file.path.name}: {line}" for line in _other_places(file, largest)))
        if self.numbers is not None:
            tokens = largest.value("draft_vocab") if "draft_vocab" in largest.initializers else None
            weights = list(graph_weights(largest, tokens))
            lines = weight_differences(list(_known(iter(weights), self.numbers)), self.numbers, self.owner)
            findings.say(f"{name}-weights", (f"{largest.path.name}: {line}" for line in lines))
            blocks = {weight.name for weight in weights}
            wanted = (f"medusa_heads.{head}.0.linear.weight" for head in range(heads))
            findings.say(
                f"{name}-weights", (f"{largest.path.name}: no {each}" for each in wanted if each not in blocks)
            )


def _constants(file: OnnxFile, value: str) -> set[str]:
    """The constants behind a value, through operators of one meaning."""
    if value in file.initializers:
        return {value}
    node = file.producers.get(value)
    if node is None or node.op_type not in ("Cast", "Transpose", "DequantizeLinear"):
        return set()
    return _constants(file, node.input[0])


def _known(weights: Iterator[GraphWeight], numbers: Numbers) -> Iterator[GraphWeight]:
    """The constants that have a name in the model; scales and shapes are constants too."""
    for weight in weights:
        if weight.name in numbers or weight.name.startswith(("model.", "lm_head", "medusa_heads.")):
            yield weight


def _missing(weights: list[GraphWeight], facts: Facts) -> Iterator[str]:
    """Products of the decoder that no constant is there for."""
    have = {weight.name for weight in weights}
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
               "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
    names = [f"model.layers.{layer}.{linear}.weight" for layer in range(facts.num_hidden_layers) for linear in linears]
    yield from (f"nothing multiplies with {name}" for name in [*names, "model.norm.weight"] if name not in have)


def _other_places(file: OnnxFile, other: OnnxFile) -> Iterator[str]:
    """Constants that both have, and that are not the same bytes."""
    for name, proto in file.initializers.items():
        theirs = other.initializers.get(name)
        if theirs is None:
            if proto.external_data:
                yield f"{name} is not in {other.path.name}"
        elif (proto.data_type, list(proto.dims)) != (theirs.data_type, list(theirs.dims)):
            yield f"{name} differs from that in {other.path.name}"
        elif file.external(name) != other.external(name) or proto.raw_data != theirs.raw_data:
            yield f"{name} is read from different bytes than in {other.path.name}"
        elif _readings(file, name) != _readings(other, name):
            yield f"{name} is dequantized differently than in {other.path.name}"


def _readings(file: OnnxFile, name: str) -> set[str]:
    """The operators that give a constant its meaning, with their attributes."""
    meanings = ("DequantizeLinear", "Cast", "Transpose")
    nodes = [node for node in file.consumers(name) if node.op_type in meanings]
    return {f"{node.op_type} {sorted(attributes(node).items())}" for node in nodes}


def _heads_problems(file: OnnxFile, facts: Facts) -> Iterator[str]:
    yield from operator_problems(file, facts, of="medusa_heads")
    (output,) = file.shapes(file.graph.output).values()
    match = HEADS_GRAPH.fullmatch(file.path.name)
    depth = int((match and match["depth"]) or facts.num_medusa_heads)
    position = {name: index for index, node in enumerate(file.graph.node) for name in node.output}
    for node in file.graph.node:
        if node.op_type == "Concat" and (places := [position.get(name, -1) for name in node.input]) != sorted(places):
            yield f"{node.name} has the heads out of order"
    if output[-2] != depth:
        yield f"it drafts for {output[-2]} heads; expected {depth}"
    for node in file.graph.node:
        if node.op_type == "TopK" and file.value(node.input[1]).flatten().tolist() != [output[-1]]:
            yield f"{node.name} takes the best {file.value(node.input[1]).flatten().tolist()}; the output has {output[-1]}"
    if "draft_vocab" in file.initializers:
        tokens = file.value("draft_vocab")
        if bool(((tokens < 0) | (tokens >= facts.vocab_size)).any()) or len(torch.unique(tokens)) != len(tokens):
            raise CheckpointError(
                f"{file.path}: draft_vocab", "ids twice or outside of the vocabulary", "each once", "export again"
            )
