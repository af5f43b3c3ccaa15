"""The flags of an export as a library takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from medusa_export.core.flags import COUNT, NUMBER, flag
from medusa_export.core.hub import BASE, BASE_WITH_HEADS, HEADS, REVISION_HELP, ModelFiles, find_model, hub_id
from medusa_export.core.hub_headers import find_headers
from medusa_export.core.text.tokenizer import CHAT_TEMPLATE_HELP
from medusa_export.core.typed_paths import as_recorded
from medusa_export.exporter.job.draft_vocab import DEFAULT_SIZE
from medusa_export.exporter.job.engine_kinds import CPU_TREE, ENGINES, GPU_TREE, NO_ENGINE
from medusa_export.exporter.job.output_forms import DEFAULT_FORM, OUTPUT_FORMS
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.contract.trtllm_releases import DEFAULT_RELEASE
from medusa_export.heads.roofline.gpus import BY_KEY
from medusa_export.heads.trees.tree import PRESETS
from medusa_export.quantize.calibration_data import DEFAULT_PROMPTS
from medusa_export.quantize.formats import FORMATS, KV_CACHE, group_sizes
from medusa_export.quantize.tensorrt_targets import TARGETS, named

SMALL_MODEL = 1_000_000_000  # parameters up to which the written logits are compared with transformers


AUTO = "auto"
DEFAULT_CALIB = Path(str(files("medusa_export.quantize") / "default_prompts.jsonl"))
MAX_LENGTH, MAX_BATCH = 2048, 4  # TensorRT-LLM's own example builds for 4: with more, trees cost more than they give


INPUT, OUTPUT, QUANTIZATION = "Input", "Output", "Quantization"
TRTLLM, ENGINE, TREE = "TensorRT-LLM", "Engine", "Tree"  # headings of --help


def _beside(given: Mapping[str, Any]) -> Path:
    """Where an export goes by default: beside a local model, and into the working directory for one of the hub."""
    found = hub_id(given["ckpt"])
    ckpt = (Path(Path(found["repo"]).name) if found else Path(given["ckpt"])).resolve()
    return ckpt.with_name(f"{ckpt.name}-{given['quant']}")


def _descriptions(rows: Mapping[str, Any]) -> dict[str, str]:
    return {name: row.description for name, row in rows.items()}


@dataclass(frozen=True)
class ExportArguments:
    """The flags of medusa-export; see its --help. ``None`` takes the default that suits the checkpoint."""

    ckpt: Path = flag(help="Base model: a Hugging Face directory, or owner/name on the hub.", panel=INPUT)
    output: Path = flag(
        help="Directory to write.",
        panel=OUTPUT,
        default="CKPT-QUANT beside CKPT, or in the current directory for a model on the hub",
        derive=_beside,
    )
    quant: str = flag("none", help="Weight format.", panel=QUANTIZATION, choices=_descriptions(FORMATS))
    heads: Path | None = flag(
        None, help="Medusa heads, when they are not inside CKPT: a path, or owner/name on the hub.", panel=INPUT
    )
    kv_cache: str = flag("none", help="Key/value cache format.", panel=QUANTIZATION, choices=_descriptions(KV_CACHE))
    quant_heads: bool = flag(
        False, help="Quantize the heads too, instead of leaving them in 16 bit.", panel=QUANTIZATION, opposite="--no-quant-heads"
    )  # fmt: skip
    dtype: str = flag(
        AUTO, help="16-bit type to write; auto: the checkpoint's own.", panel=QUANTIZATION, choices=(AUTO, "float16", "bfloat16")
    )  # fmt: skip
    tp: int = flag(1, help="Tensor-parallel ranks.", panel=TRTLLM, bounds=NUMBER)
    tree: str | None = flag(
        None, help=f"Medusa tree: a JSON file, one of {', '.join(PRESETS)}, or auto: measured on the written engine.", panel=TREE,
        metavar="FILE|PRESET|auto", suggestions=(*PRESETS, AUTO),
        default=f"auto with --prompts, else {GPU_TREE} for GPUs and {CPU_TREE} for ONNX Runtime",
    )  # fmt: skip
    calib: Path | None = flag(
        None, help="Calibration prompts, JSONL with messages, turns or prompt.", panel=QUANTIZATION, default="built in"
    )  # fmt: skip
    calib_prompts: int = flag(
        DEFAULT_PROMPTS, help="Number of prompts to calibrate with.", panel=QUANTIZATION, bounds=NUMBER
    )
    engine: str = flag(
        "onnxruntime", help="Engine to write.", panel=ENGINE, choices={**_descriptions(ENGINES), NO_ENGINE: "no engine"}
    )  # fmt: skip
    max_length: int | None = flag(
        None, help="Context of the engine, in tokens.", panel=ENGINE, default=f"the model's, up to {MAX_LENGTH}",
        bounds=NUMBER,
    )  # fmt: skip
    draft_vocab: int = flag(
        DEFAULT_SIZE, help="Draft from the N most frequent tokens only, on a CPU; 0: from all.", panel=ENGINE, metavar="N",
        bounds=COUNT,
    )  # fmt: skip
    scales: Path | None = flag(
        None, help="Use the calibration of another export: its directory, or its file of scales.", panel=QUANTIZATION
    )  # fmt: skip
    group_size: int | None = flag(
        None, help=f"Input channels that share a scale, {group_sizes()}", panel=QUANTIZATION, default="the format's", bounds=NUMBER,
    )  # fmt: skip
    exclude: tuple[str, ...] = flag(
        (), help="Leave these linears in 16 bit too: TensorRT-LLM names, such as '*mlp.proj*'. Can be repeated.",
        panel=QUANTIZATION, metavar="PATTERN",
    )  # fmt: skip
    trtllm_version: str = flag(
        DEFAULT_RELEASE, help="TensorRT-LLM release that will build the engine: 0.17 to 1.2.1.", panel=TRTLLM, metavar="VERSION"
    )  # fmt: skip
    pp: int = flag(1, help="Pipeline-parallel stages; Medusa engines need 1.", panel=TRTLLM, bounds=NUMBER)
    format: str = flag(DEFAULT_FORM, help="What to write.", panel=OUTPUT, choices=_descriptions(OUTPUT_FORMS))
    prompts: Path | None = flag(
        None, help="Prompts like those to be served, JSONL: the tree is measured on them.", panel=TREE
    )  # fmt: skip
    tree_cost: Path | None = flag(
        None, help="cost.json of TensorRT-LLM's GPU.", panel=TREE, default="estimated for --gpu-model"
    )
    gpu_model: str | None = flag(
        None, help="GPU to choose TensorRT-LLM's tree for; step costs are estimated from its data sheet.", panel=TREE,
        choices=tuple(BY_KEY), default="all trees up to 64 nodes cost the same",
    )  # fmt: skip
    gpu: str | None = flag(
        None, help=f"GPUs to build the TensorRT engine for, such as sm89,sm120, among {named(TARGETS)}.", panel=ENGINE,
        metavar="SM,SM", default="all that TensorRT-RTX builds the format for",
    )  # fmt: skip
    max_batch: int = flag(
        MAX_BATCH, help="Maximum sequences that a TensorRT-LLM engine runs at once; each step verifies a tree for each.",
        panel=TRTLLM, bounds=NUMBER,
    )  # fmt: skip
    revision: str | None = flag(None, help=REVISION_HELP, panel=INPUT)
    chat_template: Path | None = flag(None, help=CHAT_TEMPLATE_HELP, panel=INPUT)

    @cached_property
    def base(self) -> ModelFiles:
        """The base model, downloaded where ``ckpt`` names one of the hub."""
        wanted = BASE if self.heads is not None else BASE_WITH_HEADS
        return find_model(self.ckpt, revision=self.revision, wanted=wanted, check=DecoderConfig.from_dir)

    def read_headers(self, folder: Path) -> None:
        """Of a model of the hub, take the headers of its weights instead of a download: for plans, which read no values.

        Args:
            folder: where they are kept as long as this is used.
        """
        wanted = BASE if self.heads is not None else BASE_WITH_HEADS
        kept: dict[str, Any] = self.__dict__  # of the cached properties
        kept["base"] = find_headers(
            self.ckpt, folder / "base", revision=self.revision, wanted=wanted, check=DecoderConfig.from_dir
        )
        kept["own_heads"] = self.heads and find_headers(self.heads, folder / "heads", wanted=HEADS)

    @cached_property
    def own_heads(self) -> ModelFiles | None:
        """The heads, downloaded where ``heads`` names some of the hub; None where they are inside the base model."""
        return None if self.heads is None else find_model(self.heads, wanted=HEADS)

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: everything that shapes the output, and nothing that another machine would call otherwise."""
        values = {key: value for key, value in asdict(self).items() if key != "output"}
        values |= {key: as_recorded(value) for key, value in values.items() if isinstance(value, Path)}
        return values | ({"tree": as_recorded(self.tree)} if self.tree else {})
