"""The comparison with the checkpoint: exact for a float engine, and by hand for a stand-in that says what it is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.core.errors import CheckpointError
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.verify.reference import compare_with_checkpoint
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference

TEXTS = [([1, 20, 7], [7, 11, 12, 23, 3]), ([9], [40, 41]), ([1, 2, 3, 4], [60])]
POSITIONS = 8


class ModelScorer:
    """A stand-in for an engine: transformers' logits, changed by a function."""

    def __init__(self, model_dir: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.model: Any = load_reference(model_dir, torch.float32)
        self.change = change

    def score(self, input_ids: Sequence[int], *, chunk: int, start: int = 0) -> Iterator[npt.NDArray[np.float32]]:
        with torch.no_grad():
            logits = self.model(torch.tensor([list(input_ids)])).logits[0, start:]
        yield from (block.numpy() for block in self.change(logits).split(chunk))


@pytest.fixture
def model_dir(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(tmp_path / "model")


def test_a_float_engine_is_the_checkpoint(tiny_engine: Callable[..., Any]) -> None:
    made = tiny_engine("qwen2")
    done: list[None] = []
    found = compare_with_checkpoint(
        OnnxRuntimeEngine(made.path), made.model_dir, TEXTS, progress=lambda: done.append(None)
    )
    assert (found["positions"], found["greedy_agreement"], len(done)) == (POSITIONS, 1.0, len(TEXTS))
    assert abs(found["kl_mean"]) <= abs(found["kl_max"]) < 1e-5
    assert found["logit_max_abs_diff"] < 1e-3
    assert found["perplexity"]["engine"] == pytest.approx(found["perplexity"]["checkpoint"], rel=1e-4)


def test_numbers_of_a_uniform_engine(model_dir: Path) -> None:
    scorer = ModelScorer(model_dir, torch.zeros_like)
    found = compare_with_checkpoint(scorer, model_dir, TEXTS)
    assert found["perplexity"]["engine"] == pytest.approx(97, rel=1e-5)
    kl, nll = [], []
    for prompt, answer in TEXTS:
        with torch.no_grad():
            logits = scorer.model(torch.tensor([[*prompt, *answer]])).logits[0]
        for at, token in enumerate(answer, start=len(prompt) - 1):  # what comes before a token predicts it
            log = logits[at].log_softmax(-1)
            kl.append(math.log(97) + float((log.exp() * log).sum()))
            nll.append(-float(log[token]))
    assert len(kl) == found["positions"] == POSITIONS
    assert found["kl_mean"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert found["kl_max"] == pytest.approx(max(kl), rel=1e-4)
    assert found["perplexity"]["checkpoint"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)


def test_a_constant_added_to_all_logits_changes_no_prediction(model_dir: Path) -> None:
    found = compare_with_checkpoint(ModelScorer(model_dir, lambda logits: logits + 3), model_dir, TEXTS)
    assert found["greedy_agreement"] == 1.0
    assert abs(found["kl_max"]) < 1e-5
    assert found["logit_max_abs_diff"] == pytest.approx(3, rel=1e-4)


def test_another_best_token_counts(model_dir: Path) -> None:
    def spoil_first(logits: torch.Tensor) -> torch.Tensor:
        logits[0, int(logits[0].argmin())] += 100
        return logits

    found = compare_with_checkpoint(ModelScorer(model_dir, spoil_first), model_dir, TEXTS)
    assert found["greedy_agreement"] == pytest.approx(1 - len(TEXTS) / POSITIONS)
    assert found["kl_max"] > 10


def test_nan_is_not_agreement(model_dir: Path) -> None:
    found = compare_with_checkpoint(ModelScorer(model_dir, lambda logits: logits * float("nan")), model_dir, TEXTS)
    assert math.isnan(found["kl_mean"])


def test_continuations_are_rated_by_the_checkpoint(model_dir: Path) -> None:
    """The mean log-likelihood of each, behind the text up to where they part."""
    scorer = ModelScorer(model_dir, torch.zeros_like)
    start, first, second = [1, 20, 7], [7, 11], [12, 23, 3]
    found = compare_with_checkpoint(scorer, model_dir, TEXTS, parted=[(start, first, second), (start, first, first)])

    def likelihood(answer: list[int]) -> float:
        with torch.no_grad():
            logits = scorer.model(torch.tensor([[*start, *answer]])).logits[0].log_softmax(-1)
        return sum(float(logits[len(start) - 1 + place, token]) for place, token in enumerate(answer)) / len(answer)

    assert found["parted"] == pytest.approx([likelihood(second) - likelihood(first), 0], abs=1e-5)


@pytest.mark.parametrize("weight", [3e38, float("nan")], ids=["it overflows", "it is damaged"])
def test_a_checkpoint_that_does_not_compute_is_refused_as_such(weight: float, model_dir: Path) -> None:
    """Or an export of it would look like a fault of the exporter."""
    path = model_dir / "model.safetensors"
    tensors = {name: tensor.to(torch.float32) for name, tensor in load_file(path).items()}
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(weight)
    save_file(tensors, path, {"format": "pt"})
    scorer = ModelScorer(model_dir, torch.zeros_like)
    with pytest.raises(CheckpointError, match=r"model: got logits that are not finite, .*check its weights"):
        compare_with_checkpoint(scorer, model_dir, TEXTS)
