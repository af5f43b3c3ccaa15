"""decoder-batch.onnx against transformers, in a plain ONNX Runtime session: sequences of different lengths, each node on its path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from medusa_export.exporter.onnx.batch_decoder import write_batch_decoder
from medusa_export.exporter.onnx.decoder import write_decoder
from medusa_export.exporter.onnx.linear import LinearWriter
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.contract.engine_info import BATCH_DECODER_FILE, DECODER_FILE
from medusa_export.heads.trees.tree import Tree

TEXTS = [[1, 40, 7, 7, 61, 12, 90, 3], [55, 28, 9]]
TREE = Tree.from_choices([[0], [1], [0, 0], [1, 0]])
NODE_IDS = np.array([[5, 10, 20, 30, 31], [6, 11, 21, 31, 32]])
CAPACITY = 11  # more rows than any sequence has
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "no groups": ("mistral", {"num_key_value_heads": 4}),
    "one kv head": ("llama", {"num_key_value_heads": 1}),
}


@pytest.fixture
def written(make_case: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def make(family: str, **config: Any) -> Any:
        case = make_case(family, dtype=torch.float32, **config)
        write_decoder(tmp_path, case.checkpoint, LinearWriter(case.checkpoint, "float"), max_length=64)
        write_batch_decoder(tmp_path, case.checkpoint.config)
        return case

    return make


def run(session: Any, config: Any, past: np.ndarray, lengths: Any, ids: np.ndarray, tree: Tree | None) -> Any:
    """Logits [B, S, V] and the new rows [2 * layers, B, K, S, D]."""
    batch, size = ids.shape
    capacity = past.shape[3]
    bias = np.full((batch, 1, size, capacity + size), -1e30, dtype=np.float32)
    for row, length in enumerate(lengths):
        bias[row, :, :, :length] = 0
    bias[..., capacity:] = np.where(np.tri(size, dtype=bool) if tree is None else tree.mask, 0, -1e30)
    depths = np.arange(size) if tree is None else tree.depths
    feeds = {
        "input_ids": ids, "position_ids": np.array(lengths)[:, None] + depths, "attention_bias": bias,
        "output_rows": np.arange(batch * size),
    }  # fmt: skip
    names = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    feeds |= {f"past_key_values.{name}": cache for name, cache in zip(names, past, strict=True)}
    logits, *rows = session.run(["logits", *(f"present.{name}" for name in names)], feeds)
    return logits.reshape(batch, size, -1), np.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sequences_of_different_lengths(
    variant: str, written: Callable[..., Any], open_session: Callable[..., Any], tmp_path: Path
) -> None:
    family, options = VARIANTS[variant]
    case = written(family, **options)
    config, session = case.checkpoint.config, open_session(tmp_path / BATCH_DECODER_FILE)
    model: Any = load_reference(case.model_dir, torch.float32)

    def expected(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()  # [S, V]

    shape = (2 * config.num_hidden_layers, len(TEXTS), config.num_key_value_heads, CAPACITY, config.head_dim)
    past = np.full(shape, 1e3, dtype=np.float32)  # rows that nobody has must not matter
    for row, text in enumerate(TEXTS):
        logits, new = run(session, config, past[:, row : row + 1, :, :0], [0], np.array([text]), None)
        np.testing.assert_allclose(logits[0], expected(text), atol=1e-3, rtol=0)
        past[:, row, :, : len(text)] = new[:, 0]
    logits, _ = run(session, config, past, [len(text) for text in TEXTS], NODE_IDS, TREE)
    for row, text in enumerate(TEXTS):
        for path in TREE.retrieve_indices:
            nodes = path[path >= 0]
            alone = expected([*text, *NODE_IDS[row, nodes].tolist()])[len(text) :]
            np.testing.assert_allclose(logits[row, nodes], alone, atol=1e-3, rtol=0)


def test_it_stands_on_the_decoder_s_data(written: Callable[..., Any], tmp_path: Path) -> None:
    written("llama")
    before = {path.name for path in tmp_path.glob("decoder*")}
    assert before == {DECODER_FILE, f"{DECODER_FILE}.data", BATCH_DECODER_FILE}
    graphs = [onnx.load(tmp_path / name, load_external_data=False).graph for name in (DECODER_FILE, BATCH_DECODER_FILE)]
    places = [
        {
            tensor.name: [item.value for item in tensor.external_data]
            for tensor in graph.initializer
            if tensor.external_data
        }
        for graph in graphs
    ]
    assert places[0] == places[1]
    assert places[0]
    assert all(node.op_type != "GroupQueryAttention" for node in graphs[1].node)
