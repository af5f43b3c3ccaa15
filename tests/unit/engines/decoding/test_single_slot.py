"""Requests one after another on engines of single steps; TensorRT's on a stand-in for the device (OnnxDevice): no GPU was at hand."""

from __future__ import annotations

import queue
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.encoding import encode_chat
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.engines.decoding.single_slot import OneSequence
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.serving.text_service import Piece, TextRequest, TextService
from medusa_export.engines.serving.triton.repository import verify_repository, write_repository
from medusa_export.engines.tensorrt.emulation.onnx_device import OnnxDevice
from medusa_export.engines.tensorrt.engine import TensorRtEngine
from medusa_export.heads.decoding.sampling import Sampler, Sampling
from medusa_export.heads.trees.tree import Tree

SECONDS = 60
QUESTIONS = ["w3 w4 w5", "w9 w8", "w20", "w7 w7 w7 w1"]


@pytest.fixture
def tensorrt(
    portable: Callable[..., Any], tiny_tokenizer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, TensorRtEngine]:
    """An engine directory for TensorRT, and the engine that a server of it opens, both on a stand-in for the device."""
    written = portable()
    tiny_tokenizer(written.engine_dir)
    device = OnnxDevice(written.onnx_dir)
    monkeypatch.setattr("medusa_export.engines.tensorrt.engine.CudaDevice", lambda _: device)
    return written.engine_dir, TensorRtEngine(written.engine_dir)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_server_answers_as_the_engine_alone(tensorrt: tuple[Path, TensorRtEngine], temperature: float) -> None:
    """All are asked at once; the tree is used, and one request has been given up."""
    path, engine = tensorrt
    service = TextService(path, ServingOptions(max_tokens=20))
    service.scheduler.eos_token_ids = set()  # so that answers have the length that is asked for
    assert service.scheduler.decoder.slots == 1
    answers: dict[str, queue.Queue[Piece]] = {text: queue.Queue() for text in QUESTIONS}
    tickets = []
    for seed, text in enumerate(QUESTIONS):
        sampling = Sampling(temperature, max_tokens=20, seed=seed)
        request = TextRequest([{"role": "user", "content": text}], sampling=sampling)
        tickets.append(service.submit(request, answers[text].put))
    tickets[2].cancel()
    yields = []
    for seed, text in enumerate(QUESTIONS):
        pieces = [answers[text].get(timeout=SECONDS)]
        while (end := pieces[-1].end) is None:
            pieces.append(answers[text].get(timeout=SECONDS))
        tokens = [token for piece in pieces for token in piece.token_ids]
        ids = encode_chat(service.tokenizer, [{"role": "user", "content": text}])
        sampler = Sampler(temperature, seed) if temperature else None
        expected = generate(
            engine, ids, AUTOREGRESSIVE, max_new_tokens=20, eos_token_ids=(), sampler=sampler
        ).tokens  # fmt: skip
        assert tokens == expected[: len(tokens)]
        assert (end.reason == "cancelled") == (text == QUESTIONS[2])
        assert len(tokens) == 20 or end.reason == "cancelled"
        yields.append(end.tokens_per_step)
    service.close()
    assert max(yields) > 1, "the tree was never used"


def test_a_tree_that_is_too_large(tensorrt: tuple[Path, TensorRtEngine], tmp_path: Path) -> None:
    path, engine = tensorrt
    tree = tmp_path / "tree.json"
    depth, width = engine.info.max_depth, engine.info.top_k
    choices = [list(ranks) for size in range(1, depth + 1) for ranks in product(range(width), repeat=size)]
    tree.write_text(Tree.from_choices(choices[: engine.max_nodes]).to_json())  # and the root
    with pytest.raises(ConfigError, match=f"{engine.max_nodes + 1} nodes"):
        TextService(path, ServingOptions(), tree=tree)


def test_a_repository_of_a_tensorrt_engine(tensorrt: tuple[Path, TensorRtEngine], tmp_path: Path) -> None:
    path, _ = tensorrt
    write_repository(path, tmp_path / "repository")
    assert verify_repository(tmp_path / "repository") == []
    readme = (tmp_path / "repository/README.md").read_text()
    assert "torch for CUDA" in readme
    assert "one request after another" in readme
    with pytest.raises(ConfigError, match="--max-batch: got 8 for an engine of tensorrt"):
        write_repository(path, tmp_path / "other", options=ServingOptions(max_batch=8))
    assert not (tmp_path / "other").exists()


def test_prompts_in_parts(tiny_engine: Callable[..., Any]) -> None:
    """The last part gives the logits; a prompt that is dropped leaves nothing behind."""
    engine = OnnxRuntimeEngine(tiny_engine().path)
    decoder, expected = OneSequence(engine), engine.prefill_logits([5, 6, 7, 8]).copy()
    decoder.begin([9, 9, 9])
    assert decoder.prefill_chunk(2) is None
    decoder.drop()
    decoder.begin([5, 6, 7, 8])
    assert [decoder.prefill_chunk(2), decoder.active] == [None, 0]
    logits = decoder.prefill_chunk(2)
    assert logits is not None
    np.testing.assert_array_equal(logits, expected)
    assert (decoder.active, decoder.remaining(0)) == (1, engine.info.max_length - 4)
    with pytest.raises(ConfigError, match="has not ended"):
        decoder.begin([1])
    decoder.release(0)
    for ids in ([], [1] * engine.info.max_length):
        with pytest.raises(ConfigError, match=f"{len(ids)} tokens"):
            decoder.begin(ids)
