"""What medusa-export verify does: the exporter's checks and the engines', put together; Triton repositories likewise."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from medusa_export.core.errors import MedusaExportError, OutputError
from medusa_export.core.regular_files import found_instead
from medusa_export.exporter.cli.console import stdout

CHECK_TEXTS, CHECK_TOKENS = 2, 32  # what an engine is run on
PARTS = ("config.json", "trtllm", "engine", "hf", "heads")  # of an export whose manifest is lost; or a checkpoint alone


def verify_directory(out: Path, *, ckpt: Path | None, heads: Path | None, require_source: bool, quick: bool) -> None:
    """Check, print, and raise typer.Exit(1) when something is wrong; the arguments are the flags.

    Args:
        out: what was written: an export, a part of one, or a Triton repository.
        ckpt: base model that it was made from; None: what the manifest names, where that is found.
        heads: its heads, likewise.
        require_source: fail where the source is not found, instead of checking less.
        quick: do not run the engine.

    Raises:
        MedusaExportError: a source that was named and cannot be read, or that has to be there and is not.
    """
    from medusa_export.core.hub import BASE, BASE_WITH_HEADS, HEADS, find_model
    from medusa_export.exporter.verify.error_table import error_table
    from medusa_export.exporter.verify.findings import shortened
    from medusa_export.exporter.verify.parts.export import verify
    from medusa_export.heads.checkpoint.decoder_config import DecoderConfig

    _require_export(out)
    if ckpt is not None:
        wanted = BASE_WITH_HEADS if heads is None else BASE
        ckpt = find_model(ckpt, wanted=wanted, check=DecoderConfig.from_dir).path
    heads = None if heads is None else find_model(heads, wanted=HEADS).path
    found = triton_repository(out, ckpt, heads, quick=quick)
    if found is None:
        found = verify(out, ckpt=ckpt, heads=heads, run_engine=None if quick else run_written_engine)
    if isinstance(found.source, str):
        if require_source:
            raise OutputError(str(out), found.source, "the source, to compare with", "pass --ckpt")
        stdout.print(f"source not compared: {found.source}; pass --ckpt", soft_wrap=True)
    elif not found.findings:
        stdout.print(f"compared with {found.source.ckpt}", soft_wrap=True)
    if found.errors and not found.findings:
        when = "measured now" if found.measured else "as recorded at export, not measured now"
        stdout.print(error_table(found.errors, when))
    for line in shortened(found.findings):
        stdout.print(line, soft_wrap=True)
    if found.findings:
        raise typer.Exit(1)
    for note in [*_notes(out), *found.notes]:
        stdout.print(f"note: {note}", soft_wrap=True)
    stdout.print(f"{out}: complete and consistent", soft_wrap=True)


def _require_export(out: Path) -> None:
    """Raise OutputError for a path at which nothing looks like what can be checked."""
    from medusa_export.core.artifacts.manifest import MANIFEST

    kind = found_instead(out)
    if kind == "a directory" and any(os.path.lexists(out / name) for name in (MANIFEST, *PARTS)):
        return
    got = "a directory without either" if kind == "a directory" else kind or "a file"
    raise OutputError(str(out), got, f"an export, with {MANIFEST}, or a checkpoint, with config.json", "check the path")


def _notes(out: Path) -> list[str]:
    """What is unusual in a TensorRT-LLM checkpoint, of this project or another tool, without being an error."""
    from medusa_export.exporter.verify.trtllm_loader.check import load_notes

    places = (out / "trtllm", out)
    checkpoint = next((path for path in places if any(path.glob("rank*.safetensors"))), None)
    return [] if checkpoint is None else load_notes(checkpoint)


def run_written_engine(engine: Path, ckpt: Path | None) -> list[str]:
    """The engine on the built-in prompts; against the checkpoint as far as that fits into memory beside it."""
    from medusa_export.core.text.prompts import load_prompts
    from medusa_export.core.text.tokenizer import read_tokenizer
    from medusa_export.engines.verify.written_engine import run_engine
    from medusa_export.exporter.job.arguments import DEFAULT_CALIB, SMALL_MODEL
    from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
    from medusa_export.quantize.calibration_data import token_batches

    try:
        prompts = load_prompts(DEFAULT_CALIB, CHECK_TEXTS)
        texts = token_batches(read_tokenizer(engine), prompts, max_prompts=CHECK_TEXTS, max_length=CHECK_TOKENS)
        if ckpt is not None:
            config = DecoderConfig.from_dir(ckpt)
            layer = sum(rows * width for rows, width in config.linear_shapes().values())
            ckpt = ckpt if config.num_hidden_layers * layer < SMALL_MODEL else None
        return run_engine(engine, ckpt, texts)
    except MedusaExportError as error:
        return [str(error)]


def triton_repository(out: Path, ckpt: Path | None, heads: Path | None, *, quick: bool) -> Any:
    """What is wrong with a Triton repository; None for other directories.

    Args:
        ckpt: base model to compare with; None: the recorded one.
        heads: Medusa heads to compare with; None: the recorded ones.
        quick: do not run the engine.
    """
    from medusa_export.core.artifacts.manifest import has_manifest, read_manifest
    from medusa_export.exporter.verify.findings import Findings
    from medusa_export.exporter.verify.parts.export import Verification
    from medusa_export.exporter.verify.parts.source import find_source

    try:
        arguments = read_manifest(out)["arguments"] if has_manifest(out) else {}
    except OutputError:
        return None  # said by the check of the files
    check = TRITON_CHECKS.get(str(arguments.get("kind")))
    if check is None:
        return None
    result = Verification(out, find_source(None, ckpt, heads), Findings())
    check(out, result, str(arguments.get("name")), quick)
    return result


def _check_python_repository(out: Path, result: Any, name: str, quick: bool) -> None:
    """The repository's own checks, and its engine as one beside an export."""
    from medusa_export.engines.serving.triton.repository import ENGINE, VERSION, verify_repository
    from medusa_export.exporter.verify.parts.export import verify_engine

    result.findings.say("repository", verify_repository(out))
    verify_engine(out / name / VERSION / ENGINE, result, None if quick else run_written_engine)


def _check_trtllm_repository(out: Path, result: Any, name: str, quick: bool) -> None:
    """The repository's own checks; of what it says of the model, with the source: its tokenizer and its sizes."""
    from medusa_export.core.json_fields import read_json
    from medusa_export.engines.serving.triton_trtllm.repository import (
        built_config,
        tokenizer_of,
        verify_trtllm_repository,
    )
    from medusa_export.exporter.verify.comparison import config_differences
    from medusa_export.exporter.verify.parts.tokenizers import tokenizer_problems

    if result.findings.say("repository", verify_trtllm_repository(out)):
        return
    source = None if isinstance(result.source, str) else result.source
    with result.findings.guarded("tokenizer"):
        config = read_json(built_config(out))["pretrained_config"]
        vocab_size, other = config.get("vocab_size", sys.maxsize), source.ckpt if source else None
        problems = tokenizer_problems(tokenizer_of(out), vocab_size, other, "the source's", own_template=True)
        result.findings.say("tokenizer", problems)
        if source is not None:
            result.findings.say("config", config_differences(config, source.checkpoint))


# Kind of a repository, as its manifest names it -> what is checked, of (directory, result, model's name, quick).
TRITON_CHECKS: Mapping[str, Callable[[Path, Any, str, bool], None]] = {
    "python": _check_python_repository,
    "tensorrt-llm": _check_trtllm_repository,
}
