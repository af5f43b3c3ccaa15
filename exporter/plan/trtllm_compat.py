"""What the releases of TensorRT-LLM do with families of models, formats and trees.

Sources: TensorRT-LLM issue 7208 and pull request 7320 (Medusa built a Llama config for every family before 1.2).
"""

from __future__ import annotations

from medusa_export.core.errors import ConfigError, TreeError
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.contract.trtllm_releases import TrtllmRelease
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize.formats import Format

QWEN_CONFIG = (1, 2)


def require_no_gaps(tree: Tree) -> None:
    """Raise TreeError for a tree whose first level leaves a rank out.

    TensorRT-LLM's Python runtime counts that level by its largest rank: [1], [6], [7] become eight nodes, and all after them move.
    Further down it goes by the paths, and a gap does no harm.
    """
    ranks = sorted(choice[0] for choice in tree.choices if len(choice) == 1)
    missing = sorted(set(range(max(ranks, default=-1) + 1)) - set(ranks))
    if missing:
        raise TreeError(
            f"tree choice {[ranks[-1]]}",
            f"no {[missing[0]]} beside it (TensorRT-LLM's Python runtime would number other nodes)",
            "a first level from rank 0 on, without gaps",
            "take the more likely candidate first, or search the tree with medusa-tree",
        )


def release_warnings(config: DecoderConfig, release: TrtllmRelease, weight_format: Format) -> list[str]:
    """What to know about a family or a format under a release, a line each.

    Args:
        config: of the base model.
        release: that will build the engine.
        weight_format: of the linears.

    Raises:
        ConfigError: a family that this release would build wrongly without an error.
    """
    family = config.family.model_type
    if config.family.qk_norm and release.numbers[:2] < QWEN_CONFIG:
        raise ConfigError(
            f"--trtllm-version {release.name} with {family}",
            "a release that reads Medusa checkpoints as Llama, which has no q and k norms",
            "1.2 or later",
            "use --trtllm-version 1.2.1",
        )
    warnings = []
    if config.family.qk_norm:
        warnings.append(
            f"{family}: q and k norms are written under TensorRT-LLM's names, but its Medusa model was seen with qwen2 only; compare "
            "the engine's output with the ONNX Runtime engine's before you serve it"
        )
    windows = config.windows_within(config.max_position_embeddings)
    if windows is not None:
        sizes = ",".join(map(str, windows)) if isinstance(windows, list) else str(windows)
        warnings.append(
            f"{family}: sliding window of {config.sliding_window} tokens; TensorRT-LLM takes it at run time "
            f"(max_attention_window_size {sizes}), the checkpoint cannot hold it"
        )
    if weight_format.trtllm.fails_unmended:
        warnings.append(
            f"{weight_format.name}: trtllm-build fails on it with Medusa ('use_int8_weight'); build.sh and medusa-export mend the "
            "class, a build of your own has to as well (docs/tensorrt-llm.md)"
        )
    return warnings
