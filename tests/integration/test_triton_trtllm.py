"""preprocessing, postprocessing, ensemble and BLS of a TensorRT-LLM repository on a real tritonserver; the engine is a stand-in."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.serving.triton.config_files import render
from medusa_export.engines.serving.triton.hosting.server import Address, TritonServer
from medusa_export.engines.serving.triton_trtllm.configs import TrtllmServing, model_configs
from medusa_export.engines.serving.triton_trtllm.repository import engine_facts, write_trtllm_repository
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.tree import Tree

STANDIN = Path(__file__).parents[1] / "standins" / "tensorrt_llm_model.py"
SERVING = TrtllmServing(max_text_bytes=2000)
STEP = 3  # tokens of the stand-in


@pytest.fixture(scope="module")
def _servers() -> Iterator[list[tuple[TritonServer, Path]]]:
    found: list[tuple[TritonServer, Path]] = []
    yield found
    for server, _ in found:
        assert server.stop() == 0


@pytest.fixture
def served(
    _servers: list[tuple[TritonServer, Path]],
    tiny_tokenizer: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TritonServer, Path]:
    """A server, and the directory with its tokenizer."""
    if not _servers:
        folder = tmp_path_factory.mktemp("trtllm")
        engine, repository = folder / "engine", folder / "repository"
        _write_engine(engine)
        tiny_tokenizer(engine)
        write_trtllm_repository(engine, repository, SERVING)
        _replace_engine(repository)
        with (folder / "server.log").open("wb") as log:
            server = TritonServer(repository, Address.free(), log)
        try:
            server.wait_ready()
        except Exception as error:
            raise AssertionError((folder / "server.log").read_text()) from error
        _servers.append((server, engine))
    return _servers[0]


def _write_engine(path: Path) -> None:
    (path / "medusa").mkdir(parents=True)
    pretrained = {"mapping": {"tp_size": 1}, "max_draft_len": 3, "num_medusa_heads": 2}
    numbers = {"max_batch_size": 4, "plugin_config": {"use_paged_context_fmha": True}}
    config = {"version": "1.2.1", "pretrained_config": pretrained, "build_config": numbers}
    (path / "medusa" / "config.json").write_text(json.dumps(config))
    (path / "medusa" / "rank0.engine").write_text("a stand-in: no engine")
    EngineInfo(
        backend="tensorrt-llm", form="fp8", precision="FP8", max_length=200, max_depth=2, top_k=16, num_hidden_layers=1,
        num_key_value_heads=2, head_dim=16, hidden_size=64, vocab_size=90, eos_token_ids=(2,), session_options={},
        heads_session_options={}, source={},
    ).save(path)  # fmt: skip
    (path / "tree.json").write_text(Tree.from_choices([[0], [1], [0, 0]]).to_json())


def _replace_engine(repository: Path) -> None:
    """Another backend for ``tensorrt_llm``, and nothing else."""
    built = repository / "tensorrt_llm" / "1"
    config = model_configs(engine_facts(built, built), SERVING)["tensorrt_llm"] | {"backend": "python"}
    del config["dynamic_batching"]
    (built.parent / "config.pbtxt").write_text(render(config))
    (built / "model.py").write_bytes(STANDIN.read_bytes())


def ask(server: TritonServer, model: str, **inputs: Any) -> tuple[int, Any]:
    request = urllib.request.Request(f"{server.address.http}/v2/models/{model}/generate", json.dumps(inputs).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def stream(server: TritonServer, model: str, **inputs: Any) -> list[dict[str, Any]]:
    body = json.dumps({"stream": True, **inputs}).encode()
    request = urllib.request.Request(f"{server.address.http}/v2/models/{model}/generate_stream", body)
    with urllib.request.urlopen(request, timeout=60) as response:
        return [json.loads(line[6:]) for line in response if line.startswith(b"data: ")]


def expected(engine: Path, text: str, count: int, system: str = "") -> tuple[list[int], str]:
    """What the stand-in makes of a question: its prompt, again and again; as ids and as text."""
    tokenizer = read_tokenizer(engine)
    messages = [{"role": "system", "content": system}] if system else []
    prompt = encode_chat(tokenizer, [*messages, {"role": "user", "content": text}])
    ids = (prompt * count)[:count]
    ids = ids[: ids.index(2) + 1] if 2 in ids else ids
    return ids, tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_text_to_text(model: str, served: tuple[TritonServer, Path]) -> None:
    server, engine = served
    ids, text = expected(engine, "w3 w4 w5", 11)
    status, body = ask(server, model, text_input="w3 w4 w5", max_tokens=11)
    assert status == 200, body
    assert body["text_output"] == text
    if model == "tensorrt_llm_bls":
        assert body["completion_tokens"] == len(ids)
        assert body["engine_steps"] == -(-len(ids) // STEP)
        assert body["total_accepted_draft_tokens"] == body["engine_steps"] * 2
        assert body["total_draft_tokens"] == body["engine_steps"] * 3


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_nvidias_dialect(model: str, served: tuple[TritonServer, Path]) -> None:
    """The command of NVIDIA's documents, and every optional input of theirs with a value that changes nothing."""
    server, engine = served
    text = expected(engine, "w3 w4 w5", 11)[1]
    body = {"text_input": "w3 w4 w5", "max_tokens": 11, "bad_words": "", "stop_words": ""}
    neutral = {
        "pad_id": 2, "end_id": 2, "top_k": 1, "top_p": 0.9, "temperature": 0.7, "length_penalty": 1.0, "min_tokens": 1,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": 7, "beam_width": 1,
        "return_log_probs": False, "return_context_logits": False, "num_return_sequences": 1, "stream": False,
        "embedding_bias_words": [""], "embedding_bias_weights": [0.0], "prompt_vocab_size": 0, "decoder_text_input": "",
    }  # fmt: skip
    for inputs in (body, {**body, **neutral}):
        status, answer = ask(server, model, **inputs)
        assert (status, answer.get("text_output")) == (200, text), answer


