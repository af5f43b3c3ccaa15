"""encode_text and encode_chat against transformers, for tokenizers that add a beginning, an end, both and nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.encoding import encode_chat, encode_text
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.serving.triton_trtllm.repository import LIBRARIES, PREPROCESSING
from medusa_export.engines.serving.triton_trtllm.standalone import standalone_source

BOS, EOS, FIRST = 1, 2, 5
ADDED = {"bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>", "none": "$A"}


@pytest.fixture(params=list(ADDED))
def adding(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> tuple[str, Any]:
    """What a tokenizer adds, and the tokenizer, read from its files."""
    from tokenizers.processors import TemplateProcessing

    first = read_tokenizer(tiny_tokenizer(tmp_path / "first"))
    first.backend_tokenizer.post_processor = TemplateProcessing(
        single=ADDED[request.param], special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    first.save_pretrained(tmp_path / "saved")
    return request.param, read_tokenizer(tmp_path / "saved")


def test_a_text_has_what_the_tokenizer_adds(adding: tuple[str, Any]) -> None:
    kind, tokenizer = adding
    ids = encode_text(tokenizer, "w3 w4")
    assert ids == tokenizer("w3 w4")["input_ids"]
    words = [3 + FIRST, 4 + FIRST]
    assert ids == {"bos": [BOS, *words], "eos": [*words, EOS], "both": [BOS, *words, EOS], "none": words}[kind]


def test_a_conversation_begins_as_its_template_says(adding: tuple[str, Any]) -> None:
    """The template of the fixture writes one token that begins a text; the tokenizer must not add another, nor end it."""
    _, tokenizer = adding
    messages = [{"role": "user", "content": "w3"}]
    ids = encode_chat(tokenizer, messages)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert ids == list(rendered["input_ids"])
    assert ids.count(BOS) == 1
    assert ids[-1] != EOS


def test_special_tokens_of_a_text_are_read_as_such(adding: tuple[str, Any]) -> None:
    _, tokenizer = adding
    assert encode_text(tokenizer, "w3<user>w4") == tokenizer("w3<user>w4")["input_ids"]
    assert 3 in encode_text(tokenizer, "w3<user>w4")


def test_a_repository_for_tensorrt_llm_encodes_with_the_same_code(
    adding: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copies import nothing of this package: Triton's containers do not have it."""
    library = tmp_path / "lib"
    library.mkdir()
    (library / "__init__.py").write_text("")
    for name, module in LIBRARIES[PREPROCESSING].items():
        (library / f"{name}.py").write_text(standalone_source(module, LIBRARIES[PREPROCESSING]))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name == "lib" or name.startswith("lib.")]:
        monkeypatch.delitem(sys.modules, name)
    copied = importlib.import_module("lib.encoding")
    _, tokenizer = adding
    for text in ("w3 w4", "<user> w3", ""):
        assert copied.encode_text(tokenizer, text) == encode_text(tokenizer, text)
    for content in ("w3", "<assistant> </s> w3"):
        messages = [{"role": "user", "content": content}]
        assert copied.encode_chat(tokenizer, messages) == encode_chat(tokenizer, messages)
    for name in ("lib", "lib.encoding", "lib.special_tokens", "lib.errors"):
        sys.modules.pop(name)


class TestChatTemplate:
    def test_a_file_replaces_what_the_tokenizer_has(self, tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> None:
        directory = tiny_tokenizer(tmp_path / "tokenizer", chat_template=False)
        file = tmp_path / "vicuna.jinja"
        file.write_text("{% for m in messages %}{{ m['content'] }} w9{% endfor %}")
        tokenizer = read_tokenizer(directory, file)
        assert encode_chat(tokenizer, [{"role": "user", "content": "w3"}]) == [3 + FIRST, 9 + FIRST]
        tokenizer.save_pretrained(tmp_path / "saved")
        assert read_tokenizer(tmp_path / "saved").chat_template == file.read_text()

    def test_without_one_the_error_says_how_to_add_it(
        self, tmp_path: Path, tiny_tokenizer: Callable[..., Path]
    ) -> None:
        tokenizer = read_tokenizer(tiny_tokenizer(tmp_path, chat_template=False))
        with pytest.raises(
            ConfigError, match="no chat template; expected one, in Jinja; pass --chat-template FILE to medusa-export"
        ):
            encode_chat(tokenizer, [{"role": "user", "content": "w3"}])

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{% for m in messages %}", "no usable template (.*endfor"),
            ("{{ raise_exception('no users') }}", r"no usable template \(no users\)"),
            ("", "leaves out the question"),
            (b"\xff", "no usable template"),
            (None, "no such file or directory"),
        ],
    )
    def test_refusals(
        self, text: str | bytes | None, said: str, tmp_path: Path, tiny_tokenizer: Callable[..., Path]
    ) -> None:
        file = tmp_path / "t.jinja"
        if text is not None:
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError, match=said.replace("template (.*", r"template \(.*")) as caught:
            read_tokenizer(tiny_tokenizer(tmp_path / "tokenizer"), file)
        assert caught.value.where == f"--chat-template {file}"
