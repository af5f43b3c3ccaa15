"""The flags of an export as a library takes them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from medusa_export.exporter.job.draft_vocab import DEFAULT_SIZE
from medusa_export.heads.contract.trtllm_releases import DEFAULT_RELEASE
from medusa_export.quantize.calibration_data import DEFAULT_PROMPTS

SMALL_MODEL = 1_000_000_000  # parameters up to which the written logits are compared with transformers


HEAD_FORMS = {"vllm-heads": "vllm", "medusa-v1": "medusa-v1", "medusa-v2": "medusa-v2"}  # --format -> layout
FORMS = ("trtllm", "hf", *HEAD_FORMS)
AUTO = "auto"
DEFAULT_CALIB = Path(str(files("medusa_export.quantize") / "default_prompts.jsonl"))
MAX_LENGTH, MAX_BATCH = 2048, 4  # TensorRT-LLM's own example builds for 4: with more, trees cost more than they give


@dataclass(frozen=True)
class ExportArguments:
    """The flags of medusa-export; see its --help. ``None`` takes the default that suits the checkpoint."""

    ckpt: Path
    output: Path
    quant: str = "none"
    heads: Path | None = None
    kv_cache: str = "none"
    quant_heads: bool = False
    dtype: str = "auto"
    tp: int = 1
    tree: str | None = None
    calib: Path | None = None
    calib_prompts: int = DEFAULT_PROMPTS
    engine: str = "onnxruntime"
    max_length: int | None = None
    draft_vocab: int = DEFAULT_SIZE
    scales: Path | None = None
    group_size: int | None = None
    exclude: tuple[str, ...] = ()
    trtllm_version: str = DEFAULT_RELEASE
    pp: int = 1
    format: str = "trtllm"
    prompts: Path | None = None
    tree_cost: Path | None = None
    gpu_model: str | None = None
    gpu: str | None = None
    max_batch: int = MAX_BATCH

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: everything that shapes the output."""
        return {key: value for key, value in asdict(self).items() if key != "output"}
