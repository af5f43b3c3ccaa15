"""Triton model behind a TensorRT-LLM engine: token ids in, text out.

A repository holds a copy of this file as postprocessing/1/model.py. Each response is decoded by itself, so that a character whose
tokens two streamed responses share is lost; tensorrt_llm_bls keeps such tokens until the character is whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


class TritonPythonModel:
    """One request is the tokens of one response of the engine."""

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
        self._skip = parameters["skip_special_tokens"] == "true"

    def execute(self, requests: list[Any]) -> list[Any]:
        """Called by Triton."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        pb = self._pb
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            text = self.decode(inputs["output_ids"], inputs["sequence_length"])
        except Exception:  # what a raise says holds paths
            message = "the tokens could not be turned into text"
            return pb.InferenceResponse(error=pb.TritonError(message, pb.TritonError.INTERNAL))
        return pb.InferenceResponse(output_tensors=[pb.Tensor("text_output", text)])

    def decode(self, output_ids: Any, sequence_length: Any) -> Any:
        """Text of every beam.  # int32 [1, beams, T], int32 [1, beams] -> object [1, beams]"""
        rows = zip(output_ids[0], sequence_length.reshape(-1), strict=True)
        texts = [
            str(self._tokenizer.decode(row[:length].tolist(), skip_special_tokens=self._skip)).encode()
            for row, length in rows
        ]
        return np.array([texts], dtype=np.object_)
