"""A training as a program of its own: run to its end, until it kills itself, and by torchrun."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from medusa_export.heads.training.dataset import Example
from medusa_export.heads.training.full.arguments import ReferenceArguments
from medusa_export.heads.training.full.run import train_reference

COMMON = {"base": "joint", "heads": 2, "lora_rank": 4, "log_every": 1, "report_to": (), "max_steps": 9}


def main(model: str, out: str, options: str, kill: str = "") -> list[Any]:
    """Train on random tokens; returns metrics and losses.

    Args:
        options: JSON of ``ReferenceArguments``.
        kill: stage and step after which the process ends itself without notice: "joint5".
    """
    rng, data = random.Random(0), []
    for _ in range(26):
        prompt, answer = rng.randint(3, 8), rng.randint(1, 20)
        ids = [rng.randrange(97) for _ in range(prompt + answer)]
        data.append(Example(ids, [False] * prompt + [True] * answer))

    def progress(stage: str, done: int, total: int) -> None:
        if f"{stage}{done}" == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    arguments = ReferenceArguments(**{"checkpoint_every": 2, **COMMON, **json.loads(options)})
    report = train_reference(Path(model), data[:22], Path(out), arguments, held_out=data[22:], progress=progress)
    return [report.metrics, [entry["loss"] for entry in report.history.get("joint", ()) if "loss" in entry]]


def let_cpus_shard() -> None:
    """accelerate gives FSDP to GPUs only; gloo can do it too."""
    from accelerate.state import DistributedType, PartialState

    original = PartialState.__init__

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start


if __name__ == "__main__":
    model, out, options, *rest = sys.argv[1:]
    print(json.dumps(main(model, out, options, *rest)))
    if "WORLD_SIZE" in os.environ:
        let_cpus_shard()
        sharded = json.loads(options)
        sharded["trainer"] |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
        print(json.dumps(main(model, out + "-sharded", json.dumps(sharded))))
