"""What a training leaves beside its heads: acceptance.json, followers.npz, training.json, a plot, and TensorBoard's files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medusa_export.core.errors import missing_package
from medusa_export.heads.training.dataset import Example
from medusa_export.heads.training.head_module import MedusaHeads
from medusa_export.heads.training.hidden_states import Rows
from medusa_export.heads.training.metrics import head_candidates, head_ranks
from medusa_export.heads.trees.acceptance import summary
from medusa_export.heads.trees.followers import FOLLOWERS_FILE, Followers

ACCEPTANCE, REPORT, PLOT, LOGS = "acceptance.json", "training.json", "training.svg", "logs"
SHOWN = (1, 2, 3, 5, 10)
FITTED_ROWS = 4096

Curves = Mapping[str, Sequence[tuple[int, float]]]


def measure(heads: MedusaHeads, held: Rows) -> dict[str, Any]:
    """What ``acceptance.json`` holds, see ``acceptance.summary``."""
    return summary(head_ranks(heads, held), held.answers.numpy())


def write_report(out: Path, record: Mapping[str, Any], found: Mapping[str, Any], curves: Curves) -> None:
    """Write everything.

    Args:
        out: an existing directory.
        record: JSON of how the heads were made.
        found: what :func:`measure` gave.
        curves: name -> (step, value), see :func:`plot`.
    """
    (out / ACCEPTANCE).write_text(json.dumps(found) + "\n", encoding="utf-8")
    held_out = {name: found[name] for name in ("heads", "tree", "positions")}
    whole = {**record, "held_out": held_out, "curves": curves}
    (out / REPORT).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    plot(out / PLOT, found["heads"], curves)


def write_followers(out: Path, dataset: Sequence[Example], vocab_size: int, heads: MedusaHeads, held: Rows) -> None:
    """Count what follows every token in the data, and write it beside the heads, where it makes them better on held-out data.

    Args:
        out: an existing directory.
        dataset: what the heads were trained on.
        vocab_size: rows of the embedding.
        heads: as they were trained.
        held: of held-out data.
    """
    texts = ((example.input_ids, example.answer_mask) for example in dataset)
    candidates = head_candidates(heads, held, limit=FITTED_ROWS)
    labels = held.labels(heads.num_heads)[: len(candidates)].numpy()
    last = held.tokens[: len(candidates)].tolist()
    followers = Followers.count(texts, vocab_size).fitted(last, candidates, labels)
    if followers:
        followers.save(out / FOLLOWERS_FILE)


def plot(path: Path, heads: Sequence[Mapping[str, float]], curves: Curves) -> None:
    """Left the losses by step, right the accuracy of every head, top 1 to top 10.

    Args:
        path: the picture; its suffix decides the format.
        heads: top-1 to top-10 accuracy of every head, 0 to 1.
        curves: name -> (step, loss) pairs.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("matplotlib", "train") from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in curves.items():
        if points:
            left.plot(*zip(*points, strict=True), label=name)
    left.set(title="Loss", xlabel="step", ylabel="nats", yscale="log")
    left.legend()
    for number, accuracies in enumerate(heads):
        shares = [accuracies[f"top{k}"] for k in range(1, len(accuracies) + 1)]
        right.plot(range(1, len(shares) + 1), shares, marker="o", label=f"head {number}: token t+{number + 2}")
    right.set(title="Held-out accuracy", xlabel="best k tokens", ylabel="share that has the true one", ylim=(0, 1))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def write_tensorboard(directory: Path, curves: Curves) -> None:
    """The curves as an event file.

    Raises:
        MissingPackageError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise missing_package("tensorboard", "train") from error
    with SummaryWriter(str(directory)) as writer:
        for name, points in curves.items():
            for step, value in points:
                writer.add_scalar(name, value, step)
