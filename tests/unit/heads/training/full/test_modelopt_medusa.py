"""ModelOpt's Medusa form and the loss, against explicit loops over positions; and ModelOpt's own traps, pinned."""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from medusa_export.core.errors import ConfigError, MissingPackageError
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference
from medusa_export.heads.training.full import modelopt_medusa as medusa_model
from medusa_export.heads.training.full.modelopt_medusa import (
    base_logits,
    convert,
    head_parameters,
    head_targets,
    load_heads,
    medusa_loss,
    own_head_parameters,
    save_combined,
)

Writer = Callable[..., Path]
WEIGHTS = [1.0, 0.8]
IDS = [
    [1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45],
    [2, 40, 30, 20, 10, 60, 50, 70, 80],
]
ANSWERS = [
    [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1],  # two turns; the second is too short for head 1
    [0, 0, 1, 1, 1, 1, 1, 0, 0],
]


@pytest.fixture
def make(tiny_checkpoint: Writer, head_tensors: Any, tmp_path: Path) -> Callable[..., Any]:
    """A converted model with random heads."""

    def build(*, share: bool = False, random: bool = True, layers: int = 1, **config: Any) -> Any:
        path = tiny_checkpoint(tmp_path / f"model{len(list(tmp_path.iterdir()))}", **config)
        model = convert(load_reference(path, torch.float32), heads=2, layers=layers, share_lm_head=share)
        if random:
            tensors = head_tensors(2, layers)
            load_heads(model, {n: t for n, t in tensors.items() if not share or ".linear." in n})
        return model

    return build


def batch(rows: Sequence[int] = (0, 1)) -> dict[str, torch.Tensor]:
    longest = max(len(IDS[row]) for row in rows)
    found = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    found["labels"] = torch.full((len(rows), longest), -100)
    for place, row in enumerate(rows):
        length = len(IDS[row])
        found["input_ids"][place, :length] = torch.tensor(IDS[row])
        found["attention_mask"][place, :length] = 1
        answers = [token if said else -100 for token, said in zip(IDS[row], ANSWERS[row], strict=True)]
        found["labels"][place, :length] = torch.tensor(answers)
    return found


def oracle(model: Any, *, base: float = 0.0, ahead: int = 2, on_prompt: bool = False, decay: float = 0.8) -> float:
    """The loss by the book: one position, one head, one token at a time; the options are mistakes."""
    total, tokens = 0.0, 0
    for ids, said in zip(IDS, ANSWERS, strict=True):
        answer = [True] * len(ids) if on_prompt else [bool(flag) for flag in said]
        with torch.no_grad():
            states = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        for position in range(len(ids) - 1):
            if not answer[position + 1]:
                continue
            tokens += 1
            x = states[position]
            total -= base * float(functional.log_softmax(model.lm_head.weight @ x, 0)[ids[position + 1]])
            for number, head in enumerate(model.medusa_heads):
                target = position + ahead + number
                if target >= len(ids) or not all(answer[position + 1 : target + 1]):
                    continue
                linear = head[0].linear
                y = linear.weight @ x + linear.bias
                y = head[1].weight @ (x + y / (1 + torch.exp(-y)))
                total -= decay**number * float(functional.log_softmax(y, 0)[ids[target]])
    return total / tokens


def loss(model: Any, *, freeze: bool = True, weights: Sequence[float] = WEIGHTS, **options: Any) -> float:
    return float(medusa_loss(model, batch(), freeze_base=freeze, head_weights=weights, **options).loss.detach())


@pytest.mark.parametrize("share", [False, True])
def test_loss_is_that_of_the_loops(make: Callable[..., Any], share: bool) -> None:
    model = make(share=share)
    assert loss(model) == pytest.approx(oracle(model), abs=1e-5)
    assert loss(model, freeze=False, base_weight=0.7) == pytest.approx(oracle(model, base=0.7), abs=1e-5)


