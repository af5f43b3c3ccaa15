"""engine.json: what the exporter says about an engine directory, and every engine reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.json_fields import read_json
from medusa_export.core.regular_files import ABSENT, found_instead
from medusa_export.heads.trees.tree import Tree

ENGINE_FILE = "engine.json"
DECODER_FILE = "decoder.onnx"
BATCH_DECODER_FILE = "decoder-batch.onnx"  # on the same weights; trees of several sequences at once
HEADS_FILE, HEADS_DATA = "heads.onnx", "heads.onnx.data"
TREE_FILE = "tree.json"
ENGINE_HELP = "Engine directory of an export, or the export itself."


@dataclass(frozen=True)
class EngineInfo:
    """``engine.json``: what a directory's engine is and which inputs it takes.

    Attributes:
        backend: "onnxruntime", "tensorrt" or "tensorrt-llm".
        form: how the weights are stored, a key of the exporter's table: "float", "fp8", "int8" ...
        precision: what the weights are and what the arithmetic is, for reports.
        max_length: tokens of prompt and answer together, the shape of the KV cache.
        max_depth: heads in the heads graph; a tree may not be deeper.
        top_k: candidates a head; a tree may not look further.
        vocab_size: rows of the embedding, the width of logits.
        eos_token_ids: tokens that end an answer, the one that ends a turn of the chat template first.
        num_tokens: ids from 0 on that the tokenizer knows, where it is fewer than ``vocab_size``: the others are never sampled and
            never drafted. 0: all.
        exact_products: products are of integers, and a single row is padded to two: a row's numbers do not depend on how many rows
            are computed at once, but for the rare step in which attention's order of sums turns a code round.
    """

    backend: str
    form: str
    precision: str
    max_length: int
    max_depth: int
    top_k: int
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    session_options: dict[str, str]
    heads_session_options: dict[str, str]
    source: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = 0
    exact_products: bool = False

    @property
    def sampled(self) -> int:
        """Width of the part of logits that tokens are chosen from."""
        return self.num_tokens or self.vocab_size

    @classmethod
    def load(cls, engine_dir: Path) -> EngineInfo:
        """Read engine.json.

        Raises:
            ConfigError: no engine directory, or one of another version.
        """
        if found_instead(engine_dir / ENGINE_FILE) == ABSENT:
            kind = found_instead(engine_dir)
            got = "no engine directory" if kind == "a directory" else kind or "a file"
            raise ConfigError(
                str(engine_dir), got, f"a directory with {ENGINE_FILE}", "pass an export, or its engine directory"
            )
        body = read_json(engine_dir / ENGINE_FILE, "what this version writes", "export again")
        names = set(cls.__dataclass_fields__)
        given = {*body, "num_tokens", "exact_products"}  # earlier exports lack these two
        if given != names:
            missing, unknown = sorted(names - given), sorted(given - names)
            more = f" and {len(missing) - 1} other keys" if len(missing) > 1 else ""
            got = f"no {missing[0]}{more}" if missing else f"the key {unknown[0]}"
            raise ConfigError(str(engine_dir / ENGINE_FILE), got, "this version's keys", "export again")
        return cls(**{**body, "eos_token_ids": tuple(body["eos_token_ids"])})

    def require_tree(self, tree: Tree) -> None:
        """Raise TreeError or ConfigError when the heads graph cannot fill the tree."""
        tree.require_heads(self.max_depth)
        if tree.max_draft_len and tree.top_k > self.top_k:
            raise ConfigError(
                "tree", f"top-{tree.top_k}", f"at most top-{self.top_k} in this engine", "export with --tree"
            )

    def require_known(self, input_ids: Sequence[int]) -> None:
        """Raise ConfigError for a prompt with a token that has no row in the embedding: some tokenizers have more than the model."""
        largest = max(input_ids, default=0)
        if largest >= self.vocab_size:
            expected = f"ids below the model's vocab_size {self.vocab_size}"
            raise ConfigError("prompt", f"the token {largest}", expected, "leave the text of that token out")

    def save(self, engine_dir: Path) -> None:
        """Write engine.json."""
        (engine_dir / ENGINE_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def find_engine(directory: Path) -> Path:
    """The engine's directory: the one that is given, or ``engine`` in it, where an export has it."""
    inside = directory / "engine"
    return inside if not (directory / ENGINE_FILE).is_file() and (inside / ENGINE_FILE).is_file() else directory


def heads_file(depth: int) -> str:
    """The graph of the first ``depth`` heads."""
    return f"heads-{depth}.onnx"
