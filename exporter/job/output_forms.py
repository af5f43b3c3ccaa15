"""What --format may name, and the facts about each form; what writes them is in exporter/pipeline/parts.py."""

from __future__ import annotations

from dataclasses import dataclass

from medusa_export.core.errors import ConfigError


@dataclass(frozen=True)
class OutputForm:
    """A form of output.

    Attributes:
        description: for --help.
        holds_base: whether the base model is in it, so that a calibration's scales are too.
        has_engine: whether --engine writes an engine beside it, so that an export can be planned and verified.
    """

    description: str
    holds_base: bool = False
    has_engine: bool = False


DEFAULT_FORM = "trtllm"
OUTPUT_FORMS: dict[str, OutputForm] = {
    DEFAULT_FORM: OutputForm("a TensorRT-LLM checkpoint", holds_base=True, has_engine=True),
    "hf": OutputForm("ModelOpt's unified checkpoint", holds_base=True),
    "vllm-heads": OutputForm("the heads alone, for vLLM"),
    "medusa-v1": OutputForm("the heads alone, each with its lm_head"),
    "medusa-v2": OutputForm("the heads alone, sharing the base's lm_head"),
}


def output_form(name: str) -> OutputForm:
    """The form of that name.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in OUTPUT_FORMS:
        raise ConfigError("--format", repr(name), f"one of {', '.join(OUTPUT_FORMS)}", "pick one of them")
    return OUTPUT_FORMS[name]