@pytest.mark.parametrize("fault", ["one position off", "prompt tokens too", "all heads alike"])
def test_planted_faults_are_caught(make: Callable[..., Any], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, right, weights = make(), medusa_model.head_targets, WEIGHTS
    faulty = {
        "one position off": lambda labels, heads: right(functional.pad(labels[:, :-1], (1, 0), value=-100), heads),
        "prompt tokens too": lambda labels, heads: right(batch()["input_ids"], heads),
        "all heads alike": right,
    }
    mistaken = {
        "one position off": {"ahead": 1},
        "prompt tokens too": {"on_prompt": True},
        "all heads alike": {"decay": 1.0},
    }
    monkeypatch.setattr(medusa_model, "head_targets", faulty[fault])
    if fault == "all heads alike":
        weights = [1.0, 1.0]
    assert loss(model, weights=weights) != pytest.approx(oracle(model), abs=1e-2)  # the oracle tells them from the code
    monkeypatch.undo()
    assert loss(model) != pytest.approx(
        oracle(model, **mistaken[fault]), abs=1e-2
    )  # and the code from its own mistakes


def test_targets_stay_within_one_answer() -> None:
    none = -100
    assert head_targets(torch.tensor([[none, none, 7, 8, 9, none, 3, none]]), 1)[0].tolist() == [
        [none, none], [7, 8], [8, 9], [9, none], [none, none], [3, none], [none, none], [none, none],
    ]  # fmt: skip


def test_parts_count_what_is_trained(make: Callable[..., Any]) -> None:
    model = make()
    found = medusa_loss(model, batch(), freeze_base=True, head_weights=WEIGHTS)
    targets, hits, nll = found.parts.unbind(-1)  # [B, 1 + heads] each
    assert targets.tolist() == [[7, 5, 3], [5, 4, 3]]
    expected = (nll[:, 1].sum() + 0.8 * nll[:, 2].sum()) / targets[:, 0].sum()
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-6)
    assert bool((hits <= targets).all())
    alone = [medusa_loss(model, batch([row]), freeze_base=True, head_weights=WEIGHTS).parts[0] for row in (0, 1)]
    assert torch.allclose(torch.stack(alone), found.parts, atol=1e-3)  # padding changes nothing


def test_divided_by_the_items_of_the_whole_step(make: Callable[..., Any]) -> None:
    model = make()
    whole = medusa_loss(model, batch(), freeze_base=True, head_weights=WEIGHTS).loss
    parts = [medusa_loss(model, batch([row]), freeze_base=True, head_weights=WEIGHTS, items=12).loss for row in (0, 1)]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


def test_teacher_replaces_the_text(make: Callable[..., Any]) -> None:
    model = make()
    own = medusa_loss(model, batch(), freeze_base=False, head_weights=[0.0, 0.0], teacher=base_logits(model, batch()))
    assert float(own.loss.detach()) == pytest.approx(0.0, abs=1e-6)  # no model differs from itself
    teacher = functional.log_softmax(torch.randn(12, 97, generator=torch.Generator().manual_seed(3)), dim=-1)
    found = medusa_loss(model, batch(), freeze_base=False, head_weights=[0.0, 0.0], teacher=teacher)
    student = base_logits(model, batch())
    by_hand = sum(float(p.exp() @ (p - q)) for p, q in zip(teacher, student, strict=True)) / 12
    assert float(found.loss.detach()) == pytest.approx(by_hand, rel=1e-5)
    assert float(found.drift.sum()) == pytest.approx(12 * by_hand, rel=1e-5)


def test_gradients_reach_the_base_only_when_it_is_trained(make: Callable[..., Any]) -> None:
    model = make()
    for freeze in (True, False):
        model.zero_grad()
        medusa_loss(model, batch(), freeze_base=freeze, head_weights=WEIGHTS).loss.backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert {"medusa_heads.0.0.linear.weight", "medusa_heads.1.1.weight"} <= reached
        assert ("model.layers.0.mlp.up_proj.weight" in reached) is not freeze


@pytest.mark.parametrize("share", [False, True])
def test_new_heads_are_the_base_model(tiny_checkpoint: Writer, tmp_path: Path, share: bool) -> None:
    model = load_reference(tiny_checkpoint(tmp_path / "model"), torch.float32)
    before = torch.random.get_rng_state()
    convert(model, heads=2, layers=2, share_lm_head=share)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers are his
    states = torch.randn(4, 64)
    for head in model.medusa_heads:
        assert torch.equal(head(states), model.lm_head(states))
    assert len(head_parameters(model)) == 2 * (2 * 2 + 1)
    assert len(own_head_parameters(model)) == 2 * (2 * 2 + (not share))


def test_heads_that_do_not_fit(make: Callable[..., Any], head_tensors: Any) -> None:
    model = make()
    with pytest.raises(
        ConfigError, match=r"medusa_heads.1.0.linear.bias: got no such tensor; .* check heads and layers"
    ):
        load_heads(model, head_tensors(1))
    with pytest.raises(ConfigError, match=r"medusa_heads.2.0.linear.bias: got a tensor without a place"):
        load_heads(model, head_tensors(3))
    with pytest.raises(ConfigError, match=r"got \(97, 32\); expected \(97, 64\)"):
        load_heads(model, {n: t[..., :32] if n.endswith("1.weight") else t for n, t in head_tensors(2).items()})
    with pytest.raises(ConfigError, match="number of heads: got 0"):
        convert(model, heads=0, layers=1)
    with pytest.raises(ConfigError, match="head weights: got 1 weights; expected 2"):
        loss(model, weights=[1.0])


