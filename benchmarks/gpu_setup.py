"""What the parts of benchmarks/gpu.py share: the inputs, opened once, and the graphs that are made of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_model import largest_inputs, weight_maxima

from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.prompts import Prompt, load_prompts
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.measure.prompts import EncodedPrompt
from medusa_export.engines.tensorrt.emulation.torch_device import FP8_SM, TorchDevice
from medusa_export.engines.tensorrt.library import local_gpu
from medusa_export.exporter.engine_dirs.tensorrt import write_portable, write_tensorrt_engine
from medusa_export.exporter.job.draft_vocab import DEFAULT_SIZE, most_frequent_tokens
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.tree import PRESETS, Tree
from medusa_export.quantize.calibration_data import token_batches
from medusa_export.quantize.formats import get_format
from medusa_export.quantize.scales import Scales


class SkippedError(Exception):
    """A part that cannot run here, and why."""


@dataclass
class Setup:
    """The inputs, opened once. See the flags of benchmarks/gpu.py.

    Attributes:
        bytes_per_second: that copying moves.
    """

    work: Path
    ckpt: Path
    heads: Path | None
    prompts: list[Prompt]
    calib: list[Prompt]
    place: str
    dtype: str
    max_new_tokens: int
    repeats: int
    rounds: int
    max_length: int
    calib_prompts: int
    checkpoint: MedusaCheckpoint
    tokenizer: Any
    bytes_per_second: float = 0.0
    scales: dict[str, Scales] = field(default_factory=dict)

    @classmethod
    def open(
        cls, work: Path, *, ckpt: Path, heads: Path | None, prompts: Path, calib: Path, dtype: str | None, limit: int,
        max_length: int, **others: Any,
    ) -> Setup:  # fmt: skip
        """Read what the flags name.

        Raises:
            MedusaExportError: something that cannot be used.
        """
        checkpoint = MedusaCheckpoint.open(ckpt, heads)
        own = "bfloat16" if checkpoint.config.dtype == "bfloat16" else "float16"
        length = min(max_length, checkpoint.config.max_position_embeddings)
        return cls(
            work, ckpt, heads, load_prompts(prompts, limit), load_prompts(calib), dtype=dtype or own, max_length=length,
            checkpoint=checkpoint, tokenizer=read_tokenizer(ckpt), **others,
        )  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """What the figures depend on, for the JSON file."""
        names = ("max_new_tokens", "repeats", "rounds", "max_length", "calib_prompts")
        return {name: getattr(self, name) for name in names} | {"prompts": len(self.prompts)}

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the model where it runs."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def calibrated(self, place: str, dtype: torch.dtype) -> Scales:
        """Per-tensor scales of base linears, from largest inputs on ``place``; kept for the next part."""
        key = f"{place} {dtype}"
        if key not in self.scales:
            batches = token_batches(self.tokenizer, self.calib, max_prompts=self.calib_prompts)
            self.scales[key] = Scales(largest_inputs(self.ckpt, batches, place, dtype), weight_maxima(self.checkpoint))
        return self.scales[key]


def bandwidth(place: str) -> float:
    """GB/s that copying moves, read and written bytes together; the best of several."""
    size = 2**30 if place == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=place)
    target, seconds = torch.empty_like(source), []
    for _ in range(8):
        _wait(place)
        start = time.perf_counter()
        target.copy_(source)
        _wait(place)
        seconds.append(time.perf_counter() - start)
    return 2 * size / min(seconds) / 1e9


def _wait(place: str) -> None:
    if place == "cuda":
        torch.cuda.synchronize()


def write_graphs(
    directory: Path, checkpoint: MedusaCheckpoint, setup: Setup, quant: str, scales: Scales | None, builder: Any,
    gpus: Sequence[int] = (),
) -> None:  # fmt: skip
    """The portable graphs and an engine directory."""
    directory.mkdir(exist_ok=True)
    weight_format, size = get_format(quant), checkpoint.config.vocab_size
    length = min(setup.max_length, checkpoint.config.max_position_embeddings)
    tree = Tree.from_choices(choice for choice in PRESETS["medusa-63"] if len(choice) <= checkpoint.num_medusa_heads)
    words = (
        most_frequent_tokens(
            setup.tokenizer, setup.calib, size=DEFAULT_SIZE, vocab_size=size, ends=[setup.tokenizer.eos_token_id]
        )
        if size > DEFAULT_SIZE
        else None
    )
    write_portable(
        directory / "onnx",
        checkpoint,
        weight_format,
        scales,
        dtype=setup.dtype,
        tree=tree,
        max_length=length,
        draft_vocab=words,
    )
    write_tensorrt_engine(
        directory / "engine", directory / "onnx", checkpoint, weight_format, gpus=tuple(gpus), dtype=setup.dtype, tree=tree,
        max_length=length, builder=builder, progress=lambda *at: None, save_tokenizer=lambda path: None, source={},
    )  # fmt: skip


def torch_device(onnx_dir: Path, place: str) -> TorchDevice:
    """PyTorch on these graphs, with FP8 products where the device has them."""
    here = local_gpu()
    return TorchDevice(onnx_dir, place, fp8_products=place == "cpu" or (here or 0) >= FP8_SM)


def fitting_prompts(info: EngineInfo, setup: Setup) -> list[EncodedPrompt]:
    """The prompts that leave room for an answer.

    Raises:
        SkippedError: there is none.
    """
    encoded = [(prompt.id, prompt.category, encode_chat(setup.tokenizer, prompt.messages)) for prompt in setup.prompts]
    fitting = [prompt for prompt in encoded if len(prompt[2]) + setup.max_new_tokens <= info.max_length]
    if not fitting:
        raise SkippedError(f"no prompt leaves room for {setup.max_new_tokens} tokens in a context of {info.max_length}")
    return fitting
