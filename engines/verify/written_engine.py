"""Opens and runs what an export left: the engine against the checkpoint, several sequences at once against each alone."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import MedusaExportError
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.verify.selfcheck import bound_of, check_engine
from medusa_export.heads.contract.engine_info import BATCH_DECODER_FILE, EngineInfo


def run_engine(engine_dir: Path, reference: Path | None, texts: Sequence[Sequence[int]]) -> list[str]:
    """Problems of a written engine when it runs, one line each; see :func:`check_engine` for the arguments.

    Args:
        engine_dir: what medusa-export wrote.
        reference: the original checkpoint; None skips the comparison with it.
        texts: token ids to run.
    """
    try:
        problems = check_engine(engine_dir, reference, texts)
        if problems or not (engine_dir / BATCH_DECODER_FILE).is_file():
            return problems
        gc.collect()
        return batch_problems(engine_dir, texts)
    except MedusaExportError as error:
        return [str(error)]
    except Exception as error:  # runtimes raise classes of their own, all derived from Exception
        return [f"it does not run ({' '.join(str(error).split())})"]


def _alone(engine_dir: Path, texts: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float32]]:
    """Logits behind the last two tokens of each text, one sequence at a time.  # [2, V] each"""
    engine = OnnxRuntimeEngine(engine_dir)
    return [np.concatenate(list(engine.score(text, chunk=1, start=len(text) - 2))) for text in texts]


def batch_problems(engine_dir: Path, texts: Sequence[Sequence[int]]) -> list[str]:
    """Whether several sequences at once give the logits that each gives alone, prompts and one step behind them."""
    info = EngineInfo.load(engine_dir)
    longest = info.max_length - 2
    usable = [list(text)[:longest] for text in texts if len(text) >= 2][:2]
    if not usable:
        return []
    expected = _alone(engine_dir, usable)
    gc.collect()  # engines hold on to their own steps: two of them at once take as much memory as the whole export
    together = TreeBatchDecoder(engine_dir, slots=len(usable))
    prompts = []
    for text in usable:
        together.begin(text[:-1])
        logits = None
        while logits is None:
            logits = together.prefill_chunk(len(text))
        prompts.append(logits)
    steps = together.step([text[-1] for text in usable])  # [B, V]
    found = [np.stack(pair) for pair in zip(prompts, steps, strict=True)]
    width = info.sampled  # ids that no tokenizer knows may be left out
    pairs = zip(found, expected, strict=True)
    errors = [float(np.abs(one[:, :width] - other[:, :width]).max()) for one, other in pairs]
    bound = bound_of(info).max_tree_noise
    if all(error <= bound for error in errors):  # NaN is not
        return []
    return [
        f"{BATCH_DECODER_FILE}: logits differ by {max(errors):.3g} from those of one sequence, expected at most {bound}"
    ]
