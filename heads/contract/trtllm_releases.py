"""The releases of TensorRT-LLM that build Medusa engines, and the Triton container that holds each.

Sources: the package index (which releases exist); Triton's compatibility matrix for 25.01 to 25.12 (containers), TensorRT-LLM's
draft-target example (25.03 for 0.18), Triton's release notes for 25.05 (0.19), reports of users for 26.03 (1.2.0) and Triton's
tutorial for 26.07 (1.2.1). TensorRT-LLM pull request 15907 removed the engine backend, and Medusa with it, after 1.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from medusa_export.core.errors import ConfigError

FIRST = (0, 17)


@dataclass(frozen=True)
class TrtllmRelease:
    """One release.

    Attributes:
        name: as the package index has it.
        triton: month of the ``tritonserver`` container that holds it, None where none is known; an engine runs with the very release
            that built it.
    """

    name: str
    triton: str | None

    @property
    def numbers(self) -> tuple[int, ...]:
        """1.2.1 -> (1, 2, 1)."""
        return tuple(int(part) for part in self.name.removesuffix(".post1").split("."))

    @property
    def container(self) -> str:
        """The image that builds and runs its engines, and serves them where it is Triton's."""
        if self.triton is None:
            return f"nvcr.io/nvidia/tensorrt-llm/release:{self.name}"
        return f"nvcr.io/nvidia/tritonserver:{self.triton}-trtllm-python-py3"


RELEASES: tuple[TrtllmRelease, ...] = (
    TrtllmRelease("0.17.0.post1", "25.01"),
    TrtllmRelease("0.18.0", "25.03"),
    TrtllmRelease("0.18.1", None),
    TrtllmRelease("0.18.2", None),
    TrtllmRelease("0.19.0", "25.05"),
    TrtllmRelease("0.20.0", "25.07"),
    TrtllmRelease("0.21.0", "25.08"),
    TrtllmRelease("1.0.0", "25.10"),
    TrtllmRelease("1.1.0", "25.12"),
    TrtllmRelease("1.2.0", "26.03"),
    TrtllmRelease("1.2.1", "26.07"),
)
DEFAULT_RELEASE = RELEASES[-1].name


def find_release(text: str, where: str = "--trtllm-version") -> TrtllmRelease:
    """The release of that number; "0.18" is the last 0.18.

    Args:
        where: what the error names.

    Raises:
        ConfigError: no release number, one before 0.17, one that cannot build Medusa engines, or one that does not exist.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\.?(?:post|rc)\d+)?", text)
    known = ", ".join(release.name.removesuffix(".post1") for release in RELEASES)
    if match is None:
        raise ConfigError(where, repr(text), f"one of {known}", "correct it")
    numbers = tuple(int(number) for number in match.groups() if number is not None)
    if numbers[:2] > RELEASES[-1].numbers[:2]:
        raise ConfigError(
            where,
            f"{text}, which has no engine backend and so no Medusa",
            f"at most {RELEASES[-1].name}",
            "stay on 1.2.1, or serve the ONNX graph (OUT/engine, OUT/onnx) with ONNX Runtime or TensorRT",
        )
    if numbers[:2] < FIRST:
        raise ConfigError(where, text, "0.17 or later", "upgrade TensorRT-LLM")
    found = [release for release in RELEASES if release.numbers[: len(numbers)] == numbers]
    if not found:
        raise ConfigError(where, f"{text}, which was not released", f"one of {known}", "correct it")
    return found[-1]


def release_of_engine(version: object, where: str) -> TrtllmRelease:
    """The release that built an engine, from the ``version`` in its config.json.

    Raises:
        ConfigError: as :func:`find_release`.
    """
    return find_release(str(version), where)
