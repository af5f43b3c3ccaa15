"""What people have: the exported engine's greedy tokens are those of transformers' ``generate`` on the same checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.exporter.engine_dirs.onnxruntime import write_engine
from medusa_export.exporter.onnx.decoder import require_supported
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference
from medusa_export.heads.trees.tree import load_tree
from medusa_export.quantize.formats import FORMATS

PROMPT, TOKENS = [1, 20, 7, 7, 11, 12, 23, 3], 40
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 32}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


# Family and what config.json says. Contexts are 64 tokens.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "window off": ("qwen2", {"sliding_window": 32, "use_sliding_window": False}),
    "window of layers that are not there": ("qwen2", {**WINDOW, "max_window_layers": 2}),
    "window of no layer": ("qwen3", {**WINDOW, "head_dim": 32, "layer_types": ["full_attention"] * 2}),
    "window as long as the context": ("mistral", {"sliding_window": 64}),
    "dynamic": ("llama", rope(rope_type="dynamic", factor=4.0)),
    "linear": ("llama", rope(rope_type="linear", factor=2.0)),
    "yarn": ("llama", rope(**YARN)),
    "yarn with an attention factor": ("llama", rope(**YARN, attention_factor=1.4)),
    "yarn, not truncated": ("llama", rope(**YARN, truncate=False)),
    "window switched off for all layers": ("qwen2", {"max_window_layers": 0}),
}  # fmt: skip
NAMES: dict[str, tuple[Callable[[str], str], bool]] = {
    "tied under lm_head alone": (lambda name: name.replace("model.embed_tokens", "lm_head"), True),
    "without a prefix": (lambda name: name.removeprefix("model."), False),
    "out of a wrapper": (lambda name: f"module.{name}", False),
}


@pytest.fixture
def tokens_of(tmp_path: Path, tiny_heads: Any, tiny_tokenizer: Any) -> Callable[[Path], tuple[list[int], list[int]]]:
    """``tokens_of(checkpoint) -> (the engine's, transformers')``."""

    def decode(ckpt: Path) -> tuple[list[int], list[int]]:
        checkpoint = MedusaCheckpoint.open(ckpt, tiny_heads(tmp_path / "heads"))
        require_supported(checkpoint.config, 64)
        write_engine(
            tmp_path / "engine", checkpoint, FORMATS["none"], None, tree=load_tree("cpu-8"), max_length=64,
            draft_vocab=None, save_tokenizer=tiny_tokenizer, source={"checkpoint": "tiny"},
        )  # fmt: skip
        engine = OnnxRuntimeEngine(tmp_path / "engine")
        ours = generate(engine, PROMPT, load_tree("cpu-8"), max_new_tokens=TOKENS, eos_token_ids=()).tokens
        model: Any = load_reference(ckpt, torch.float32)
        ids = torch.tensor([PROMPT])
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
        )
        return ours, text[0, len(PROMPT) :].tolist()

    return decode


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, tmp_path: Path, tiny_checkpoint: Any, tokens_of: Callable[..., Any]) -> None:
    family, config = CONFIGS[case]
    ours, theirs = tokens_of(tiny_checkpoint(tmp_path / "model", family, **config))
    assert len(ours) == TOKENS
    assert ours == theirs


def test_the_scaling_matters(tmp_path: Path, tiny_checkpoint: Any, tokens_of: Callable[..., Any]) -> None:
    """The models above would say something else without it."""
    ckpt = tiny_checkpoint(tmp_path / "model", **rope(**YARN))
    _, scaled = tokens_of(ckpt)
    model: Any = load_reference(tiny_checkpoint(tmp_path / "plain"), torch.float32)
    ids = torch.tensor([PROMPT])
    plain = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
    )
    assert plain[0, len(PROMPT) :].tolist() != scaled


@pytest.mark.parametrize("case", NAMES)
def test_names(case: str, tmp_path: Path, tiny_checkpoint: Any, tokens_of: Callable[..., Any]) -> None:
    rename, tied = NAMES[case]
    ckpt = tiny_checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    file = ckpt / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    ours, theirs = tokens_of(ckpt)
    assert ours == theirs


def test_shards_with_a_superseded_copy(tmp_path: Path, tiny_checkpoint: Any, tokens_of: Callable[..., Any]) -> None:
    ckpt = tiny_checkpoint(tmp_path / "model", max_shard_size="100KB")
    index = json.loads((ckpt / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted({*index.values()})
    name = next(name for name, shard in index.items() if shard == shards[-1])
    first = load_file(ckpt / shards[0])
    save_file({**first, name: torch.zeros_like(load_file(ckpt / shards[-1])[name])}, ckpt / shards[0], {"format": "pt"})
    ours, theirs = tokens_of(ckpt)
    assert ours == theirs


@pytest.mark.parametrize("config", [{**WINDOW, "max_window_layers": 1}, {**WINDOW, "max_window_layers": 0}])
def test_a_window_that_is_shorter_is_refused(
    config: dict[str, Any], tmp_path: Path, tiny_checkpoint: Any, tokens_of: Any
) -> None:
    with pytest.raises(ConfigError, match=r"sliding_window: got 32 with a context of 64; .*--max-length 32"):
        tokens_of(tiny_checkpoint(tmp_path / "model", "qwen2", **config))
