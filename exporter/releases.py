"""What the releases of TensorRT-LLM do with a Medusa checkpoint.

Sources: the package index (which releases exist), TensorRT-LLM issue 7208 and pull request 7320 (Medusa built a Llama config
for every family before 1.2), pull request 15907 (the engine backend, and Medusa with it, removed after 1.2).
"""

from __future__ import annotations

import re

from medusa_export.heads.config import DecoderConfig
from medusa_export.heads.errors import ConfigError

DEFAULT_RELEASE = "1.2.1"
RELEASES = (
    "0.17.0.post1", "0.18.0", "0.18.1", "0.18.2", "0.19.0", "0.20.0", "0.21.0", "1.0.0", "1.1.0", "1.2.0", "1.2.1",
)  # fmt: skip
FIRST, QWEN_CONFIG = (0, 17), (1, 2)


def parse_release(text: str) -> tuple[int, ...]:
    """A release as numbers: "1.2.1" -> (1, 2, 1); "0.17" is every 0.17.

    Raises:
        ConfigError: no release number, one before 0.17, one that nobody can build Medusa engines with, or one that does not exist.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\.?(?:post|rc)\d+)?", text)
    known = ", ".join(dict.fromkeys(release.removesuffix(".post1") for release in RELEASES))
    if match is None:
        raise ConfigError("--trtllm-version", repr(text), f"one of {known}", "correct it")
    numbers = tuple(int(number) for number in match.groups() if number is not None)
    if numbers[:2] > _numbers(RELEASES[-1])[:2]:
        raise ConfigError(
            "--trtllm-version",
            f"{text}, which has no engine backend and so no Medusa",
            f"at most {RELEASES[-1]}",
            "stay on 1.2.1, or serve the ONNX graph (OUT/engine, OUT/onnx) with ONNX Runtime or TensorRT",
        )
    if numbers[:2] < FIRST:
        raise ConfigError("--trtllm-version", text, "0.17 or later", "upgrade TensorRT-LLM")
    if not any(_numbers(release)[: len(numbers)] == numbers for release in RELEASES):
        raise ConfigError("--trtllm-version", f"{text}, which was not released", f"one of {known}", "correct it")
    return numbers


def release_warnings(config: DecoderConfig, release: tuple[int, ...]) -> list[str]:
    """What to know about a family under a release, a line each.

    Raises:
        ConfigError: a family that this release would build wrongly without an error.
    """
    family = config.family.model_type
    if config.family.qk_norm and release[:2] < QWEN_CONFIG:
        raise ConfigError(
            f"--trtllm-version {'.'.join(map(str, release))} with {family}",
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


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.removesuffix(".post1").split("."))
