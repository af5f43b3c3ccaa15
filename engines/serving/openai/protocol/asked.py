"""What a request asks for: one text request for each of its choices, and how their answers are to be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.grammar import Grammar
from medusa_export.engines.serving.openai.protocol.fields import StreamOptions
from medusa_export.engines.serving.openai.protocol.readers import unsupported
from medusa_export.engines.serving.openai.protocol.tools import CHOICES, ToolChoice, tool_grammar, with_tools
from medusa_export.engines.serving.text_service import TextRequest
from medusa_export.heads.decoding.sampling import Sampling

SAMPLED = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens",
           "ignore_eos")  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request of the protocol.

    Attributes:
        requests: one for each choice, the choices of a prompt one after the other.
        per_prompt: choices of one prompt.
        streams: told as it comes.
        calls_tools: the answers may have calls.
        echoes: the answers begin with their prompts.
    """

    requests: tuple[TextRequest, ...]
    per_prompt: int = 1
    streams: bool = False
    stream_options: StreamOptions = field(default_factory=StreamOptions)
    calls_tools: bool = False
    echoes: bool = False


def read_asked(values: Mapping[str, Any], max_tokens: int) -> Asked:
    """What the values of a request ask for.

    Args:
        max_tokens: where the request does not say.

    Raises:
        ConfigError: values that contradict each other, or out of range.
    """
    tools, choice = (
        values.get("tools") or [],
        values.get("tool_choice") or CHOICES["auto" if values.get("tools") else "none"],
    )
    calls_tools = not choice.is_none and bool(tools or choice.is_required)
    grammar = _grammar(values, choice, calls_tools=calls_tools)
    sampling, prompt_only = _sampling(values, max_tokens)
    if grammar is not None and (sampling.min_tokens or sampling.ignore_eos):
        name = "min_tokens" if sampling.min_tokens else "ignore_eos"
        raise unsupported(name, values[name], f"nothing beside {grammar.where}, which ends where its grammar does")
    if values.get("echo") and sampling.logprobs is not None:
        raise unsupported("echo", True, "no logprobs beside it: prompts are not scored", "leave one out")
    shared: dict[str, Any] = {"stop": values.get("stop", ()), "grammar": grammar, "prompt_only": prompt_only}
    if "messages" in values:
        messages = with_tools(values["messages"], tools) if calls_tools else values["messages"]
        asked = [TextRequest(messages, **shared)]
    else:
        asked = [
            TextRequest(prompt=prompt, **shared)
            if isinstance(prompt, str)
            else TextRequest(prompt_ids=prompt, **shared)
            for prompt in values["prompt"]
        ]
    count = values.get("n", 1)
    requests = [replace(request, sampling=_seeded(sampling, index)) for request in asked for index in range(count)]
    return Asked(
        tuple(requests), count, streams=values.get("stream", False), stream_options=values.get("stream_options", StreamOptions()),
        calls_tools=calls_tools, echoes=values.get("echo", False),
    )  # fmt: skip


def _grammar(values: Mapping[str, Any], choice: ToolChoice, *, calls_tools: bool) -> Grammar | None:
    shaped: Grammar | None = values.get("response_format")
    if not calls_tools:
        return shaped
    if shaped is not None:
        raise unsupported("response_format", "a schema beside tools", "one of them", "leave one out")
    return tool_grammar(values.get("tools") or [], choice, parallel=values.get("parallel_tool_calls", True))


def _sampling(values: Mapping[str, Any], max_tokens: int) -> tuple[Sampling, bool]:
    """How tokens are chosen, and whether none are wanted at all."""
    limits = [values[name] for name in ("max_tokens", "max_completion_tokens") if name in values]
    limit = min(limits, default=max_tokens)
    logprobs = values.get("logprobs")
    if isinstance(logprobs, bool):  # of a chat, where the number stands in another field
        logprobs = values.get("top_logprobs", 0) if logprobs else None
    elif values.get("top_logprobs"):
        raise ConfigError("top_logprobs", "a number without logprobs", '"logprobs": true', "add it to the request")
    seed = values.get("seed")
    given = {"temperature": float(_draws(values)), **{name: values[name] for name in SAMPLED if name in values}}
    sampling = Sampling(
        **given, top_k=max(values.get("top_k", 0), 0), max_tokens=max(limit, 1), logprobs=logprobs,
        seed=None if seed is None else seed % 2**64,
    )  # fmt: skip
    return sampling, limit == 0


def _draws(values: Mapping[str, Any]) -> bool:
    """Whether a request without a temperature asks for what only draws can give: several answers, or some of the likeliest tokens."""
    narrows = values.get("top_p", 1) < 1 or values.get("top_k", 0) > 1 or values.get("min_p", 0) > 0
    return narrows or values.get("n", 1) > 1


def _seeded(sampling: Sampling, index: int) -> Sampling:
    """The choices of one prompt differ: the first one is what it would be alone."""
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + index) % 2**64)
