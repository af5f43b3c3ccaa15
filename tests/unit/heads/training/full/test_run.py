"""The reference training on tiny models: what it changes, what it leaves, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.core.errors import ConfigError, MedusaExportError, OutputError
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference
from medusa_export.heads.training.dataset import Example
from medusa_export.heads.training.full.arguments import RAMPS, ReferenceArguments, training_arguments
from medusa_export.heads.training.full.model import Collator, build
from medusa_export.heads.training.full.modelopt_medusa import medusa_loss
from medusa_export.heads.training.full.run import last_checkpoint, stages, train_reference

pytestmark = pytest.mark.slow  # each trains

Writer = Callable[..., Path]
QUICK = ReferenceArguments(heads=2, max_steps=4, batch_size=4, checkpoint_every=2, log_every=1, report_to=(), warmup=0)
JOINT = dataclasses.replace(QUICK, base="joint", warmup_heads=0.25, lora_rank=4)
SGD = {"optim": "sgd"}  # unlike Adam, it shows the size of a gradient


def examples(count: int, seed: int = 0) -> list[Example]:
    """Prompts of random tokens; answers that count upwards by 3."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        prompt, answer, start = rng.randint(3, 8), rng.randint(1, 20), rng.randrange(97)
        ids = [rng.randrange(97) for _ in range(prompt)] + [(start + 3 * step) % 97 for step in range(answer)]
        found.append(Example(ids, [False] * prompt + [True] * answer))
    return found


@pytest.fixture
def model_dir(tiny_checkpoint: Writer, tiny_tokenizer: Writer, tmp_path: Path) -> Path:
    return tiny_tokenizer(tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16))


@pytest.fixture
def exact_dir(tiny_checkpoint: Writer, tmp_path: Path) -> Path:
    """Stored in float32, so that nothing is rounded when it is written."""
    return tiny_checkpoint(tmp_path / "exact")


def changed(arguments: ReferenceArguments, **changes: Any) -> ReferenceArguments:
    return dataclasses.replace(arguments, **changes)


def weights(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(path).items() if name.startswith(prefix)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


HEADS = "medusa_lm_head.safetensors"


@pytest.mark.parametrize("layout", ["v1", "v2", "modelopt"])
@pytest.mark.parametrize("base", ["frozen", "joint"])
def test_every_output_opens(base: str, layout: str, model_dir: Path, tmp_path: Path) -> None:
    arguments = changed(JOINT if base == "joint" else QUICK, layout=layout)
    report = train_reference(model_dir, examples(20), tmp_path / "out", arguments, held_out=examples(5, 1))
    has_base = base == "joint" or layout == "modelopt"
    opened = MedusaCheckpoint.open(*([tmp_path / "out"] if has_base else [model_dir, tmp_path / "out"]))
    assert (opened.num_medusa_heads, opened.num_medusa_layers, opened.warnings) == (2, 1, ())
    assert opened.heads.layout == (layout if layout == "modelopt" else f"medusa-{layout}")
    assert opened.dtype("medusa_heads.0.0.linear.weight") == "bfloat16"
    assert bool((opened.read("medusa_heads.0.0.linear.weight") != 0).any())
    assert (tmp_path / "out" / "tokenizer.json").exists() is has_base
    assert not (tmp_path / ".out.training").exists()
    original = weights(model_dir / "model.safetensors")
    moved = [name for name in original if not torch.equal(original[name], opened.read(name))]
    targets = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-2] for name in moved} == (targets if base == "joint" else set())
    assert (report.base_change > 0) is (base == "joint")
    assert report.metrics.keys() >= {"head0_top1", "head1_nll", "base_kl", "loss"}


def test_the_merged_base_is_what_was_trained(exact_dir: Path, tmp_path: Path) -> None:
    """Its distance from the original, measured on the stored files, is the one that the training reported."""
    held_out = examples(5, 1)
    report = train_reference(exact_dir, examples(20), tmp_path / "out", JOINT, held_out=held_out)
    batch = Collator()(held_out)
    rows = batch["labels"].roll(-1, dims=1) != -100
    logits = [
        load_reference(path, torch.float32)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[rows]
        for path in (exact_dir, tmp_path / "out")
    ]
    before, after = (torch.log_softmax(each.detach(), -1) for each in logits)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert report.metrics["base_kl"] > 1e-6
    assert divergence == pytest.approx(report.metrics["base_kl"], rel=1e-3)


