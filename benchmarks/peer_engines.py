"""One engine in a process of its own, for ``peers.py``: greedy single steps over a line protocol.

    python benchmarks/peer_engines.py NAME MODEL THREADS MAX_LENGTH

It needs nothing of this project but for its own engine, so it runs in other environments too. A line of JSON a request on standard
input, and a line an answer on standard output, ``{"tokens": [...], "ms": [...]}`` or ``{"error": "..."}``:
``{"prefill": [ids]}`` empties the cache and gives the first token; ``{"steps": n}`` gives n more, each with its latency.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Contender(Protocol):
    """Greedy decoding, batch 1; each call ends when the token is known to the caller."""

    def prefill(self, input_ids: Sequence[int]) -> int:
        """Empty the cache, run the prompt."""

    def step(self, token: int) -> int:
        """The token after this one, which is the last that was returned."""


class Ours:
    """This project's engine, through the steps that its decode loop takes."""

    def __init__(self, model: Path, threads: int, max_length: int) -> None:
        from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
        from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
        from medusa_export.heads.decoding.accept import accept_greedy

        self._engine, self._tree, self._accept = (
            OnnxRuntimeEngine(model, threads=threads),
            AUTOREGRESSIVE,
            accept_greedy,
        )

    def prefill(self, input_ids: Sequence[int]) -> int:
        return self._engine.prefill(input_ids)

    def step(self, token: int) -> int:
        step = self._engine.prepare(self._tree)
        node_ids = np.array([token], dtype=np.int64)
        next_ids = step.verify(node_ids)
        path, tokens = self._accept(self._tree, node_ids, next_ids)
        step.commit(path)
        return tokens[-1]


class Transformers:
    """transformers' model in float32, eager; with ``static``, a static cache and torch.compile with frozen weights."""

    def __init__(self, model: Path, threads: int, max_length: int, *, static: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch, self._max_length = torch, max_length
        auto: Any = AutoModelForCausalLM
        self._model = auto.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
        self._forward = self._model
        self._cache: Any = None
        self._length = 0
        if static:
            import torch._inductor.config as inductor
            from transformers import StaticCache

            inductor.freezing = True  # lets inductor lay the weights out anew
            self._cache = StaticCache(config=self._model.config, max_cache_len=max_length)
            self._compiled = torch.compile(self._model, dynamic=False)

    def prefill(self, input_ids: Sequence[int]) -> int:
        from transformers import DynamicCache

        self._length, self._forward = 0, self._model
        if hasattr(self, "_compiled"):
            with self._torch.inference_mode():
                self._cache.reset()
        else:
            self._cache = DynamicCache(config=self._model.config)
        first = self._run(list(input_ids))
        self._forward = getattr(self, "_compiled", self._model)
        return first

    def step(self, token: int) -> int:
        return self._run([token])

    def _run(self, ids: list[int]) -> int:
        torch = self._torch
        with torch.inference_mode():
            position_ids = torch.arange(self._length, self._length + len(ids))[None]
            out = self._forward(
                torch.tensor([ids]), position_ids=position_ids, past_key_values=self._cache, logits_to_keep=1
            )
        self._length += len(ids)
        return int(out.logits[0, -1].argmax())


class LlamaCpp:
    """llama.cpp through its C interface, with its own defaults but for threads and context."""

    def __init__(self, model: Path, threads: int, max_length: int) -> None:
        import llama_cpp as api

        self._api = api
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(os.fsencode(model), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {model.name}")
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = max_length
        settings.n_threads = settings.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, settings)
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def prefill(self, input_ids: Sequence[int]) -> int:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return self._run(input_ids)

    def step(self, token: int) -> int:
        return self._run([token])

    def _run(self, ids: Sequence[int]) -> int:
        api = self._api
        buffer = (api.llama_token * len(ids))(*ids)
        code = api.llama_decode(self._context, api.llama_batch_get_one(buffer, len(ids)))
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        address = ctypes.cast(api.llama_get_logits_ith(self._context, -1), ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, (self._vocab_size,)).argmax())


class OpenVino:
    """OpenVINO's runtime on the stateful model of optimum-intel; with ``exact``, float32 throughout."""

    def __init__(self, model: Path, threads: int, max_length: int, *, exact: bool) -> None:
        import openvino

        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if exact:
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model / "openvino_model.xml"), "CPU", settings)
        self._request = compiled.create_infer_request()
        self._length = 0

    def prefill(self, input_ids: Sequence[int]) -> int:
        self._request.reset_state()
        self._length = 0
        return self._run(input_ids)

    def step(self, token: int) -> int:
        return self._run([token])

    def _run(self, ids: Sequence[int]) -> int:
        past, self._length = self._length, self._length + len(ids)
        inputs = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, self._length), dtype=np.int64),
            "position_ids": np.arange(past, self._length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self._request.infer(inputs, share_inputs=True)
        return int(self._request.get_output_tensor(0).data[0, -1].argmax())


class GenAi:
    """onnxruntime-genai's own loop; the last id of the vocabulary ends a sequence, as the others go on past the real one too."""

    def __init__(self, model: Path, threads: int, max_length: int) -> None:
        import onnxruntime_genai as genai

        self._genai = genai
        config = genai.Config(str(model))
        last = json.loads((model / "genai_config.json").read_text())["model"]["vocab_size"] - 1
        decoder = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"eos_token_id": last, "decoder": decoder}}))
        self._model = genai.Model(config)
        self._params = genai.GeneratorParams(self._model)
        self._params.set_search_options(max_length=max_length, do_sample=False)

    def prefill(self, input_ids: Sequence[int]) -> int:
        self._generator = self._genai.Generator(self._model, self._params)
        self._generator.append_tokens(np.array([input_ids], dtype=np.int32))
        return self.step(-1)

    def step(self, token: int) -> int:  # it feeds its own last token
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


CONTENDERS: dict[str, Callable[[Path, int, int], Contender]] = {
    "ours": Ours,
    "transformers": Transformers,
    "torch.compile": lambda *arguments: Transformers(*arguments, static=True),
    "llama.cpp": LlamaCpp,
    "openvino": lambda *arguments: OpenVino(*arguments, exact=False),
    "openvino-f32": lambda *arguments: OpenVino(*arguments, exact=True),
    "onnxruntime-genai": GenAi,
}


def answer(contender: Contender, request: dict[str, Any], last: int) -> dict[str, list[Any]]:
    """Tokens and the milliseconds of each."""
    calls = [lambda token: contender.prefill(request["prefill"])] if "prefill" in request else []
    calls += [contender.step] * request.get("steps", 0)
    tokens, times = [last], []
    for call in calls:
        start = time.perf_counter()
        tokens.append(call(tokens[-1]))
        times.append((time.perf_counter() - start) * 1e3)
    return {"tokens": tokens[1:], "ms": times}


def main(name: str, model: str, threads: str, max_length: str) -> None:
    """Answer until standard input ends. What libraries print goes to standard error."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    last = -1
    try:
        contender = CONTENDERS[name](Path(model), int(threads), int(max_length))
        print(json.dumps({"tokens": [], "ms": []}), file=out)
        for line in sys.stdin:
            result = answer(contender, json.loads(line), last)
            last = result["tokens"][-1]
            print(json.dumps(result), file=out)
    except Exception as error:  # whatever ends a contender is the reason that the table gives
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out)
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
