"""What requests to /tokenize and /detokenize may say: vLLM's fields, as far as the chat itself honours them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medusa_export.engines.serving.openai.protocol.fields import Endpoint
from medusa_export.engines.serving.openai.protocol.messages import messages_reader
from medusa_export.engines.serving.openai.protocol.readers import flag, text, wrong
from medusa_export.engines.serving.openai.protocol.tools import read_tools, with_tools
from medusa_export.engines.serving.text_service import TextRequest


def _token_ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise wrong(name, value, "a list of token ids")
    return value


TOKENIZE = Endpoint(
    content="prompt",
    readers={"model": text, "prompt": text, "add_special_tokens": flag, "return_token_strs": flag},
    neutral={},
    silent=(),
    nested={},
)
TOKENIZE_CHAT = Endpoint(
    content="messages",
    readers={"model": text, "add_generation_prompt": flag, "return_token_strs": flag, "tools": read_tools},
    neutral={
        "add_special_tokens": (False,), "continue_final_message": (False,), "chat_template": (), "chat_template_kwargs": ({},),
        "mm_processor_kwargs": ({},), "prompt": (),
    },
    silent=(),
    nested={"messages": messages_reader},
)  # fmt: skip
DETOKENIZE = Endpoint(content="tokens", readers={"model": text, "tokens": _token_ids}, neutral={}, silent=(), nested={})


def tokenize_endpoint(body: Mapping[str, Any]) -> Endpoint:
    """What reads a request: a conversation, or a text."""
    return TOKENIZE if body.get("messages") is None else TOKENIZE_CHAT


def to_encode(values: Mapping[str, Any]) -> TextRequest:
    """The text of a request that was read, put together as the chat would."""
    if "messages" not in values:
        return TextRequest(prompt=values["prompt"], adds_special=values.get("add_special_tokens", True))
    tools = values.get("tools")
    messages = with_tools(values["messages"], tools) if tools else values["messages"]
    return TextRequest(messages, opens_answer=values.get("add_generation_prompt", True))
