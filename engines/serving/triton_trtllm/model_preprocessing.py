"""Triton model in front of a TensorRT-LLM engine: text in, token ids and stop words out.

A repository holds a copy of this file as preprocessing/1/model.py, and in lib beside it what turns text into tokens in medusa-serve
too; it needs numpy and transformers, as the container has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.encoding import encode_chat, encode_text
from medusa_export.core.text.special_tokens import token_ids
from medusa_export.engines.serving.triton.dialect import GREEDY, NVIDIAS, OURS, read_inputs, settle

Array = Any
INPUTS = (*NVIDIAS, *OURS)
NO_END = -1


class TritonPythonModel:
    """One request is one text; the server's batches come as a list of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer beside this file."""
        import triton_python_backend_utils as pb_utils
        from transformers import AutoTokenizer

        self._pb = pb_utils
        parameters = {
            name: item["string_value"] for name, item in json.loads(args["model_config"])["parameters"].items()
        }
        directory = Path(args["model_repository"]) / args["model_version"] / "tokenizer"
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        self._end_ids = [int(token) for token in parameters["eos_token_ids"].split(",") if token]
        self._max_seq_len = int(parameters["max_seq_len"])
        self._max_text_bytes = int(parameters["max_text_bytes"])
        self._vocab_size = int(parameters["vocab_size"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Called by Triton."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        pb = self._pb
        try:
            arrays = self._encode({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        except ConfigError as error:
            return pb.InferenceResponse(error=pb.TritonError(str(error), pb.TritonError.INVALID_ARG))
        except Exception:  # what a raise says holds paths
            message = "the text could not be turned into tokens"
            return pb.InferenceResponse(error=pb.TritonError(message, pb.TritonError.INTERNAL))
        return pb.InferenceResponse(output_tensors=[pb.Tensor(name, array) for name, array in arrays.items()])

    def _encode(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Tensors for the engine, each with a leading batch axis of 1."""
        values = settle(read_inputs(inputs, INPUTS), self._end_ids, GREEDY)
        text, system, max_tokens = values["text_input"], values.get("system", ""), values["max_tokens"]
        for name in ("text_input", "system"):
            size = len(values.get(name, "").encode())
            if size > self._max_text_bytes:
                raise ConfigError(name, f"{size} bytes", f"at most {self._max_text_bytes}", "shorten it")
        ids = self._prompt_ids(text.replace("\x00", ""), system.replace("\x00", ""), chat=values.get("chat", True))
        room = self._max_seq_len - len(ids)
        if not ids:
            raise ConfigError("text_input", "nothing", "text", "add some")
        if not 0 < max_tokens <= room:
            expected = f"1 .. {room} behind {len(ids)} tokens of prompt"
            raise ConfigError("max_tokens", f"{max_tokens}", expected, "change it, or shorten the prompt")
        end_ids = [NO_END] if values["ignore_eos"] else self._end_ids
        stops = [self._plain_ids(word) for word in values["stop"]] + [[token] for token in end_ids[1:]]
        return {
            "input_ids": np.array([ids], np.int32),
            "input_lengths": np.array([[len(ids)]], np.int32),
            "request_output_len": np.array([[max_tokens]], np.int32),
            "end_id": np.array([[end_ids[0]]], np.int32),
            "pad_id": np.array([[values.get("pad_id", self._end_ids[0])]], np.int32),
            "stop_words_list": words_list(stops),
        }

    def _prompt_ids(self, text: str, system: str, *, chat: bool) -> list[int]:
        """Tokens of what the engine gets to read."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        try:
            ids = encode_chat(self._tokenizer, messages) if chat else encode_text(self._tokenizer, text)
        except ConfigError as error:  # it names the tokenizer's directory, which is no client's business
            raise ConfigError("text_input", error.got, error.expected, error.action) from error
        if max(ids, default=0) >= self._vocab_size:
            raise ConfigError("text_input", f"the token {max(ids)}", f"ids below {self._vocab_size}", "leave it out")
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        """Tokens of a text in which nothing is special."""
        try:
            return token_ids(self._tokenizer, text, split_special_tokens=True)
        except ConfigError as error:
            raise ConfigError("stop_words", error.got, error.expected, error.action) from error


def words_list(words: list[list[int]]) -> Array:
    """Stop words as TensorRT-LLM reads them: all tokens in a row, and where each word ends, filled with -1.  # [1, 2, L]"""
    tokens = [token for word in words for token in word]
    ends = np.cumsum([len(word) for word in words if word]).tolist()
    width = max(len(tokens), 1)
    table = np.full((1, 2, width), -1, np.int32)
    table[0, 0, : len(tokens)] = tokens or 0
    table[0, 0, len(tokens) :] = 0
    table[0, 1, : len(ends)] = ends
    return table
