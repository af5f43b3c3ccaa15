"""The same checkpoint in the form that each of ``peers.py``'s contenders takes, made offline by its own tools, once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint

REQUIREMENTS = Path(__file__).with_name("peers-requirements.txt")
SECONDS = 3600  # for one tool
GGUF_FAMILIES = {"llama": "llama"}  # model_type -> GGUF's architecture
GENAI_OPTIONS = {"int8": ["--extra_options", "accuracy_level=4"]}  # by precision


class UnavailableError(Exception):
    """A contender that cannot be had, and why."""


def environment(work: Path) -> Path:
    """The Python of the contenders' own environment, made on first use."""
    python, ready = (
        work / "venv/bin/python",
        work / "venv" / f"ready-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}",
    )
    if not ready.exists():
        venv.create(work / "venv", with_pip=True, clear=True)
        _run([python, "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS])
        # optimum-intel asks for it, but only images need it; a build for another torch breaks every import of transformers.
        _run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"])
        ready.touch()
    return python


def gguf_file(checkpoint: Path, out: Path, quantization: str, *, vocabulary: bool = False) -> None:
    """A GGUF file of a Llama checkpoint.

    Args:
        quantization: "F32" or "Q8_0", of all matrices; norms stay in float32, as llama.cpp's own tool does it.
        vocabulary: with tokens, merges and chat template, as a server needs it; otherwise token ids in, logits out.
    """
    import gguf

    source = MedusaCheckpoint.open_base(checkpoint)
    config = source.config
    if config.family.model_type not in GGUF_FAMILIES or config.rope_scaling:
        raise UnavailableError(f"the GGUF writer here knows Llama without rope scaling, not {config.family.model_type}")
    writer = gguf.GGUFWriter(out, GGUF_FAMILIES[config.family.model_type])
    _metadata(writer, config)
    if vocabulary:
        _vocabulary(writer, checkpoint, config.vocab_size)
    else:
        writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    kind = gguf.GGMLQuantizationType[quantization]
    for name in config.tensor_shapes():
        values = source.read(name).float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            values = _interleaved(values, heads)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise UnavailableError(f"GGUF has no name for {name}")
        if values.ndim == 1 or quantization == "F32":
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(writer: object, config: DecoderConfig) -> None:
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_theta,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)


def _vocabulary(writer: Any, checkpoint: Path, size: int) -> None:
    """Of a byte-level BPE tokenizer, which is what SmolLM2 has: its kind of pre-tokenizer has a name of its own in llama.cpp."""
    import gguf

    model = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    if model["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(model["pre_tokenizer"]):
        raise UnavailableError("the GGUF writer here knows byte-level BPE tokenizers only")
    tokens = {number: text for text, number in model["model"]["vocab"].items()}
    added = {item["id"]: item["content"] for item in model["added_tokens"]}
    texts = [added.get(number) or tokens.get(number) or f"[PAD{number}]" for number in range(size)]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(texts)
    writer.add_token_types([
        kinds.CONTROL if number in added else kinds.NORMAL if number in tokens else kinds.UNUSED for number in range(size)
    ])  # fmt: skip
    gguf.SpecialVocab(checkpoint, load_merges=True, n_vocab=size).add_to_gguf(writer)


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows, Hugging Face the two halves of a head.  # [heads * D, ...]"""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def openvino_model(checkpoint: Path, out: Path, python: Path, weights: str) -> None:
    """optimum-intel's export; ``weights`` is "fp32" or "int8" (its default form of 8 bits)."""
    command: list[str | Path] = ["export", "openvino", "--model", checkpoint, "--task", "text-generation-with-past"]
    _run([python.with_name("optimum-cli"), *command, "--weight-format", weights, out])


def genai_model(checkpoint: Path, out: Path, python: Path, precision: str) -> None:
    """onnxruntime-genai's model builder; 8 bits with 8-bit products, which is what this project's engine does."""
    cache = out.with_name("builder-cache")
    command: list[str | Path] = ["-i", checkpoint, "-o", out, "-p", precision, "-e", "cpu", "-c", cache]
    _run([python, "-m", "onnxruntime_genai.models.builder", *command, *GENAI_OPTIONS.get(precision, [])])


def made_once(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made by ``make`` unless it is there; never half of it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        if partial.is_dir():
            shutil.rmtree(partial)
        make(partial)
        partial.rename(path)
    return path


def _run(command: Sequence[str | Path]) -> None:
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    print("making a contender:", *(Path(part).name for part in command[:3]), file=sys.stderr)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=variables, timeout=SECONDS)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise UnavailableError(f"{Path(command[0]).name}: {lines[-1]}")
