"""The model repository on a real tritonserver: every client gets the tokens that decoding alone gives, and bad input is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.serving.triton.hosting.server import Address, TritonServer
from medusa_export.engines.serving.triton.metrics import FLUSH_SECONDS
from medusa_export.engines.serving.triton.repository import verify_repository, write_repository
from tests.integration.triton_fixture import CONTEXT, SECONDS, Served, Stream, endless_engine, tensors
from tests.paths import ROOT

MAX_TEXT = 20_000
VOCAB = 90  # the tokenizer has 97 tokens: w85 is the token 90
QUESTION = "w3 w4 w5"


@pytest.fixture(scope="module")
def _servers() -> Iterator[list[Served]]:
    """The module's server; the engine comes from a fixture of a test, so it cannot be made here."""
    found: list[Served] = []
    yield found
    for served in found:
        # With a cancelled stream that Triton 2.51 holds on to it has to be killed; how a server ends is tested with its faults.
        assert served.server.stop() in (0, -signal.SIGKILL), served.log.read_text(errors="replace")[-2000:]


@pytest.fixture
def served(
    _servers: list[Served], tiny_engine: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    if not _servers:
        folder = tmp_path_factory.mktemp("triton")
        engine, repository, log = (
            endless_engine(tiny_engine, vocab_size=VOCAB),
            folder / "repository",
            folder / "server.log",
        )
        options = ServingOptions(max_batch=4, max_queue=40, max_tokens=5, max_text_bytes=MAX_TEXT, tree_max_batch=2)
        write_repository(engine, repository, options=options)
        assert verify_repository(repository) == []
        with log.open("wb") as output:
            server = TritonServer(repository, Address.free(), output, exit_seconds=10)
        server.wait_ready()
        _servers.append(Served(server, engine, log))
    yield _servers[0]
    assert len(_servers[0].server.stubs()) == 2, _servers[0].log.read_text()


def test_every_client_gets_the_tokens_of_decoding_alone(served: Served) -> None:
    expected = served.offline(QUESTION, 20)
    text = read_tokenizer(served.engine).decode(expected, skip_special_tokens=True)
    inputs = {"text_input": QUESTION, "max_tokens": 20}
    for model in ("medusa", "medusa_unary"):
        status, body = served.generate(model, **inputs)
        assert (status, body["token_ids"], body["text_output"]) == (200, expected, text)
        assert (body["finish_reason"], body["completion_tokens"], body["prompt_tokens"]) == ("length", 20, 7)
        assert body["tokens_per_step"] > 1.5, "the tree was not used"
    events = list(served.events(**inputs))
    assert "".join(event["text_output"] for event in events) == text
    assert [token for event in events for token in np.atleast_1d(event["token_ids"])] == expected
    assert len(events) > 5
    assert [event["finish_reason"] for event in events] == [""] * (len(events) - 1) + ["length"]
    with grpc.InferenceServerClient(served.address.grpc) as client:
        result = client.infer("medusa_unary", tensors(**inputs), request_id="7")
        assert result.as_numpy("token_ids").tolist() == [expected]
        assert result.get_response().id == "7"
    json_inputs = [{"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": [QUESTION]}]
    status, body = served.http("models/medusa_unary/infer", {"inputs": json_inputs})
    outputs = {output["name"]: output["data"] for output in body["outputs"]}
    assert outputs["token_ids"] == expected[:5], "max_tokens of the server's options"


def test_the_example_client(served: Served) -> None:
    command = [sys.executable, ROOT / "examples/clients/triton_client.py", served.address.grpc, QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    text = read_tokenizer(served.engine).decode(served.offline(QUESTION, 128), skip_special_tokens=True)
    assert done.stdout == text
    assert float(done.stderr.split()[0]) > 1.5


def test_many_requests_at_once_keep_apart(served: Served) -> None:
    asked = {f"q{n}": (f"w{n} w{2 * n} w1", 5 + n, n if n % 3 == 0 else None) for n in range(24)}
    stream = Stream(served.address.grpc)
    for key, (text, count, seed) in asked.items():
        drawn = {"temperature": 0.8, "seed": seed} if seed is not None else {}
        stream.ask(key, text_input=text, max_tokens=count, stream=True, **drawn)

    def whole(key: str) -> list[int]:
        text, count, _ = asked[key]
        return list(served.generate("medusa_unary", text_input=text, max_tokens=count)[1]["token_ids"])

    with ThreadPoolExecutor(8) as pool:
        unary = dict(zip(asked, pool.map(whole, asked), strict=True))
    found = stream.collect(len(asked))
    stream.close()
    for key, (text, count, seed) in asked.items():
        greedy = served.offline(text, count)
        assert unary[key] == greedy
        drawn = served.offline(text, count, temperature=0.8, seed=seed) if seed is not None else greedy
        assert found[key][0] == drawn
        assert found[key][2] == "length"


def test_what_a_request_may_say(served: Served) -> None:
    _, body = served.generate(text_input=QUESTION, system="w9", max_tokens=8)
    assert (body["token_ids"], body["prompt_tokens"]) == (served.offline(QUESTION, 8, system="w9"), 10)
    tokenizer = read_tokenizer(served.engine)
    expected = served.offline(QUESTION, 8)
    words = [tokenizer.decode([token]) for token in expected]
    at = next(at for at in range(3, 8) if not any(words[at] in word for word in words[:at]))  # "w2" is in "w25"
    _, body = served.generate(text_input=QUESTION, max_tokens=8, stop=[words[at], "never"])
    assert body["finish_reason"] == "stop"
    assert body["token_ids"] == expected[: at + 1]
    assert words[at] not in body["text_output"].split()
    _, body = served.generate(text_input=QUESTION, max_tokens=4, chat=False)
    assert body["prompt_tokens"] == 3
    _, body = served.generate(text_input="w1 " * 3990, chat=False, max_tokens=500)
    assert (body["finish_reason"], body["completion_tokens"]) == ("length", CONTEXT - 3990 + 1)


GOOD = {"text_input": QUESTION}
TRITONS_OWN = (
    "failed to parse the request JSON",
    "Unable to parse 'data'",
    "attempt to get members",
)  # its status is 500
# what is wrong -> (inputs of /generate, a part of what the client is told)
REFUSED: dict[str, tuple[Any, str]] = {
    "no text": ({"max_tokens": 3}, "text_input"),
    "an empty text": ({"text_input": ""}, "text: got nothing"),
    "blanks": ({"text_input": " \n "}, "text: got nothing"),
    "too much text": ({"text_input": "w" * (MAX_TEXT + 1)}, f"at most {MAX_TEXT}"),
    "10 MB": ({"text_input": "w1 " * 3_500_000}, f"at most {MAX_TEXT}"),
    "longer than the context": ({"text_input": "w1 " * 5000, "chat": False}, "5000 tokens"),
    "a token that the model does not have": ({"text_input": "w3 w85"}, f"got the token {VOCAB}; expected ids below"),
    "no tokens": ({**GOOD, "max_tokens": 0}, "max_tokens: got 0"),
    "negative tokens": ({**GOOD, "max_tokens": -5}, "max_tokens: got -5"),
    "a number of another type": ({**GOOD, "max_tokens": "many"}, ""),
    "a negative temperature": ({**GOOD, "temperature": -1.0}, "temperature: got -1"),
    "too much top_p": ({**GOOD, "top_p": 1.5}, "top_p: got 1.5"),
    "a negative seed": ({**GOOD, "temperature": 1.0, "seed": -1}, ""),
    "banned words": ({**GOOD, "bad_words": ["a"]}, "bad_words: got ['a']; expected none"),
    "biased words": ({**GOOD, "embedding_bias_words": ["a"]}, "embedding_bias_words: got ['a']; expected none"),
    "a table of embeddings": ({**GOOD, "prompt_vocab_size": 1}, "prompt_vocab_size: got 1; expected 0"),
    "two seeds": ({**GOOD, "seed": 3, "random_seed": 4}, "random_seed: got 4; expected 3"),
    "beams": ({**GOOD, "beam_width": 4}, "beam_width: got 4; expected 1"),
    "the prompt in the answer": ({**GOOD, "exclude_input_in_output": False}, "exclude_input_in_output: got false"),
    "another model's end": ({**GOOD, "end_id": 50256}, "end_id: got 50256; expected"),
    "an adapter": ({**GOOD, "lora_task_id": 1}, "lora_task_id"),
    "no time": ({**GOOD, "timeout_s": 0.0}, "timeout_s: got 0"),
    "many stop words": ({**GOOD, "stop": ["a"] * 17}, "stop: got 17"),
    "an unknown input": ({**GOOD, "nonsense": 1}, "nonsense"),
    "no object": ([1, 2], ""),
    "no JSON": (b'{"text_input": ', ""),
    "half a surrogate pair": (b'{"text_input": "a\\ud800"}', ""),
    "deep nesting": (b"[" * 100_000, ""),
}


@pytest.mark.parametrize("model", ["medusa", "medusa_unary"])
@pytest.mark.parametrize("what", REFUSED)
def test_bad_requests_are_refused_and_the_next_is_served(served: Served, model: str, what: str) -> None:
    body, message = REFUSED[what]
    status, answer = served.http(f"models/{model}/generate", body)
    told = answer["error"]
    assert 400 <= status < 500 or told.startswith(TRITONS_OWN), answer
    assert message in told
    assert not any(sign in told for sign in ("Traceback", ".py", str(served.engine.parent), "/tmp", "\n\n")), told
    status, answer = served.generate(model, text_input=QUESTION, max_tokens=2)
    assert (status, answer["completion_tokens"]) == (200, 2)


@pytest.mark.parametrize("model", ["medusa", "medusa_unary"])
def test_a_refused_request_is_a_failure_in_every_metric(served: Served, model: str) -> None:
    triton = {"model": "medusa", "version": "1"}
    before = served.metrics.read("nv_inference_request_failure", **triton, reason="BACKEND")
    succeeded = served.metrics.read("nv_inference_request_success", **triton)
    ours = served.metrics.read("medusa_requests_refused_total", reason="INVALID_ARG")
    for _ in range(3):
        status, answer = served.generate(model, text_input="")
        assert (status, answer) == (400, {"error": answer["error"]})
        assert answer["error"].startswith("text: got nothing; expected a question"), "Triton's word for a raise"
    served.metrics.wait_for("nv_inference_request_failure", before + 3, **triton, reason="BACKEND")
    served.metrics.wait_for("medusa_requests_refused_total", ours + 3, reason="INVALID_ARG")
    assert served.metrics.read("nv_inference_request_success", **triton) == succeeded


def test_nvidias_dialect(served: Served) -> None:
    """The command of NVIDIA's documents, and every optional input of theirs with a value that changes nothing."""
    expected = served.offline(QUESTION, 20)
    text = read_tokenizer(served.engine).decode(expected, skip_special_tokens=True)
    body = {"text_input": QUESTION, "max_tokens": 20, "bad_words": "", "stop_words": ""}
    nested = {"text_input": QUESTION, "parameters": {"max_tokens": 20, "bad_words": [""], "stop_words": [""]}}
    neutral = {
        "pad_id": 2, "end_id": -1, "top_k": 1, "top_p": 0.0, "temperature": 1.0, "length_penalty": 1.0, "min_tokens": 1,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "random_seed": 7, "beam_width": 1,
        "num_return_sequences": 1, "exclude_input_in_output": True, "return_context_logits": False,
        "return_generation_logits": False, "return_perf_metrics": False, "return_log_probs": False, "stream": False,
        "embedding_bias_words": "", "embedding_bias_weights": 0.0, "prompt_vocab_size": 0, "prompt_table_extra_id": 0,
        "return_num_input_tokens": False, "guided_decoding_guide": "", "lora_task_id": 0,
    }  # fmt: skip
    for model in ("medusa", "medusa_unary"):
        for asked in (body, nested, {**body, **neutral}):
            status, answer = served.http(f"models/{model}/generate", asked)
            assert (status, answer.get("token_ids"), answer.get("text_output")) == (200, expected, text), answer
            assert "cum_log_probs" not in answer
    with grpc.InferenceServerClient(served.address.grpc) as client:
        inputs = tensors(
            **{
                **body,
                **neutral,
                "bad_words": [""],
                "stop_words": [""],
                "embedding_bias_words": [""],
                "embedding_bias_weights": [0.0],
            }
        )
        assert client.infer("medusa_unary", inputs).as_numpy("token_ids").tolist() == [expected]


def test_nvidias_sampling_is_ours(served: Served) -> None:
    drawn = served.offline(QUESTION, 12, temperature=0.7, seed=5)
    for name in ("seed", "random_seed"):
        inputs = {"text_input": QUESTION, "max_tokens": 12, "temperature": 0.7, name: 5}
        assert served.generate(**inputs)[1]["token_ids"] == drawn
    warm = served.offline(QUESTION, 12, temperature=1.0, seed=5)
    _, body = served.generate(text_input=QUESTION, max_tokens=12, top_k=10_000, seed=5)
    assert body["token_ids"] == warm, "top_k alone draws at temperature 1, as in TensorRT-LLM"
    _, body = served.generate(text_input=QUESTION, max_tokens=12, repetition_penalty=5.0)
    assert body["token_ids"] != served.offline(QUESTION, 12)


@pytest.mark.parametrize("model", ["medusa", "medusa_unary"])
def test_log_probabilities(served: Served, model: str) -> None:
    _, body = served.generate(model, text_input=QUESTION, max_tokens=9, return_log_probs=True)
    assert len(body["output_log_probs"]) == 9
    assert body["cum_log_probs"] == pytest.approx(sum(body["output_log_probs"]), rel=1e-5)
    assert all(-20 < value < 0 for value in body["output_log_probs"])


def test_wrong_tensors_over_grpc(served: Served) -> None:
    wrong_type = grpc.InferInput("max_tokens", [1, 1], "INT64").set_data_from_numpy(np.array([[3]], np.int64))
    two = grpc.InferInput("text_input", [1, 2], "BYTES").set_data_from_numpy(np.array([[b"w1", b"w2"]], object))
    no_text = grpc.InferInput("text_input", [1, 1], "BYTES").set_data_from_numpy(np.array([[b"w1\xff\xfe"]], object))
    text = tensors(text_input=QUESTION)
    with grpc.InferenceServerClient(served.address.grpc) as client:
        for inputs in ([*text, wrong_type], [two], [no_text], []):
            with pytest.raises(InferenceServerException) as refused:
                client.infer("medusa_unary", inputs)
            assert "INVALID_ARGUMENT" in refused.value.status()
            assert ".py" not in refused.value.message()
        with pytest.raises(InferenceServerException, match="unknown model"):
            client.infer("nobody", text)


def test_a_cancelled_grpc_stream_frees_its_slot(served: Served) -> None:
    before = served.metrics.read("medusa_requests_ended_total", reason="cancelled")
    stream = Stream(served.address.grpc)
    for key in "abc":
        stream.ask(key, text_input=QUESTION, max_tokens=3900, stream=True)
    stream.next()
    served.metrics.wait_for(
        "vllm:num_requests_running", 3
    )  # one that has not arrived yet would not be cancelled but never start
    stream.close(cancel=True)
    served.metrics.wait_for("medusa_requests_ended_total", before + 3, reason="cancelled")
    served.metrics.wait_for("vllm:num_requests_running", 0)


def test_a_client_that_hangs_up_frees_its_slot(served: Served) -> None:
    before = served.metrics.read("medusa_requests_ended_total", reason="cancelled")
    events = served.events(text_input=QUESTION, max_tokens=3900)
    next(events)
    events.close()
    served.metrics.wait_for("medusa_requests_ended_total", before + 1, reason="cancelled")
    served.metrics.wait_for("vllm:num_requests_running", 0)


def test_a_cancelled_unary_call_frees_its_slot(served: Served) -> None:
    before = served.metrics.read("medusa_requests_ended_total", reason="cancelled")
    done = threading.Event()
    with grpc.InferenceServerClient(served.address.grpc) as client:
        inputs = tensors(text_input=QUESTION, max_tokens=3900)
        call = client.async_infer("medusa_unary", inputs, callback=lambda result, error: done.set())
        deadline = time.monotonic() + SECONDS
        while not served.metrics.read("vllm:num_requests_running"):
            assert time.monotonic() < deadline
        call.cancel()
        assert done.wait(SECONDS)
        served.metrics.wait_for("medusa_requests_ended_total", before + 1, reason="cancelled")
    served.metrics.wait_for("vllm:num_requests_running", 0)


def test_a_full_queue_answers_busy(served: Served) -> None:
    stream = Stream(served.address.grpc)
    for n in range(60):  # four are decoded, forty wait
        stream.ask(str(n), text_input=QUESTION, max_tokens=1500)
    refused = 0
    for _ in range(12):
        _, error = stream.next()
        assert error is not None
        assert "server: got a request while 40 wait" in error.message()
        refused += 1
    stream.close(cancel=True)
    assert refused == 12
    deadline = time.monotonic() + SECONDS
    while served.generate(text_input=QUESTION, max_tokens=2)[0] != 200:  # until the cancelled ones have left
        assert time.monotonic() < deadline


def test_a_time_limit(served: Served) -> None:
    status, answer = served.generate(text_input=QUESTION, max_tokens=3900, timeout_s=0.1)
    assert (status, answer["error"]) == (400, "the request took longer than its time limit")


def test_metrics(served: Served) -> None:
    names = (
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:generation_tokens_total",
    )
    time.sleep(3 * FLUSH_SECONDS)  # what earlier requests left is handed on
    before = [served.metrics.read(name) for name in names]
    served.generate(text_input=QUESTION, max_tokens=11)
    for name, old, grown in zip(names, before, (1, 10, 11), strict=True):
        served.metrics.wait_for(name, old + grown)
    assert served.metrics.read("vllm:spec_decode_num_accepted_tokens_total") > 0


def test_the_server_says_what_it_serves(served: Served) -> None:
    with urllib.request.urlopen(f"{served.address.http}/v2/models/medusa/config", timeout=SECONDS) as response:
        config = json.loads(response.read())
    assert config["model_transaction_policy"]["decoupled"]
    assert config["parameters"]["max_queue"]["string_value"] == "40"