def test_without_modelopt(tiny_checkpoint: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "modelopt.torch.speculative", None)
    with pytest.raises(MissingPackageError, match=r"medusa-export\[train\]"):
        convert(load_reference(tiny_checkpoint(tmp_path / "model"), torch.float32), heads=1, layers=1)


@pytest.mark.parametrize("share", [False, True])
def test_combined_checkpoint_comes_back(make: Callable[..., Any], share: bool, tmp_path: Path) -> None:
    model, out = make(share=share), tmp_path / "combined"
    expected = {name: tensor.clone() for name, tensor in head_parameters(model).items()}
    save_combined(model, out)
    opened = MedusaCheckpoint.open(out)
    assert (opened.heads.layout, opened.num_medusa_heads) == ("modelopt", 2)
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in expected.items())
    restored = load_reference(out, torch.float32)  # through ModelOpt, which was switched on for saving
    assert all(torch.equal(head_parameters(restored)[name], tensor) for name, tensor in expected.items())


# What ModelOpt does by itself; when one of these fails, the code above may be simplified.


def _plain_modelopt(path: Path) -> Any:
    import modelopt.torch.speculative as mtsp

    model = load_reference(path, torch.float32)
    mtsp.convert(model, [("medusa", {"medusa_num_heads": 2, "medusa_num_layers": 1})])
    return model


def test_trap_labels_are_not_shifted(make: Callable[..., Any]) -> None:
    model = make()
    ids = torch.tensor([IDS[0]])
    with torch.no_grad():
        states = model.model(input_ids=ids).last_hidden_state[0]

    def by_hand(ahead: int) -> float:
        """ModelOpt's weights: 0.2 * 0.8 ** h, every head's own mean."""
        total = 0.0
        for number, head in enumerate(model.medusa_heads):
            reach = ahead + number
            total += 0.2 * 0.8**number * float(functional.cross_entropy(head(states[:-reach]), ids[0, reach:]))
        return total

    shifted = functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(by_hand(1), rel=1e-5)  # head 0 learns t + 1
    assert float(model(input_ids=ids, labels=shifted).loss) == pytest.approx(by_hand(2), rel=1e-5)


def test_trap_nothing_is_frozen_but_nothing_moves(tiny_checkpoint: Writer, tmp_path: Path) -> None:
    model = _plain_modelopt(tiny_checkpoint(tmp_path / "model"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    ids = torch.tensor([IDS[0]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is None
    model(input_ids=ids, labels=ids, freeze_base_model=False).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_trap_heads_are_random(tiny_checkpoint: Writer, tmp_path: Path) -> None:
    model = _plain_modelopt(tiny_checkpoint(tmp_path / "model"))
    assert bool((model.medusa_heads[0][0].linear.weight == 0).all())
    assert not bool((model.medusa_heads[0][0].linear.bias == 0).any())
    assert not torch.equal(model.medusa_heads[0][1].weight, model.lm_head.weight)


def test_trap_items_are_taken_and_ignored(make: Callable[..., Any]) -> None:
    model = make()
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD in kinds  # so the Trainer believes that num_items_in_batch is honoured
    ids = torch.tensor([IDS[0]])
    losses = {float(model(input_ids=ids, labels=ids, num_items_in_batch=items).loss) for items in (1, 1000)}
    assert len(losses) == 1


def test_trap_no_answer_is_nan(make: Callable[..., Any]) -> None:
    model = make()
    assert math.isnan(float(model(input_ids=torch.tensor([IDS[0]]), labels=torch.full((1, 12), -100)).loss))
    empty = batch() | {"labels": torch.full((2, 12), -100)}
    assert float(medusa_loss(model, empty, freeze_base=True, head_weights=WEIGHTS).loss) == 0.0


def test_trap_plain_transformers_drops_the_heads(make: Callable[..., Any], tmp_path: Path) -> None:
    save_combined(make(), tmp_path / "combined")
    shutil.copytree(tmp_path / "combined", tmp_path / "plain", ignore=shutil.ignore_patterns("modelopt_state.pth"))
    assert any(name.startswith("medusa_heads.") for name in load_file(tmp_path / "plain" / "model.safetensors"))
    assert not hasattr(load_reference(tmp_path / "plain", torch.float32), "medusa_heads")
