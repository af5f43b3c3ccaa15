"""What requests of OpenAI's protocol may say, in one table: what is honoured, and which values of all others change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.grammar import Grammar
from medusa_export.engines.serving.openai.protocol.messages import messages_reader
from medusa_export.engines.serving.openai.protocol.readers import (
    Reader,
    flag,
    joined,
    logit_bias,
    mapping,
    number,
    prompts,
    require_neutral,
    stop_words,
    text,
    unknown,
    unsupported,
    whole,
    wrong,
)
from medusa_export.engines.serving.openai.protocol.tools import read_choice, read_tools

MOST_CHOICES = 128  # answers to one prompt
STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")  # the last one only pads
MOST_LOGPROBS = 20  # tokens that are told beside one


@dataclass(frozen=True)
class StreamOptions:
    """What a stream has besides text.

    Attributes:
        usage: a last chunk with the tokens in and out.
        running_usage: those so far in every chunk.
    """

    usage: bool = False
    running_usage: bool = False


@dataclass(frozen=True)
class Endpoint:
    """One of the protocol's two ways to ask.

    Attributes:
        content: the field with what is asked.
        readers: fields that are honoured.
        neutral: fields that are not, with the values that change nothing; null is one of them.
        silent: fields that ask for nothing that an answer shows; they may say anything, and are not passed over.
        nested: makers of readers of fields that have fields: they get the list of what is passed over.
    """

    content: str
    readers: Mapping[str, Reader]
    neutral: Mapping[str, tuple[Any, ...]]
    silent: tuple[str, ...]
    nested: Mapping[str, Callable[[list[str]], Reader]]

    def read(self, body: Mapping[str, Any], *, strict: bool = False) -> tuple[dict[str, Any], list[str]]:
        """The values of a request, by field, absent ones and null left out; and the fields that were passed over.

        Args:
            strict: refuse what would be passed over.

        Raises:
            ConfigError: a value of another type or out of range.
            UnsupportedError: a field that would change the answer, and is not honoured.
            UnknownFieldError: strict, and none of the protocol's.
        """
        values, passed_over = dict[str, Any](), list[str]()
        readers = {**self.readers, **{name: make(passed_over) for name, make in self.nested.items()}}
        for name, value in body.items():
            if name in self.silent or (value is None and (name in readers or name in self.neutral)):
                continue
            if name in readers:
                values[name] = readers[name](name, value)
            elif name in self.neutral:
                require_neutral(name, value, self.neutral[name])
            else:
                passed_over.append(joined("", name))
        if strict and passed_over:
            raise unknown("", passed_over[0], "one that is honoured")
        for name in ("model", self.content):
            if name not in values:
                raise ConfigError(name, "nothing", "a value", "add it to the request")
        return values, passed_over


def _stream_options(passed_over: list[str]) -> Reader:
    def read(name: str, value: Any) -> StreamOptions:
        if not isinstance(value, dict):
            raise wrong(name, value, '{"include_usage": true}')
        passed_over.extend(joined(name, key) for key in value if key not in STREAM_OPTIONS)
        shown = {key: flag(f"{name}.{key}", value.get(key) or False) for key in STREAM_OPTIONS}
        return StreamOptions(shown["include_usage"], shown["continuous_usage_stats"])

    return read


def _hint(neutral: str, *others: str) -> Callable[[list[str]], Reader]:
    """Of a field that says how an answer should be, without a rule that it could break: what nobody honours is passed over.

    Args:
        neutral: value that asks for nothing.
        others: that are passed over.
    """

    def make(passed_over: list[str]) -> Reader:
        def read(name: str, value: Any) -> str:
            if value != neutral and value not in others:
                raise wrong(name, value, f"one of {', '.join((neutral, *others))}")
            if value != neutral:
                passed_over.append(name)
            return str(value)

        return read

    return make


def _response_format(name: str, value: Any) -> Grammar | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar(name, {"type": "object"})
    if kind != "json_schema":
        raise unsupported(name, value, "a type of text, json_object or json_schema")
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise wrong(f"{name}.json_schema.schema", schema, "a JSON schema")
    return Grammar(name, schema)


_SHARED: dict[str, Reader] = {
    "model": text,
    "n": whole(1, MOST_CHOICES),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": whole(-1, 2**31),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 100),
    "logit_bias": logit_bias,
    "seed": whole(-(2**63), 2**63 - 1),
    "stop": stop_words,
    "min_tokens": whole(0),
    "ignore_eos": flag,
    "response_format": _response_format,
    "stream": flag,
}
_SILENT = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "store", "metadata",
           "service_tier", "priority", "request_id", "cache_salt", "include_reasoning")  # fmt: skip
# Of vLLM, SGLang, llama.cpp, Ollama, TGI and transformers: they would change the answer.
_EXTENSIONS: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,), "length_penalty": (1, 1.0), "early_stopping": (False,), "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (), "prompt_logprobs": (), "allowed_token_ids": (), "bad_words": ([],), "logits_processors": ([],),
    "return_tokens_as_token_ids": (False,), "return_token_ids": (False,), "guided_json": (), "guided_regex": (), "guided_choice": (),
    "guided_grammar": (), "structured_outputs": (), "guided_whitespace_pattern": (), "typical_p": (1, 1.0), "mirostat": (0,),
    "lora": ([],), "echo": (False,), "best_of": (1,), "max_new_tokens": (), "num_predict": (), "n_predict": (), "max_length": (),
    "stop_sequences": ([],), "grammar": ("",), "regex": (), "ebnf": (), "json_schema": ({},), "repeat_penalty": (1, 1.0),
    "min_length": (0,), "min_new_tokens": (0,), "num_beams": (1,), "num_beam_groups": (1,), "no_repeat_ngram_size": (0,),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "bad_words_ids": ([],), "force_words_ids": ([],),
    "dry_multiplier": (0, 0.0), "xtc_probability": (0, 0.0), "dynatemp_range": (0, 0.0), "top_n_sigma": (-1, -1.0), "tfs_z": (1, 1.0),
    "top_a": (0, 0.0), "penalty_alpha": (0, 0.0), "do_sample": (), "system": ("",), "options": ({},), "format": ("",),
}  # fmt: skip
CHAT = Endpoint(
    content="messages",
    readers={
        **_SHARED, "max_tokens": whole(1), "max_completion_tokens": whole(1), "logprobs": flag,
        "top_logprobs": whole(0, MOST_LOGPROBS), "tools": read_tools, "tool_choice": read_choice, "parallel_tool_calls": flag,
        "chat_template_kwargs": mapping,
    },
    neutral={
        **_EXTENSIONS, "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
        "prediction": (), "web_search_options": (), "moderation": (), "chat_template": (),
        "documents": ([],), "add_generation_prompt": (True,),
        "continue_final_message": (False,), "add_special_tokens": (False,), "prompt": (),
    },
    silent=_SILENT,
    nested={
        "messages": messages_reader, "stream_options": _stream_options,
        "reasoning_effort": _hint("none", "minimal", "low", "medium", "high", "xhigh"), "verbosity": _hint("medium", "low", "high"),
    },
)  # fmt: skip
COMPLETIONS = Endpoint(
    content="prompt",
    readers={**_SHARED, "prompt": prompts, "max_tokens": whole(0), "max_completion_tokens": whole(1),
             "logprobs": whole(0, MOST_LOGPROBS), "echo": flag},
    neutral={
        **{name: values for name, values in _EXTENSIONS.items() if name != "echo"}, "suffix": ("",), "add_special_tokens": (True,),
        "messages": (), "tools": ([],),
    },
    silent=_SILENT,
    nested={"stream_options": _stream_options},
)  # fmt: skip
