"""The report of a training through the Trainer: the same files as a training from cached states leaves."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medusa_export.core.artifacts.manifest import package_versions
from medusa_export.heads.training.dataset import Example, data_hash
from medusa_export.heads.training.full.modelopt_medusa import own_head_parameters
from medusa_export.heads.training.head_module import MedusaHeads
from medusa_export.heads.training.hidden_states import build_cache
from medusa_export.heads.training.report import measure, write_followers, write_report


class ReferenceReporter:
    """What ``train_reference`` calls with the trained model.

    Args:
        dataset, held_out: conversations that heads learnt from, and that they are measured on.
        recorded: JSON of the arguments.

    Attributes:
        found: what ``acceptance.json`` holds, of the model as it was trained, quantizers included; None before the end.
    """

    def __init__(self, dataset: Sequence[Example], held_out: Sequence[Example], recorded: Mapping[str, Any]) -> None:
        self._data = {"train": data_hash(dataset), "held_out": data_hash(held_out)}
        self._dataset, self._held_out, self._recorded = dataset, held_out, recorded
        self.found: dict[str, Any] | None = None

    def __call__(self, model: Any, out: Path, history: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Measure the heads, and write the report into ``out``."""
        with tempfile.TemporaryDirectory(dir=out) as folder:
            held = build_cache(
                Path(folder), lambda: model.eval(), self._held_out, key="trained", hidden_size=model.config.hidden_size
            )
            heads = _heads_of(model)
            self.found = measure(heads, held)
            write_followers(out, self._dataset, model.config.vocab_size, heads, held)
        record = {"arguments": self._recorded, "data": self._data, "versions": package_versions()}
        write_report(out, record, self.found, _curves(history))


def _heads_of(model: Any) -> MedusaHeads:
    """The model's heads as they are measured, in float32."""
    tensors = own_head_parameters(model)
    own = any(".linear." not in name for name in tensors)
    heads = MedusaHeads(
        len(model.medusa_heads), len(model.medusa_heads[0]) - 1, model.lm_head.weight.detach(), own_lm_head=own
    ).to(model.lm_head.weight.device)
    for name, tensor in heads.tensors().items():
        tensor.copy_(tensors[name].detach())
    return heads


def _curves(history: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[tuple[int, float]]]:
    """Losses by stage, of training and of held-out data."""
    names = {"loss": "loss", "eval_loss": "held-out loss"}
    return {
        f"{stage} {shown}": [(int(entry["step"]), float(entry[name])) for entry in logged if name in entry]
        for stage, logged in history.items()
        for name, shown in names.items()
    }