def test_streaming(served: tuple[TritonServer, Path]) -> None:
    server, engine = served
    ids, text = expected(engine, "w9 w8 w7 w6", 20)
    pieces = stream(server, "tensorrt_llm_bls", text_input="w9 w8 w7 w6", max_tokens=20)
    assert len(pieces) > 2
    assert "".join(piece["text_output"] for piece in pieces) == text
    counts = [piece["completion_tokens"] for piece in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == len(ids)
    steps = stream(server, "ensemble", text_input="w9 w8 w7 w6", max_tokens=20)
    assert len(steps) == -(-len(ids) // STEP)  # a response a step, decoded each by itself


def test_a_system_prompt_and_no_template(served: tuple[TritonServer, Path]) -> None:
    server, engine = served
    _, text = expected(engine, "w3", 9, system="w11 w12")
    assert ask(server, "ensemble", text_input="w3", max_tokens=9, system="w11 w12")[1]["text_output"] == text
    tokenizer = read_tokenizer(engine)
    plain = tokenizer("w3 w4", add_special_tokens=False)["input_ids"]
    found = ask(server, "ensemble", text_input="w3 w4", max_tokens=len(plain), chat=False)[1]["text_output"]
    assert found == tokenizer.decode(plain, skip_special_tokens=True)


def test_stop_words(served: tuple[TritonServer, Path]) -> None:
    server, engine = served
    text = expected(engine, "w3 w4 w5 w6", 12)[1]
    word = text.split()[2]
    for model in ("ensemble", "tensorrt_llm_bls"):
        _, body = ask(server, model, text_input="w3 w4 w5 w6", max_tokens=12, stop_words=[word])
        assert body["text_output"].split() == text.split()[: 3 if model == "ensemble" else 2], (model, body)


def test_special_tokens_in_a_text_stay_text(served: tuple[TritonServer, Path]) -> None:
    """The stand-in gives the prompt back, and an end id in it would end the answer."""
    server, engine = served
    tokenizer = read_tokenizer(engine)
    special = tokenizer.convert_ids_to_tokens(2)
    assert tokenizer(f"{special}w4 w5", add_special_tokens=False)["input_ids"][0] == 2
    status, body = ask(server, "tensorrt_llm_bls", text_input=f"{special}w4 w5 w6", max_tokens=30)
    assert (status, body["completion_tokens"]) == (
        200,
        6,
    )  # <s> <user> one-unknown-word w5 w6, and the template's own end


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": "w3", "max_tokens": 0}, "max_tokens: got 0; expected 1 .. "),
        ({"text_input": "w3", "max_tokens": -5}, "max_tokens: got -5"),
        ({"text_input": "w3", "max_tokens": 10_000}, "max_tokens: got 10000; expected 1 .. "),
        ({"text_input": "w3 " * 1000, "max_tokens": 5}, "text_input: got 3000 bytes; expected at most 2000"),
        ({"text_input": "w3 " * 300, "max_tokens": 5}, "max_tokens: got 5; expected 1 .. -"),
        ({"max_tokens": 5}, "text_input"),
        ({"text_input": "w3", "max_tokens": 5, "temperature": 0.7}, "temperature: got 0.7"),
        ({"text_input": "w3", "max_tokens": 5, "bad_words": ["w4"]}, "bad_words: got ['w4']; expected none"),
        ({"text_input": "w3", "max_tokens": 5, "beam_width": 4}, "beam_width: got 4; expected 1"),
        ({"text_input": "w3", "max_tokens": 5, "end_id": 50256}, "end_id: got 50256; expected 2, or -1"),
        ({"text_input": "w3 w85", "max_tokens": 5}, "text_input: got the token 90; expected ids below 90"),
        ({"text_input": "w3 w85", "max_tokens": 5, "chat": False}, "text_input: got the token 90"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_bad_input(model: str, inputs: dict[str, Any], message: str, served: tuple[TritonServer, Path]) -> None:
    server, _ = served
    status, body = ask(server, model, **inputs)
    assert status in (400, 500)
    assert message in body["error"]
    assert "/" not in body["error"].replace("text/", "")  # no paths
    assert server.is_ready()


def test_grpc_and_bytes_that_are_no_text(served: tuple[TritonServer, Path]) -> None:
    server, _ = served
    client = grpc.InferenceServerClient(server.address.grpc)
    text, count = grpc.InferInput("text_input", [1, 1], "BYTES"), grpc.InferInput("max_tokens", [1, 1], "INT32")
    count.set_data_from_numpy(np.array([[4]], np.int32))
    text.set_data_from_numpy(np.array([[b"w3 \xff\xfe"]], dtype=np.object_))
    inputs = [text, count, grpc.InferInput("stop_words", [1, 1], "BYTES")]
    inputs[2].set_data_from_numpy(np.array([[b"w90"]], dtype=np.object_))
    with pytest.raises(InferenceServerException, match="no UTF-8"):
        client.infer("preprocessing", inputs)
    text.set_data_from_numpy(np.array([[b"w3"]], dtype=np.object_))
    result = client.infer("preprocessing", inputs)
    assert result.as_numpy("stop_words_list").shape[:2] == (1, 2)
    assert result.as_numpy("end_id").tolist() == [[2]]
    client.close()


def test_many_at_once(served: tuple[TritonServer, Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    server, engine = served
    questions = [f"w{index} w{index + 1}" for index in range(3, 19)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda text: ask(server, "tensorrt_llm_bls", text_input=text, max_tokens=15), questions)
        )
    for question, (status, body) in zip(questions, answers, strict=True):
        assert (status, body["text_output"]) == (200, expected(engine, question, 15)[1])
