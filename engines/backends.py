"""The table of backends, and how an engine of any of them is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.protocols import TreeDecoder, WholeEngine
from medusa_export.engines.decoding.single_slot import OneSequence
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.tensorrt.build import TensorRtBuilder
from medusa_export.engines.tensorrt.engine import TensorRtEngine
from medusa_export.engines.trtllm.build import TrtllmBuilder
from medusa_export.engines.trtllm.engine import TrtllmEngine
from medusa_export.engines.trtllm.session import TIMEOUT
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.contract.engine_tools import EngineBuilder, NothingToBuild


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is opened; see the flags of medusa-run."""

    threads: int = 0
    trtllm_api: str = "runner"
    timeout: float = TIMEOUT


@dataclass(frozen=True)
class Backend:
    """What runs the engines of one kind.

    Attributes:
        open: the engine of a directory.
        builder: what an export builds such engines with.
        runs_batches: whether a step takes several sequences, for ``--sweep-batch``.
    """

    open: Callable[[Path, EngineOptions], Any]
    builder: Callable[[], EngineBuilder] = NothingToBuild
    runs_batches: bool = False


# What engine.json may name as its backend, and --engine.
BACKENDS: dict[str, Backend] = {
    "onnxruntime": Backend(lambda path, options: OnnxRuntimeEngine(path, threads=options.threads), runs_batches=True),
    "tensorrt": Backend(lambda path, options: TensorRtEngine(path), TensorRtBuilder),
    "tensorrt-llm": Backend(
        lambda path, options: TrtllmEngine(path, api=options.trtllm_api, timeout=options.timeout), TrtllmBuilder
    ),
}


def engine_builder(engine: str) -> EngineBuilder:
    """What builds the engines of an export's --engine, which may be none."""
    return BACKENDS[engine].builder() if engine in BACKENDS else NothingToBuild()


def open_engine(engine_dir: Path, **options: Any) -> Any:
    """The engine of a directory that medusa-export wrote: a StepEngine or a WholeEngine, and a Scorer.

    Args:
        options: the fields of :class:`EngineOptions`.

    Raises:
        ConfigError: a directory of another version.
    """
    backend = EngineInfo.load(engine_dir).backend
    if backend not in BACKENDS:
        raise ConfigError(f"{engine_dir}: backend", repr(backend), f"one of {', '.join(BACKENDS)}", "export again")
    return BACKENDS[backend].open(engine_dir, EngineOptions(**options))


def open_decoder(engine_dir: Path, *, slots: int, threads: int = 0) -> TreeDecoder:
    """Sequences of an engine in slots: as many as asked for where its steps take several, otherwise one.

    Args:
        engine_dir: of the engine.
        slots: sequences at once, at most.
        threads: intra-op threads; 0 takes one a core.

    Raises:
        ConfigError: a directory of another version, or an engine whose runtime decodes whole answers itself.
    """
    info = EngineInfo.load(engine_dir)
    if info.backend in BACKENDS and BACKENDS[info.backend].runs_batches:
        return TreeBatchDecoder(engine_dir, slots=slots, threads=threads)
    engine = open_engine(engine_dir, threads=threads)
    if isinstance(engine, WholeEngine):
        got = f"an engine for {info.backend}, whose runtime decodes whole answers itself"
        raise ConfigError(str(engine_dir), got, "one whose steps can be driven", "measure on an engine for onnxruntime")
    return OneSequence(engine)
