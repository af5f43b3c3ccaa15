"""medusa-serve in a process of its own, and what its answers are compared with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.heads.decoding.sampling import Sampler
from tests.integration.metrics import Metrics

PROGRAM = Path(sys.executable).with_name("medusa-serve")
SECONDS = 60.0
KEY_VARIABLE, KEY = "TEST_SERVE_KEY", "sk-test-0123"
Message = dict[str, str]


def byte_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Replaces a tokenizer by one of single bytes: special tokens cannot be spelled, and an answer may end within a character.

    The alphabet comes in another order on every call: sorted, a test's answer is the same on every run.
    """
    core = Tokenizer(
        models.BPE({letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", additional_special_tokens=["<|start|>"])
    made.chat_template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}<|start|>assistant\n"
    )
    made.save_pretrained(directory)
    return made


class Served:
    """A running medusa-serve.

    Args:
        flags: besides the engine, the port and the name.
        has_key: clients have to show the key.
    """

    def __init__(self, engine: Path, folder: Path, *flags: object, has_key: bool = False) -> None:
        self.engine, self.out, self.log = engine, folder / "serve.out", folder / "serve.log"
        self.tokenizer, self._engine = read_tokenizer(engine), OnnxRuntimeEngine(engine)
        asks = ("--api-key-env", KEY_VARIABLE) if has_key else ()
        command = [PROGRAM, "--engine", engine, "--port", 0, "--name", "tiny", *asks, *flags]
        environment = {**os.environ, KEY_VARIABLE: KEY, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        with self.out.open("wb") as out, self.log.open("wb") as log:
            self.process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=log, env=environment)
        self.headers = {"Authorization": f"Bearer {KEY}"} if has_key else {}
        self.metrics = Metrics(lambda: self.url.replace("/v1", "/metrics"), self.headers)
        self.url = self._wait_for_url()
        self.http = httpx.Client(base_url=self.url, headers=self.headers, timeout=SECONDS, trust_env=False)
        self.client = openai.OpenAI(base_url=self.url, api_key=KEY, max_retries=0, timeout=SECONDS)

    def _wait_for_url(self) -> str:
        deadline = time.monotonic() + SECONDS
        while not (found := re.search(r"serving (http://127\.0\.0\.1:\d+/v1);", self.out.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return found[1]

    def offline(self, messages: Sequence[Message] | str, count: int, *, temperature: float = 0.0, seed: int = 0) -> Any:
        """The text, and the ids, that medusa-run's loop gives; a string is text that goes on."""
        if isinstance(messages, str):
            ids = [int(token) for token in self.tokenizer(messages)["input_ids"]]
        else:
            ids = encode_chat(self.tokenizer, messages)
        sampler = Sampler(temperature, seed) if temperature else None
        arguments: dict[str, Any] = {"max_new_tokens": count, "eos_token_ids": (), "sampler": sampler}
        tokens = generate(self._engine, ids, AUTOREGRESSIVE, **arguments).tokens
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)), tokens

    def chat(self, text: str, **fields: Any) -> Any:
        """An answer to a user."""
        return self.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **fields)

    def stop(self) -> int:
        """Tell it to end, and its exit code."""
        self.http.close()
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
