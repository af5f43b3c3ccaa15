"""The decoder that a server drives, opened from an engine's directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.batch_trees import BatchTrees
from medusa_export.engines.decoding.draft_kinds import Engine, open_drafter, require_drafts
from medusa_export.engines.decoding.drafters import Drafter
from medusa_export.engines.decoding.protocols import TreeDecoder
from medusa_export.engines.decoding.single_slot import OneSequence
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.heads.contract.engine_info import EngineInfo


def _many(engine_dir: Path, options: ServingOptions) -> TreeDecoder:
    slots = min(options.max_batch, cache_slots(EngineInfo.load(engine_dir), options.kv_cache_mb))
    return TreeBatchDecoder(engine_dir, slots=slots, threads=options.threads)


def _one(engine_dir: Path, options: ServingOptions) -> TreeDecoder:
    from medusa_export.engines.tensorrt.engine import TensorRtEngine

    return OneSequence(TensorRtEngine(engine_dir))


@dataclass(frozen=True)
class ServedBackend:
    """How a server decodes with the engines of one backend.

    Attributes:
        open: the decoder of an engine directory.
        unused: options that mean nothing to it.
    """

    open: Callable[[Path, ServingOptions], TreeDecoder]
    unused: tuple[str, ...] = ()


SERVED = {
    "onnxruntime": ServedBackend(_many),
    "tensorrt": ServedBackend(_one, ("max_batch", "kv_cache_mb", "prefill_tokens", "threads")),
}


def open_served(
    engine_dir: Path, info: EngineInfo, options: ServingOptions, trees: BatchTrees
) -> tuple[TreeDecoder, Drafter]:
    """What decodes an engine's sequences, and what drafts for them.

    Args:
        trees: of the heads' drafts, by the number of sequences.
    """
    decoder = SERVED[info.backend].open(engine_dir, options)
    drafter = open_drafter(options.drafts, Engine(engine_dir, info, trees, decoder.max_nodes))
    decoder.prepare(drafter.trees, drafter.depths)
    return decoder, drafter


def require_served(engine_dir: Path, info: EngineInfo, options: ServingOptions) -> None:
    """Raise ConfigError for an engine that this project's own servers do not decode with, or options that it has no use for.

    Args:
        engine_dir: what errors name.
        info: its engine.json.
        options: of the server.
    """
    if info.backend not in SERVED:
        got, expected = f"an engine for {info.backend}", f"one for {' or '.join(SERVED)}"
        raise ConfigError(str(engine_dir), got, expected, "see medusa-triton for tensorrt-llm")
    require_drafts(options.drafts, info)
    for name in SERVED[info.backend].unused:
        if getattr(options, name) != getattr(ServingOptions(), name):
            flag = f"--{name.replace('_', '-')}"
            got = f"{getattr(options, name)} for an engine of {info.backend}, which answers one request after another"
            raise ConfigError(flag, got, "the default, which changes nothing there", f"leave {flag} out")


def cache_slots(info: EngineInfo, megabytes: int) -> int:
    """Sequences of an engine's full length whose keys and values fit into so much memory.

    Raises:
        ConfigError: not one.
    """
    row = 2 * info.num_hidden_layers * info.num_key_value_heads * info.head_dim * 4  # float32
    slots = megabytes * 1_000_000 // (row * info.max_length)
    if not slots:
        needed = f"{-(-row * info.max_length // 1_000_000)} MB for one sequence of {info.max_length} tokens"
        raise ConfigError("--kv-cache-mb", f"{megabytes}", needed, "raise it, or export with a smaller --max-length")
    return slots
