"""What the releases of TensorRT-LLM do with the families of models.

Sources: TensorRT-LLM issue 7208 and pull request 7320 (Medusa built a Llama config for every family before 1.2).
"""

from __future__ import annotations

from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.contract.trtllm_releases import TrtllmRelease

QWEN_CONFIG = (1, 2)


def release_warnings(config: DecoderConfig, release: TrtllmRelease) -> list[str]:
    """What to know about a family under a release, a line each.

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
    if config.sliding_window is not None:
        warnings.append(
            f"{family}: sliding window of {config.sliding_window} tokens; TensorRT-LLM takes it at run time "
            f"(max_attention_window_size {config.sliding_window}), the checkpoint cannot hold it"
        )
    return warnings
