"""Checks that an engine does what it claims: trees equal their paths, and numbers equal the checkpoint's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medusa_export.core.errors import ConfigError, MedusaExportError
from medusa_export.engines.decoding.protocols import ScoringEngine
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.tensorrt.build import check_sidecars
from medusa_export.engines.tensorrt.emulation.onnx_device import OnnxDevice
from medusa_export.engines.tensorrt.engine import TensorRtEngine
from medusa_export.engines.verify.reference import compare_with_checkpoint
from medusa_export.heads.contract.engine_info import TREE_FILE, EngineInfo
from medusa_export.heads.trees.tree import Tree, load_tree


@dataclass(frozen=True)
class FormBound:
    """What a form may lose against the unquantized checkpoint, and how far a tree step may be from single steps.

    Attributes:
        max_kl: mean KL divergence in nats, checkpoint to engine.
        min_agreement: share of positions with the same best token.
        max_tree_noise: logits.
    """

    max_kl: float
    min_agreement: float
    max_tree_noise: float


# Loose enough for small models. Measured on SmolLM2-135M (see docs/decisions/0003): fp8 0.04 nats, int8 0.005. The int8 noise is the
# rounding of activations inside MatMulNBits, which one token and several tokens do not share. Products of integers have no noise,
# but attention before them sums in another order where masked rows lie between: about one step of a small tree in a hundred has a
# code that falls the other way, and all behind it moves.
BOUNDS = {
    "float": FormBound(1e-3, 0.97, 5e-2),
    **{form: FormBound(0.4, 0.5, 5e-2) for form in ("fp8", "fp8_row")},
    "int8_row": FormBound(0.8, 0.4, 4.0),
    "int8": FormBound(0.1, 0.8, 4.0),
    **{form: FormBound(0.8, 0.4, 4.0) for form in ("int4", "int4_awq")},
}
# By form of the portable graph, on SmolLM2-135M: (nats, share of equal best tokens, logits), the worse of float16 and bfloat16. The
# first two are against the checkpoint; the last is the largest difference between ONNX Runtime and float32 PyTorch on the very same
# weights and rounding of inputs, that is, what the order of sums alone may do. See docs/tensorrt.md, "Numbers".
MEASURED: dict[str, tuple[float, float, float]] = {
    "float": (0.0001, 1.0, 0.094),
    "fp8": (0.066, 0.934, 7.5),
    "fp8_row": (0.031, 0.923, 0.081),
    "int8_sq": (0.23, 0.852, 2.8),
    "int8": (0.0044, 0.975, 0.071),
    "int4": (0.58, 0.716, 0.11),
    "int4_awq": (0.33, 0.811, 0.14),
    "nvfp4": (0.55, 0.689, 21.0),
}
ROUNDING = frozenset(("fp8", "int8_sq", "nvfp4"))  # of inputs too
EXACT = frozenset(("float",))  # weights are the checkpoint's


def measured_bound(form: str) -> FormBound:
    """The bound that follows from a measurement.

    Other models lose more than this one, small and random ones several times as much; a graph with a wrong weight, scale, mask or
    position loses whole nats (a uniform guess: ln 49152 = 10.8) and most tokens. So four times the nats and half of the right tokens,
    which an unquantized graph may not lose. A tree step sums in another order than single steps do: ten times what an order made.
    Where inputs are rounded, one that falls the other way moves all behind it, as far as rounding goes: twice what was seen, and the
    check of the tree says little there; the other forms have the same mask.
    """
    kl, agreement, max_error = MEASURED[form]
    return FormBound(
        max(4 * kl, 1e-2), 0.95 if form in EXACT else agreement / 2, max_error * (2 if form in ROUNDING else 10)
    )


TENSORRT_BOUNDS = {form: measured_bound(form) for form in MEASURED}
CHECK_TREE = Tree.from_choices([[0], [1], [0, 0], [1, 0]])


def check_engine(engine_dir: Path, reference: Path | None, texts: Sequence[Sequence[int]]) -> list[str]:
    """Problems of an engine directory, one line each; an empty list is a good engine.

    Args:
        engine_dir: what medusa-export wrote.
        reference: the original checkpoint, or None to skip the comparison with it, and the run of graphs that are for GPUs.
        texts: token ids to run.

    Raises:
        CheckpointError: the checkpoint's own logits are not finite.
    """
    try:
        info = EngineInfo.load(engine_dir)
        check = _check_of(engine_dir, info)
        if problems := check.files(engine_dir):
            return problems
        info.require_tree(load_tree(str(engine_dir / TREE_FILE)))
        if check.open is None or (check.needs_reference and reference is None):
            return []
        engine = check.open(engine_dir)
        for depth in range(1, engine.info.max_depth + 1):
            engine.draft(depth)  # opens and runs every graph of the heads
    except MedusaExportError as error:
        return [str(error)]
    bound = bound_of(engine.info)
    longest = engine.info.max_length - CHECK_TREE.num_nodes
    usable = [list(text)[:longest] for text in texts if len(text) >= 2]
    noise = float(np.max([tree_error(engine, text) for text in usable], initial=0.0))
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in usable]
    if math.isnan(noise) and reference is not None:
        compare_with_checkpoint(engine, reference, halves)  # which refuses one whose own logits are not finite
    if not noise <= bound.max_tree_noise:  # also catches NaN, which np.max keeps and max() may not
        return [f"engine: tree and single steps differ by {noise:.3g} logits, expected at most {bound.max_tree_noise}"]
    if reference is None or not usable:
        return []
    found = compare_with_checkpoint(engine, reference, halves)
    if found["kl_mean"] <= bound.max_kl and found["greedy_agreement"] >= bound.min_agreement:
        return []
    return [
        f"engine: KL {found['kl_mean']:.3g} and {found['greedy_agreement']:.1%} equal tokens against {reference}, expected at most "
        f"{bound.max_kl} and at least {bound.min_agreement:.0%}"
    ]


@dataclass(frozen=True)
class BackendCheck:
    """How the engines of a backend are checked on the machine that exports.

    Attributes:
        bounds: what an engine may lose, by form.
        open: something that runs here and has the engine's numbers; None where nothing has.
        files: problems that the files show by themselves.
        needs_reference: whether a run without the checkpoint would not be worth its time.
    """

    bounds: Mapping[str, FormBound]
    open: Callable[[Path], Any] | None = None
    files: Callable[[Path], list[str]] = lambda engine_dir: []
    needs_reference: bool = False


def _graphs_in_onnxruntime(engine_dir: Path) -> TensorRtEngine:
    """The graphs that TensorRT was given, as far as a model is small enough for ONNX Runtime."""
    return TensorRtEngine(engine_dir, OnnxDevice(engine_dir.with_name("onnx")))


CHECKS: dict[str, BackendCheck] = {
    "onnxruntime": BackendCheck(BOUNDS, OnnxRuntimeEngine),
    "tensorrt": BackendCheck(TENSORRT_BOUNDS, _graphs_in_onnxruntime, check_sidecars, needs_reference=True),
    "tensorrt-llm": BackendCheck(BOUNDS),  # what trtllm-build left was checked when it was built
}


def bound_of(info: EngineInfo) -> FormBound:
    """What an engine may lose."""
    return CHECKS[info.backend].bounds[info.form]


def _check_of(engine_dir: Path, info: EngineInfo) -> BackendCheck:
    if info.backend not in CHECKS:
        where, expected = f"{engine_dir}: backend", f"one of {', '.join(CHECKS)}"
        raise ConfigError(where, repr(info.backend), expected, "export again")
    return CHECKS[info.backend]


def tree_error(engine: ScoringEngine, text: Sequence[int], tree: Tree = CHECK_TREE) -> float:
    """Largest logit difference between a tree step and the same paths run token by token.

    Finds a wrong mask, parent or position. That accepted rows are moved right, only decoding shows: parity checks it.

    Args:
        engine: what runs.
        text: token ids; the last one is the root.
        tree: cut to the heads there are.
    """
    usable = tree if engine.info.max_depth >= tree.depth else Tree.from_choices([[0], [1]])
    prompt, root = list(text[:-1]), int(text[-1])
    node_ids = [root] + [text[node % len(text)] for node in range(1, usable.num_nodes)]
    logits = engine.tree_logits(usable, prompt, node_ids)  # [N, V]
    errors = []
    for path in usable.retrieve_indices:
        nodes = path[path >= 0]
        sequence = [*prompt, *(node_ids[node] for node in nodes)]
        single = np.concatenate(list(engine.score(sequence, chunk=1, start=len(prompt))))  # [path, V]
        errors.append(np.abs(single - logits[nodes]).max())
    return float(np.max(errors))
