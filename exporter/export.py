"""The export from end to end: calibrate, write every target, check what was written, and publish it all at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from medusa_export.exporter.draft_vocab import DEFAULT_SIZE, most_frequent_tokens
from medusa_export.exporter.engine_dir import onnx_form, write_engine, write_onnx
from medusa_export.exporter.onnx_graph import require_supported
from medusa_export.exporter.trtllm import export_spec, write_trtllm
from medusa_export.exporter.verify import verify_trtllm
from medusa_export.heads.conversations import Prompt, load_prompts, read_tokenizer
from medusa_export.heads.errors import ConfigError, OutputError
from medusa_export.heads.manifest import check_free_space, hash_files, is_up_to_date, output_directory
from medusa_export.heads.model import MedusaCheckpoint
from medusa_export.heads.tree import PRESETS, Tree, load_tree
from medusa_export.quantize.calibration import DEFAULT_PROMPTS, token_batches
from medusa_export.quantize.formats import get_format, needs_calibration
from medusa_export.quantize.ptq import calibrate
from medusa_export.quantize.scales import Scales

logger = logging.getLogger(__name__)

ENGINES = ("onnxruntime", "none")
GPU_TREE, CPU_TREE = "medusa-63", "cpu-3"
DEFAULT_CALIB = Path(str(files("medusa_export.quantize") / "default_prompts.jsonl"))
MAX_LENGTH = 2048
CHECK_TEXTS, CHECK_TOKENS = 4, 64  # what a written engine is checked on
SMALL_MODEL = 1_000_000_000  # parameters up to which the written logits are compared with transformers

Progress = Callable[[str, int, int], None]
EngineCheck = Callable[[Path, Path | None, list[list[int]]], list[str]]


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

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: everything that shapes the output."""
        return {key: value for key, value in asdict(self).items() if key != "output"}


def export(
    arguments: ExportArguments, check_engine: EngineCheck, progress: Progress = lambda stage, done, total: None
) -> bool:
    """Write ``arguments.output``. Returns False when it was already there, made from the same inputs.

    Args:
        check_engine: runs a written engine and returns its problems; gets the engine, the checkpoint to compare it with (None for
            models too large to load beside it) and some texts. Passed in, because this package does not know the engines.

    Raises:
        MedusaExportError: bad input, found before any long work; nothing is left behind.
    """
    job = _Job(arguments)
    job.check()
    inputs = hash_files(job.input_files)
    if is_up_to_date(arguments.output, inputs, arguments.recorded()):
        return False
    with output_directory(arguments.output, inputs=inputs, arguments=arguments.recorded()) as out:
        check_free_space(out, job.estimated_bytes)
        job.write(out, progress)
        problems = job.verify(out, check_engine, progress)
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise OutputError(str(arguments.output), problems[0] + more, "a checkpoint that verifies", "report this")
    return True


