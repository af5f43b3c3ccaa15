"""Why ``trtllm-build`` failed, in one line: what its log says, what that means for a Medusa checkpoint, and the way out.

Sources of the messages: TensorRT-LLM's modeling_utils.py, parameter.py, builder.py and commands/build.py; its issues 1109, 1845,
2115, 2478 and 2678; CUDA's and TensorRT's own texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from medusa_export.core.errors import MedusaExportError


class BuildError(MedusaExportError):
    """``trtllm-build`` ended without an engine."""


@dataclass(frozen=True)
class Failure:
    """One known failure; the first whose pattern the log holds explains it.

    Attributes:
        pattern: a regular expression; its first group, if any, goes into ``means``.
        means: what was found wrong; ``{}`` is the group.
        action: what to do.
    """

    pattern: str
    means: str
    action: str


VERIFY = (
    "run medusa-export verify on the export; if it finds nothing, export for the installed release (--trtllm-version)"
)
CONTAINER = "build in the container of this release (see build.sh)"
SMALLER = "build with a smaller --max-batch or --max-length, or export with another --quant or --tp"
FAILURES: tuple[Failure, ...] = (
    Failure(r"Required but not provided tensors:\s*(.{1,200})", "tensors that the checkpoint lacks: {}", VERIFY),
    Failure(
        r"(?:has no attribute|AttributeError:) \W*use_int8_weight",
        "INT4 AWQ layers that Medusa's second quantization pass cannot read",
        "build with the export's build.sh, which mends the class, or set use_int8_weight = False on it in every builder process",
    ),
    Failure(
        r"'tuple' object has no attribute 'rank'",
        "a row-wise FP8 norm at the end (exclude_modules lacks *ln_f)",
        "export again with this version of medusa-export; it names the norm",
    ),
    Failure(
        r"(?:not the same shape as the original|shape mismatch)\W*(.{0,200})", "a tensor of another shape: {}", VERIFY
    ),
    Failure(
        r"got an unexpected keyword argument '(\w+)'",
        "a key of config.json that this release does not know: {}",
        "install the release that --trtllm-version names, or export for the installed one",
    ),
    Failure(
        r"(?:can't set attribute|has no setter)\W*(\w*)", "a key of config.json that may not be there: {}", VERIFY
    ),
    Failure(
        r"(?:Unsupported model architecture|KeyError): '?(Medusa\w+)",
        "a release that no longer has the model {}",
        "use TensorRT-LLM 0.17 to 1.2.1; later ones have no engine backend",
    ),
    Failure(
        r"unrecognized arguments: (.{1,200})", "flags that the installed trtllm-build does not have: {}", CONTAINER
    ),
    Failure(r"argument (--\w+: invalid choice.{0,200})", "a value that the installed trtllm-build refuses: {}", CONTAINER),
    Failure(
        r"Both num_medusa_heads and max_draft_len have to be provided",
        "an engine without num_medusa_heads or max_draft_len in its config",
        VERIFY,
    ),
    Failure(
        r"(?i)gather context logits is not support",
        "context logits asked of an engine with draft tokens",
        "leave --gather_context_logits out",
    ),
    Failure(
        r"(?i)((?:int8|int4|w[48]a(?:8|16)\w*|smooth ?quant|weight.only|per.channel|fp8|nvfp4|fp4)[^\n]{0,80}"
        r"(?:not supported|unsupported|only supported|requires)[^\n]{0,120})",
        "a format that this GPU does not run: {}",
        "export with another --quant; medusa-export plan lists the GPUs of each",
    ),
    Failure(
        r"(?i)(?:out of memory|OutOfMemory|requested amount of GPU memory)", "too little memory on the GPU", SMALLER
    ),
    Failure(
        r"(?i)(?:no kernel image is available|no CUDA-capable device|found no NVIDIA driver|CUDA driver version is insufficient"
        r"|cudaGetDeviceCount|no CUDA GPUs are available)",
        "no GPU that this build of TensorRT-LLM can use",
        "build on the GPU that will serve, with the driver that the container asks for (docker run --gpus all)",
    ),
    Failure(
        r"(?:ImportError|OSError): (lib[\w.+-]+)", "a library that is not there: {}", CONTAINER
    ),
    Failure(r"ModuleNotFoundError: No module named '([\w.]+)'", "a package that is not there: {}", CONTAINER),
    Failure(r"No space left on device", "a full disk", "make room; an engine takes about as much as its checkpoint"),
    Failure(
        r"(?i)(?:failed to build|could not find any implementation|Error Code \d+: ?)([^\n]{0,200})",
        "TensorRT could not build the network: {}",
        f"{CONTAINER}; if you do, report the log",
    ),
)  # fmt: skip
KILLED = Failure(
    "",
    "it was killed, most likely for want of memory in the machine",
    "give it more memory (about twice the checkpoint)",
)
UNKNOWN = Failure("", "an error that is not in the table: {}", "read the log")


def explain(log: str, returncode: int, command: Sequence[str], log_file: str) -> BuildError:
    """The error to raise for a build that failed.

    Args:
        log: everything that it printed.
        returncode: its exit status; negative is the signal that ended it.
        log_file: where the log was kept.
    """
    where = f"{command[0]} ({log_file})"
    if returncode in (-9, 137):
        return BuildError(where, KILLED.means, "an engine", KILLED.action)
    for failure in FAILURES:
        match = re.search(failure.pattern, log)
        if match:
            detail = match.group(1).strip() if match.groups() else ""
            return BuildError(where, failure.means.format(detail), "an engine", failure.action)
    return BuildError(where, UNKNOWN.means.format(_last_error(log, returncode)), "an engine", UNKNOWN.action)


def _last_error(log: str, returncode: int) -> str:
    """The last line that looks like an error, or the last one at all."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\[E\]|Error\b|error:|assert", line)]
    return (errors or lines or [f"exit status {returncode}"])[-1][:300]
