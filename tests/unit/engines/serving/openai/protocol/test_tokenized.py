"""What /tokenize makes of a request is what the chat makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.openai.protocol.asked import read_asked
from medusa_export.engines.serving.openai.protocol.errors import UnknownFieldError
from medusa_export.engines.serving.openai.protocol.fields import CHAT
from medusa_export.engines.serving.openai.protocol.tokenized import to_encode, tokenize_endpoint
from medusa_export.engines.serving.text_service import TextRequest

BODY = {
    "model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": {"name": "f"}}],
}  # fmt: skip


def read(body: dict[str, Any], *, strict: bool = False) -> TextRequest:
    return to_encode(tokenize_endpoint(body).read({"model": "m", **body}, strict=strict)[0])


def test_tools_count_as_in_the_chat() -> None:
    asked = read_asked(CHAT.read(BODY)[0], 7).requests[0]
    assert read(BODY).messages == asked.messages
    assert len(read(BODY).messages) == 2


def test_what_changes_the_tokens() -> None:
    assert read(BODY).opens_answer
    assert not read({**BODY, "add_generation_prompt": False}).opens_answer
    assert not read({"prompt": "a", "add_special_tokens": False}).adds_special


@pytest.mark.parametrize("body", [{"prompt": "a", "foo": 1}, {**BODY, "foo": 1}])
def test_unknown_fields(body: dict[str, Any]) -> None:
    read(body)
    with pytest.raises(UnknownFieldError, match="foo"):
        read(body, strict=True)


@pytest.mark.parametrize("name", ["continue_final_message", "add_special_tokens", "chat_template_kwargs"])
def test_what_cannot_be_honoured(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read({**BODY, name: {"a": 1} if name.endswith("kwargs") else True})
    assert refused.value.where == name
