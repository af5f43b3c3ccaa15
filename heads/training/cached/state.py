"""What a training has to remember to go on after it was killed, as one safetensors file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from medusa_export.core.artifacts.staging import sync
from medusa_export.core.errors import OutputError

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of torch.optim.AdamW


@dataclass
class TrainState:
    """How far a training is.

    Attributes:
        step: optimizer steps done.
        losses: (step, mean loss since the entry before).
        epochs: held-out accuracies of every head after each epoch, with the step.
        best: the heads with the best accuracies so far, by name of parameter.
        stale: epochs since then.
        stopped: ended by patience.
        pending: losses that no entry has yet.
    """

    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    best_accuracy: float = -1.0
    stale: int = 0
    stopped: bool = False
    pending: list[float] = field(default_factory=list, repr=False)

    def add(self, loss: float, *, log_every: int) -> None:
        """Count a step."""
        self.step += 1
        self.pending.append(loss)
        if self.step % log_every == 0 or self.step == 1:
            self.losses.append((self.step, sum(self.pending) / len(self.pending)))
            self.pending.clear()


def save_state(path: Path, parameters: torch.nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Replace the file at once: a process killed meanwhile leaves the old one.

    Args:
        path: the file to replace.
        parameters: the heads.
        optimizer: its moments are kept too.
        state: step, epoch, and what early stopping remembers.
    """
    tensors = {f"now.{name}": value.detach() for name, value in parameters.named_parameters()}
    tensors |= {f"best.{name}": value for name, value in state.best.items()}
    for name, parameter in parameters.named_parameters():
        tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in _MOMENTS}
    rest = {name: value for name, value in asdict(state).items() if name != "best"}
    scratch = path.with_suffix(".writing")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, scratch, {"state": json.dumps(rest)})
    sync(scratch)
    scratch.rename(path)


def load_state(path: Path, parameters: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Put parameters and optimizer back to where they were.

    Args:
        path: what :func:`save_state` wrote.
        parameters, optimizer: filled in place.

    Raises:
        OutputError: a file of another training.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rest = json.loads(file.metadata()["state"])
    own = dict(parameters.named_parameters())
    if {name.removeprefix("now.") for name in tensors if name.startswith("now.")} != own.keys() or any(
        tensors[f"now.{name}"].shape != value.shape for name, value in own.items()
    ):
        raise OutputError(str(path), "the state of other heads", "this training's", "delete it and train again")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[f"now.{name}"])
            optimizer.state[parameter] = {
                moment: tensors[f"{moment}.{name}"].to(parameter.device if moment != "step" else "cpu")
                for moment in _MOMENTS
            }
    best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
    rest["losses"] = [tuple(entry) for entry in rest["losses"]]
    return TrainState(best=best, **rest)