def test_full_fine_tuning_moves_everything(model_dir: Path, tmp_path: Path) -> None:
    arguments = changed(JOINT, lora_rank=0, learning_rate=1e-2, distill=False)
    train_reference(model_dir, examples(20), tmp_path / "out", arguments)
    before, after = weights(model_dir / "model.safetensors"), weights(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_a_base_that_does_not_move_is_an_error(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="joint training: got a base model that did not change"):
        train_reference(model_dir, examples(20), tmp_path / "out", changed(JOINT, learning_rate=1e-12))
    assert not (tmp_path / "out").exists()


def test_the_first_stage_leaves_the_base_alone(model_dir: Path) -> None:
    assert [(s.name, s.steps, s.freeze_base) for s in stages(changed(JOINT, max_steps=10), 1)] == [
        ("heads", 2, True),
        ("joint", 8, False),
    ]
    for arguments in (JOINT, changed(JOINT, lora_rank=0)):
        built = build(model_dir, arguments)
        alone = built.module(arguments, freeze_base=True)
        trained = {name for name, parameter in alone.named_parameters() if parameter.requires_grad}
        assert {name.split(".")[1] for name in trained} == {"medusa_heads"}
        assert not built.model.model.training
        both = built.module(arguments, freeze_base=False)
        trained = {name for name, parameter in both.named_parameters() if parameter.requires_grad}
        assert any(".lora_A." in name for name in trained) is arguments.uses_adapters
        assert ("model.model.embed_tokens.weight" in trained) is not arguments.uses_adapters


@pytest.mark.parametrize(("steps", "rising"), [(1, 0), (2, 1), (100, 3)])
def test_a_short_training_is_not_all_warm_up(steps: int, rising: int, tmp_path: Path) -> None:
    """The first step of a warm-up has a rate of 0: were it the only one, nothing would be trained."""
    found = training_arguments(changed(QUICK, warmup=0.03), tmp_path, steps=steps, seed=0, evaluates=False)
    assert found.warmup_steps == rising


def test_steps() -> None:
    count = [
        stages(changed(QUICK, max_steps=None, epochs=2, accumulate=3), 41, processes)[0].steps for processes in (1, 2)
    ]
    assert count == [8, 4]  # 11 and 6 micro-batches an epoch
    assert [stage.name for stage in stages(changed(JOINT, max_steps=1), 5)] == ["joint"]


def test_accumulated_gradients_are_those_of_one_batch(exact_dir: Path, tmp_path: Path) -> None:
    """Answers of 1 to 20 tokens: means of micro-batches would differ."""
    data = examples(4, 2)
    assert len({sum(example.answer_mask) for example in data}) > 2
    common = changed(JOINT, max_steps=1, warmup_heads=0, trainer=SGD, max_grad_norm=0, learning_rate=1.0, lora_rank=0)
    found, losses = {}, {}
    for size, accumulate in ((4, 1), (1, 4)):
        arguments = changed(common, batch_size=size, accumulate=accumulate, distill=False)
        out = tmp_path / f"out{size}"
        report = train_reference(exact_dir, data, out, arguments)
        losses[size] = report.history["joint"][0]["loss"]
        found[size] = load_reference(out, torch.float32).state_dict() | load_file(out / HEADS)
    batch = Collator()(data)
    model = build(exact_dir, common).model
    expected = medusa_loss(model, batch, freeze_base=False, head_weights=[0.2, 0.2 * 0.8]).loss
    assert losses[1] == pytest.approx(losses[4], rel=1e-5)
    assert losses[4] == pytest.approx(float(expected.detach()), rel=1e-5)
    before = load_reference(exact_dir, torch.float32).state_dict()
    for name, tensor in found[4].items():
        step = float((tensor - before.get(name, torch.zeros(()))).abs().max())
        assert step > 0
        assert float((found[1][name] - tensor).abs().max()) < 1e-3 * step, name


def test_learning_rates(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medusa_export.heads.training.full.trainer import MedusaTrainer

    groups: list[tuple[int, float]] = []
    original = MedusaTrainer.create_optimizer

    def spy(self: Any, model: Any = None) -> Any:
        optimizer = original(self, model)
        groups.extend((len(group["params"]), group["lr"]) for group in optimizer.param_groups)
        return optimizer

    monkeypatch.setattr(MedusaTrainer, "create_optimizer", spy)
    train_reference(model_dir, examples(8), tmp_path / "out", changed(JOINT, learning_rate=1e-3, warmup_heads=0))
    assert groups == [(2 * 2 * 7, 1e-3), (2 * 2, 4e-3)]  # two layers of seven adapters; weight and bias of two heads
    assert (changed(JOINT, lora_rank=0).base_rate, JOINT.base_rate) == (2e-5, 5e-4)


def test_the_loss_falls(model_dir: Path, tmp_path: Path) -> None:
    arguments = changed(QUICK, layout="v1", max_steps=60, checkpoint_every=60, learning_rate=2e-3, seed=1)
    report = train_reference(model_dir, examples(16), tmp_path / "out", arguments)
    losses = [entry["loss"] for entry in report.history["heads"] if "loss" in entry]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_checkpointing_and_bf16_compute_the_same(model_dir: Path, tmp_path: Path) -> None:
    found = []
    for number, options in enumerate(({}, {"gradient_checkpointing": True}, {"bf16": True})):
        arguments = changed(JOINT, **options, layout="v1")
        report = train_reference(model_dir, examples(12), tmp_path / f"out{number}", arguments)
        found.append(report.history["joint"][0]["loss"])
    assert found[1] == found[0]
    assert found[2] == pytest.approx(found[0], rel=0.05)
    assert found[2] != found[0]
    built = build(model_dir, changed(JOINT, bf16=True))
    trained = [parameter for name, parameter in built.model.named_parameters() if ".lora_" in name or "heads" in name]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert built.model.lm_head.weight.dtype == torch.bfloat16


def test_early_stop_takes_the_best(model_dir: Path, tmp_path: Path) -> None:
    arguments = changed(QUICK, max_steps=40, checkpoint_every=2, patience=2, learning_rate=1e-9)
    report = train_reference(model_dir, examples(20), tmp_path / "out", arguments, held_out=examples(5, 1))
    evaluated = [entry["step"] for entry in report.history["heads"] if "eval_head0_top1" in entry]
    assert evaluated == [2, 4, 6]  # nothing is learnt: two evaluations after the first best one


def test_continues_from_existing_heads(model_dir: Path, tiny_heads: Writer, tmp_path: Path) -> None:
    heads = tiny_heads(tmp_path / "heads", "v2", num_heads=2)
    arguments = changed(QUICK, learning_rate=1e-9)
    train_reference(model_dir, examples(8), tmp_path / "out", arguments, heads=heads)
    before, after = weights(heads / HEADS), weights(tmp_path / "out" / HEADS)
    assert all(torch.allclose(before[name], after[name].float(), rtol=1e-2) for name in before)
    own = tiny_heads(tmp_path / "own", "v1", num_heads=2)
    with pytest.raises(ConfigError, match="heads with lm_heads of their own"):
        train_reference(model_dir, examples(8), tmp_path / "out2", arguments, heads=own)


def test_tensorboard_and_a_clean_stdout(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen: list[tuple[str, int, int]] = []
    arguments = changed(JOINT, report_to=("tensorboard",), layout="modelopt")
    train_reference(
        model_dir,
        examples(12),
        tmp_path / "out",
        arguments,
        held_out=examples(4, 1),
        progress=lambda *at: seen.append(at),
    )
    assert seen == [("heads", 1, 1), ("joint", 1, 3), ("joint", 2, 3), ("joint", 3, 3)]
    events = EventAccumulator(str(next((tmp_path / "out" / "logs" / "joint").iterdir())))
    events.Reload()
    assert {"train/loss", "eval/head0_top1", "eval/base_kl"} <= set(events.Tags()["scalars"])
    assert capsys.readouterr().out == ""


def test_nan_stops_at_once(model_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})
    steps: list[int] = []
    with pytest.raises(ConfigError, match="training step 1: got a loss of nan; expected a finite number"):
        train_reference(
            model_dir, examples(20), tmp_path / "out", QUICK, progress=lambda stage, done, total: steps.append(done)
        )
    assert steps == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "both"}, "base: got both; expected one of frozen, joint"),
        ({"layout": "v3"}, "expected one of v1, v2, modelopt"),
        ({"layout": "v2", "share_lm_head": False}, "share_lm_head: got False; .* use layout v1"),
        ({"layout": "v1", "share_lm_head": True}, "share_lm_head: got True; .* use layout v2"),
        ({"heads": 0}, "heads: got 0; expected at least 1"),
        ({"warmup_heads": 1.0}, "warmup_heads: got 1.0"),
        ({"epochs": float("nan")}, "epochs: got nan"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0"),
        ({"lora_rank": -1}, "lora_rank: got -1"),
        ({"max_steps": 0}, "max_steps: got 0"),
        ({"patience": 1}, "patience: got 1; expected 0 without held-out data"),
        ({"trainer": {"no_such": 1}}, "training arguments: got a refusal of transformers .*no_such"),
        ({"schedule": "sideways"}, "training arguments: got a refusal"),
    ],
)
def test_refused_arguments(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train_reference(tmp_path / "none", examples(4), tmp_path / "out", changed(QUICK, **changes))


def test_refused_data_and_places(model_dir: Path, tmp_path: Path) -> None:
    for data, message in (
        ([], "training data: got no examples"),
        ([*examples(1), Example([1, 2, 3], [True, False, False])], "training data, example 1: got no answer token"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_reference(model_dir, data, tmp_path / "out", QUICK)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="something in it"):
        train_reference(model_dir, examples(4), tmp_path / "full", QUICK)
    (tmp_path / ".out.training").mkdir()
    (tmp_path / ".out.training" / "run.json").write_text(json.dumps({"arguments": {}}))
    with pytest.raises(OutputError, match="a training with other arguments or data"):
        train_reference(model_dir, examples(4), tmp_path / "out", QUICK)
    with pytest.raises(MedusaExportError, match=r"config\.json"):
        train_reference(tmp_path / "none", examples(4), tmp_path / "other", QUICK)


def test_a_checkpoint_that_was_cut_off_is_not_used(tmp_path: Path) -> None:
    for number, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st'), (14, None)):
        path = tmp_path / f"checkpoint-{number}"
        path.mkdir()
        if state is not None:
            (path / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "none") is None


def test_collator() -> None:
    batch = Collator()([Example([5, 6, 7], [True, False, True]), Example([8, 9], [False, True])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]  # nothing predicts the first token


def test_ramps() -> None:
    assert [round(ramp(0.5), 3) for ramp in RAMPS.values()] == [1.0, 0.5, 0.707]
    assert all(ramp(1.0) == 1.0 for ramp in RAMPS.values())