class _Job:
    """One export's inputs, opened once."""

    def __init__(self, arguments: ExportArguments) -> None:
        self.arguments = arguments
        self.fmt = get_format(arguments.quant)
        if arguments.engine not in ENGINES:
            raise ConfigError("--engine", repr(arguments.engine), " or ".join(ENGINES), "pick one of them")
        self.checkpoint = MedusaCheckpoint.open(arguments.ckpt, arguments.heads)
        for warning in self.checkpoint.warnings:
            logger.warning("%s", warning)
        self.tokenizer = read_tokenizer(arguments.ckpt)
        self.trtllm_tree = _tree(arguments.tree, GPU_TREE, self.checkpoint.num_medusa_heads)
        self.engine_tree = _tree(arguments.tree, CPU_TREE, self.checkpoint.num_medusa_heads)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Calibration conversations; all of them, as the draft vocabulary counts them all."""
        return load_prompts(self.arguments.calib or DEFAULT_CALIB)

    @property
    def max_length(self) -> int:
        """Context of the engine."""
        return self.arguments.max_length or min(MAX_LENGTH, self.checkpoint.config.max_position_embeddings)

    @property
    def input_files(self) -> list[Path]:
        """Everything whose change makes another output."""
        given = [self.arguments.calib] if self.arguments.calib else []
        given += [Path(self.arguments.tree)] if self.arguments.tree and self.arguments.tree not in PRESETS else []
        tokenizer = [path for path in self.arguments.ckpt.glob("*") if path.name in TOKENIZER_FILES]
        return [*self.checkpoint.files, *sorted(tokenizer), *given]

    @property
    def estimated_bytes(self) -> int:
        """Upper bound of what is written: every target holds the weights once, every rank the whole embedding."""
        weights = sum(path.stat().st_size for path in self.checkpoint.files)
        lm_head = 4 * self.checkpoint.config.vocab_size * self.checkpoint.config.hidden_size
        copies = lm_head * (self.checkpoint.num_medusa_heads + self.arguments.tp - 1)
        return weights + copies + (2 * weights + 3 * lm_head if self.arguments.engine != "none" else 0)

    def check(self) -> None:
        """Every refusal that needs no computation, before the first of it."""
        arguments = self.arguments
        export_spec(
            self.checkpoint, self.fmt, tree=self.trtllm_tree, tp=arguments.tp, dtype=arguments.dtype,
            kv_cache=arguments.kv_cache, quant_heads=arguments.quant_heads,
        )  # fmt: skip
        if arguments.engine != "none":
            onnx_form(self.fmt)
            require_supported(self.checkpoint.config, self.max_length)
        if arguments.draft_vocab < 0:
            raise ConfigError("--draft-vocab", str(arguments.draft_vocab), "0 (all) or more", "correct it")
        if needs_calibration(self.fmt, arguments.kv_cache) or arguments.engine != "none":
            token_batches(
                self.tokenizer, self.prompts[:1], max_prompts=arguments.calib_prompts
            )  # there is a chat template
        _ = self.prompts

    def write(self, out: Path, progress: Progress) -> None:
        """Everything but the manifest."""
        arguments = self.arguments
        checkpoint, config = self.checkpoint, self.checkpoint.config
        logger.info(
            "%s: %s, %d layers, %s", arguments.ckpt, config.family.model_type, config.num_hidden_layers, config.dtype
        )
        logger.info("%d Medusa heads (%s)", checkpoint.num_medusa_heads, checkpoint.heads.layout)
        scales = self._scales(progress)
        if scales is not None:
            logger.info("%d modules calibrated", len(scales.weight_amax))
            scales.save(out / "scales.json")
        (out / "tree.json").write_text(self.trtllm_tree.to_json(), encoding="utf-8")
        self.tokenizer.save_pretrained(out / "tokenizer")
        logger.info("writing the TensorRT-LLM checkpoint, %d draft tokens", self.trtllm_tree.max_draft_len)
        write_trtllm(
            out / "trtllm", self.checkpoint, self.fmt, scales, tree=self.trtllm_tree, tp=arguments.tp,
            dtype=arguments.dtype, kv_cache=arguments.kv_cache, quant_heads=arguments.quant_heads,
            progress=lambda done, total: progress("TensorRT-LLM checkpoint", done, total),
        )  # fmt: skip
        if arguments.engine == "none":
            return
        logger.info("writing the ONNX graph and the engine, %d draft tokens", self.engine_tree.max_draft_len)
        progress("ONNX graph", 0, 1)
        write_onnx(out / "onnx", self.checkpoint, self.fmt, scales, max_length=self.max_length)
        progress("ONNX graph", 1, 1)
        progress("engine", 0, 1)
        source = {"checkpoint": str(arguments.ckpt), "quant": arguments.quant}
        write_engine(
            out / "engine", self.checkpoint, self.fmt, scales, tree=self.engine_tree, max_length=self.max_length,
            draft_vocab=self._draft_vocab(), save_tokenizer=self.tokenizer.save_pretrained, source=source,
        )  # fmt: skip
        progress("engine", 1, 1)

    def verify(self, out: Path, check_engine: EngineCheck, progress: Progress) -> list[str]:
        """Problems found in what was written."""
        logger.info("comparing what was written with %s", self.arguments.ckpt)
        progress("verify", 0, 2)
        problems = verify_trtllm(out / "trtllm", self.checkpoint)
        progress("verify", 1, 2)
        if not problems and (out / "engine").is_dir():
            texts = token_batches(self.tokenizer, self.prompts, max_prompts=CHECK_TEXTS, max_length=CHECK_TOKENS)
            config = self.checkpoint.config
            parameters = config.num_hidden_layers * sum(rows * width for rows, width in config.linear_shapes().values())
            problems = check_engine(out / "engine", self.arguments.ckpt if parameters < SMALL_MODEL else None, texts)
        progress("verify", 2, 2)
        return problems

    def _scales(self, progress: Progress) -> Scales | None:
        if not needs_calibration(self.fmt, self.arguments.kv_cache):
            return None
        batches = token_batches(self.tokenizer, self.prompts, max_prompts=self.arguments.calib_prompts)
        return calibrate(
            self.arguments.ckpt, self.checkpoint, self.fmt, kv_cache=self.arguments.kv_cache,
            quant_heads=self.arguments.quant_heads, batches=batches,
            progress=lambda done, total: progress("calibrate", done, total),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )  # fmt: skip

    def _draft_vocab(self) -> torch.Tensor | None:
        size, vocab_size = self.arguments.draft_vocab, self.checkpoint.config.vocab_size
        if not 0 < size < vocab_size:
            return None
        return most_frequent_tokens(self.tokenizer, self.prompts, size=size, vocab_size=vocab_size)


TOKENIZER_FILES = {
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
}  # fmt: skip


def _tree(spec: str | None, default: str, num_medusa_heads: int) -> Tree:
    """The tree asked for; the default one is cut to the heads there are, a given one has to fit as it is."""
    if spec is not None:
        tree = load_tree(spec, num_medusa_heads=num_medusa_heads)
        if not tree.max_draft_len:
            raise ConfigError("--tree", "an empty tree", "at least one choice", "leave it out for the default")
        return tree
    return Tree.from_choices(choice for choice in PRESETS[default] if len(choice) <= num_medusa_heads)
