from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.prompts import Prompt
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.quantize.calibration_data import token_batches


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(i), "", ({"role": "user", "content": f"w{i} w1 w2"},)) for i in range(count)]


def test_chat_prompts_become_ids(tiny_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tiny_tokenizer(tmp_path))
    batches = token_batches(tokenizer, prompts(5), max_prompts=3)
    assert batches == [encode_chat(tokenizer, prompt.messages) for prompt in prompts(3)]
    assert batches == token_batches(tokenizer, prompts(5), max_prompts=3)
    assert token_batches(tokenizer, prompts(5), max_length=2) == [
        ids[:2] for ids in token_batches(tokenizer, prompts(5))
    ]


def test_only_as_many_prompts_as_needed_are_read(tiny_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    stream = iter(prompts(5))
    token_batches(read_tokenizer(tiny_tokenizer(tmp_path)), stream, max_prompts=2)
    assert next(stream).id == "2"


@pytest.mark.parametrize("limits", [{"max_prompts": 0}, {"max_length": 0}])
def test_limits(limits: dict[str, int], tiny_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        token_batches(read_tokenizer(tiny_tokenizer(tmp_path)), prompts(1), **limits)


def test_no_prompts(tiny_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--calib"):
        token_batches(read_tokenizer(tiny_tokenizer(tmp_path)), [])


def test_answers_follow_their_prompts(tiny_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tiny_tokenizer(tmp_path))
    (silent,) = prompts(1)
    (batch,) = token_batches(tokenizer, [Prompt("0", "", silent.messages, "w3 w4")])
    assert batch == encode_chat(tokenizer, silent.messages) + tokenizer("w3 w4", add_special_tokens=False)["input_ids"]
    assert len(batch) > len(encode_chat(tokenizer, silent.messages))
