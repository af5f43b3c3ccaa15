"""engine.json against the graphs, the model, and what the manifest says; tree.json and the tokenizer beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx import TensorProto

from medusa_export.core.artifacts.hashing import sha256
from medusa_export.core.errors import ConfigError
from medusa_export.core.hub import HEAD_FILES
from medusa_export.core.text.model_tokens import ModelTokens
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.exporter.verify.findings import Findings, own_words
from medusa_export.exporter.verify.graphs.facts import Facts
from medusa_export.exporter.verify.graphs.onnx_file import OnnxFile
from medusa_export.exporter.verify.parts.source import Source
from medusa_export.exporter.verify.parts.tokenizers import tokenizer_problems
from medusa_export.exporter.verify.parts.trees import acceptance_problems, expected_tree, tree_problems
from medusa_export.heads.contract.engine_info import DECODER_FILE, TREE_FILE, EngineInfo
from medusa_export.heads.trees.acceptance import ACCEPTANCE_FILE
from medusa_export.heads.trees.followers import FOLLOWERS_FILE, Followers
from medusa_export.heads.trees.tree import load_tree

BLOCKS, FOLDED = {"session.qdq_matmulnbits_accuracy_level": "4"}, {"session.disable_quant_qdq": "1"}
EXACT_PRODUCTS = {"session.x64quantprecision": "1"}
# Form -> ONNX type of its weights, and what ONNX Runtime is told; None: any.
FORMS: dict[str, tuple[int | None, dict[str, str]]] = {
    "float": (None, {}),
    "fp8": (TensorProto.FLOAT8E4M3FN, FOLDED),
    "fp8_row": (TensorProto.FLOAT8E4M3FN, FOLDED),
    "int8_row": (TensorProto.INT8, EXACT_PRODUCTS),
    "int8": (TensorProto.UINT8, BLOCKS),
    "int4": (TensorProto.UINT4, BLOCKS),
    "int4_awq": (TensorProto.UINT4, BLOCKS),
}
WEIGHTS = (".safetensors", ".bin", ".index.json")
DEFAULT_TREES = {"onnxruntime": "cpu-3", "tensorrt": "medusa-63", "tensorrt-llm": "medusa-63"}


@dataclass(frozen=True)
class EngineFiles:
    """What the files of an engine directory have to agree with.

    Attributes:
        facts: the model's numbers; None: unknown, as beside a Triton repository whose source is away.
        source: None where it is away.
        arguments: of the export; empty where there is no record.
        tokenizer: another copy in the same export, if there is one.
        inputs: the hashes that the manifest records, by role and file.
    """

    facts: Facts | None
    source: Source | None
    arguments: dict[str, Any]
    tokenizer: Path | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)

    def check(self, path: Path, findings: Findings) -> None:
        """Say what is wrong with a directory."""
        with findings.guarded("engine-info"):
            info = EngineInfo.load(path)
            findings.say("engine-info", self._info_problems(path, info))
            with findings.guarded("tree"):
                findings.say("tree", tree_problems(path / TREE_FILE, heads=info.max_depth, top_k=info.top_k))
                findings.say("tree", self._other_tree(path, info))
                if (path / ACCEPTANCE_FILE).is_file():
                    findings.say("tree", acceptance_problems(path / ACCEPTANCE_FILE))
                findings.say("tree", self._followers_problems(path / FOLLOWERS_FILE, info.vocab_size))
            with findings.guarded("tokenizer"):
                other = self.source.ckpt if self.source else self.tokenizer
                whose = "the source's" if self.source else "that in tokenizer/"
                own = self.source is not None and (not self.arguments or bool(self.arguments.get("chat_template")))
                problems = tokenizer_problems(path, info.vocab_size, other, whose, own_template=own)
                findings.say("tokenizer", problems)

    def _base_hash(self) -> str:
        """One hash of the base model's config and weights, from those in the manifest."""
        files = {name.removeprefix("ckpt/"): digest for name, digest in self.inputs.items() if name.startswith("ckpt/")}
        for name in HEAD_FILES:  # of a checkpoint that has its heads beside it
            files.pop(name, None)
        mine = {n: d for n, d in files.items() if n == "config.json" or n.endswith(WEIGHTS)}
        return hashlib.sha256("".join(f"{d}  {n}\n" for n, d in sorted(mine.items())).encode()).hexdigest()

    def _other_tree(self, path: Path, info: EngineInfo) -> Iterator[str]:
        if not self.arguments or info.backend not in DEFAULT_TREES:
            return
        expected = expected_tree(self.arguments, DEFAULT_TREES[info.backend], info.max_depth)
        if expected is not None and load_tree(str(path / TREE_FILE)) != expected:
            yield f"engine/{TREE_FILE} is not the tree that the manifest's arguments give"

    def _followers_problems(self, path: Path, vocab_size: int) -> Iterator[str]:
        """Whether the table is a sound one, and that of the heads."""
        digest = sha256(path) if path.is_file() else None
        if digest:
            try:
                Followers.load(path, vocab_size)
            except ConfigError as error:
                yield f"{path.name}: {own_words(error)}"
        recorded = self.inputs.get(f"heads/{path.name}") if self.inputs else self._followers_of_source()
        if digest != recorded and (self.inputs or (digest and recorded)):
            yield f"engine/{path.name} is not that of the heads"

    def _followers_of_source(self) -> str | None:
        heads = self.source.checkpoint.heads.source.files[:1] if self.source else ()
        found = [file.parent / FOLLOWERS_FILE for file in heads]
        return sha256(found[0]) if found and found[0].is_file() else None

    def _info_problems(self, path: Path, info: EngineInfo) -> Iterator[str]:
        for name, value in self._model_values(path).items():
            if getattr(info, name) != value:
                yield f"engine.json: {name} is {getattr(info, name)}; the model's is {value}"
        if self.arguments:
            said = {"checkpoint": str(self.arguments.get("ckpt")), "quant": self.arguments.get("quant")}
            for key, value in said.items():
                if info.source.get(key) != value:
                    yield f"engine.json: source.{key} is {info.source.get(key)!r}; the manifest says {value!r}"
            if info.source.get("sha256", self._base_hash()) != self._base_hash():
                yield "engine.json: source.sha256 is not that of the inputs in the manifest: the engine is another export's"
            if info.backend != self.arguments.get("engine"):
                yield f"engine.json: backend {info.backend!r}; the manifest says {self.arguments.get('engine')!r}"
            length = self.arguments.get("max_length")
            if length is not None and info.max_length != length:
                yield f"engine.json: max_length {info.max_length}; the manifest says {length}"
        for check in GRAPH_CHECKS.get(info.backend, ()):
            yield from check(path, info)

    def _model_values(self, path: Path) -> dict[str, Any]:
        """Fields of engine.json that the model decides."""
        if self.facts is None:
            return {}
        values: dict[str, Any] = {
            name: getattr(self.facts, name)
            for name in ("num_hidden_layers", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size")
        }
        values["max_depth"] = self.facts.num_medusa_heads
        if self.source is not None:
            config = self.source.checkpoint.config
            tokens = ModelTokens.of(read_tokenizer(path), config.eos_token_ids, vocab_size=config.vocab_size)
            values |= {"eos_token_ids": tokens.ends, "sampled": tokens.count}  # num_tokens 0: all
        return values


def _graph_problems(path: Path, info: EngineInfo) -> Iterator[str]:
    """Sizes that the graphs declare, and the form of their weights."""
    file = OnnxFile(path / DECODER_FILE)
    inputs, outputs = file.shapes(file.graph.input), file.shapes(file.graph.output)
    caches = {name: shape[1:] for name, shape in inputs.items() if name.startswith("past_key_values.")}
    wanted = [info.num_key_value_heads, info.max_length, info.head_dim]
    if len(caches) != 2 * info.num_hidden_layers or any(shape != wanted for shape in caches.values()):
        found = next((shape for shape in caches.values() if shape != wanted), wanted)
        yield f"engine.json: {info.num_hidden_layers} layers with caches {wanted}; the graph has {len(caches) // 2} with {found}"
    sizes = {"hidden_states": info.hidden_size, "logits": info.vocab_size}
    for name, size in sizes.items():
        if outputs.get(name, [0])[-1] != size:
            yield f"engine.json: {name} of {size}; the graph gives {outputs.get(name, [0])[-1]}"
    for depth in range(1, info.max_depth + 1):
        heads = OnnxFile(path / f"heads-{depth}.onnx")
        (shape,) = heads.shapes(heads.graph.output).values()
        if shape[1:] != [depth, info.top_k]:
            yield f"engine.json: top_k {info.top_k}; heads-{depth}.onnx gives {shape[1:]}"
    if info.form not in FORMS:
        yield f"engine.json: form {info.form!r} is not one that ONNX Runtime runs"
        return
    kind, options = FORMS[info.form]
    kinds = {
        proto.data_type
        for name, proto in file.initializers.items()
        if name.endswith("_proj.weight") or "_proj+" in name
    }
    if kind is not None and kind not in kinds:
        yield f"engine.json: form {info.form!r}; the graph stores its weights in another form"
    if info.session_options != options or (info.max_depth and info.heads_session_options != BLOCKS):
        yield f"engine.json: session options that are not those of the form {info.form!r}; export again"
    if info.exact_products != (options == EXACT_PRODUCTS):
        yield f"engine.json: exact_products {info.exact_products} for the form {info.form!r}"
    with_bits = {"fp8": "FP8", "fp8_row": "FP8", "int8": "int8", "int8_row": "INT8", "int4": "int4", "int4_awq": "INT4"}
    if with_bits.get(info.form, "float32") not in info.precision:
        yield f"engine.json: precision {info.precision!r} for the form {info.form!r}"


# Backends whose graphs lie in the engine directory as they are run.
GRAPH_CHECKS: Mapping[str, tuple[Callable[[Path, EngineInfo], Iterator[str]], ...]] = {
    "onnxruntime": (_graph_problems,)
}
