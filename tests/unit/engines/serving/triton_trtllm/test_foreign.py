"""Repositories of other tools, by a small one in NVIDIA's layout: what is right passes, and every fault is named in its own line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.triton_trtllm.foreign import verify_foreign_repository

PYTHON = 'name: "{name}"\nbackend: "python"\nmax_batch_size: 4\n'
PREPROCESSING = """
input [ {{ name: "QUERY" data_type: TYPE_STRING dims: [ 1 ] }},
        {{ name: "END_ID" data_type: TYPE_INT32 dims: [ 1 ] optional: true }} ]
output [ {{ name: "INPUT_ID" data_type: TYPE_INT32 dims: [ -1 ] }} ]
parameters {{ key: "tokenizer_dir" value: {{ string_value: "/models/tokenizer" }} }}
"""
POSTPROCESSING = """
input [ {{ name: "TOKENS_BATCH" data_type: TYPE_INT32 dims: [ -1, -1 ] }} ]
output [ {{ name: "OUTPUT" data_type: TYPE_STRING dims: [ -1 ] }} ]
"""
PARAMETERS = {
    "gpt_model_type": "inflight_fused_batching", "gpt_model_path": "/models/tensorrt_llm/1", "decoding_mode": "medusa",
    "medusa_choices": "{0}, {1}, {0, 0}", "max_beam_width": "1", "enable_kv_cache_reuse": "True",
    "kv_cache_host_memory_bytes": "${kv_cache_host_memory_bytes}", "exclude_input_in_output": "false",
    "tokenizer_dir": "/models/tokenizer", "guided_decoding_backend": "${guided_decoding_backend}",
    "xgrammar_tokenizer_info_path": "${xgrammar_tokenizer_info_path}", "stats_check_period_ms": "100",
}  # fmt: skip
ENGINE = """name: "tensorrt_llm"
backend: "tensorrtllm"
max_batch_size: 4
input [ { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] } ]
output [ { name: "output_ids" data_type: TYPE_INT32 dims: [ -1, -1 ] } ]
"""
ENSEMBLE = """name: "ensemble"
platform: "ensemble"
max_batch_size: 4
input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
ensemble_scheduling {
  step [
    { model_name: "preprocessing" model_version: -1
      input_map { key: "QUERY" value: "text_input" } output_map { key: "INPUT_ID" value: "_INPUT_ID" } },
    { model_name: "tensorrt_llm" model_version: -1
      input_map { key: "input_ids" value: "_INPUT_ID" } output_map { key: "output_ids" value: "_TOKENS_BATCH" } },
    { model_name: "postprocessing" model_version: -1
      input_map { key: "TOKENS_BATCH" value: "_TOKENS_BATCH" } output_map { key: "OUTPUT" value: "text_output" } }
  ]
}
"""


def engine(**changed: str) -> str:
    rows = (PARAMETERS | changed).items()
    return ENGINE + "".join(
        f'parameters {{ key: "{key}" value: {{ string_value: "{text}" }} }}\n' for key, text in rows
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    configs = {
        "preprocessing": (PYTHON + PREPROCESSING).format(name="preprocessing"),
        "postprocessing": (PYTHON + POSTPROCESSING).format(name="postprocessing"),
        "tensorrt_llm": engine(),
        "ensemble": ENSEMBLE,
    }
    for model, text in configs.items():
        (tmp_path / model / "1").mkdir(parents=True)
        (tmp_path / model / "config.pbtxt").write_text(text)
        if "python" in text:
            (tmp_path / model / "1" / "model.py").write_text("")
    (tmp_path / "tensorrt_llm" / "1" / "config.json").write_text(json.dumps({"version": "0.20.0"}))
    return tmp_path


def test_nvidias_own_layout_is_right(repository: Path) -> None:
    assert verify_foreign_repository(repository) == []


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        ("tensorrt_llm", engine(decoding_mode="Medusa"), "parameter decoding_mode: got 'Medusa'; expected medusa"),
        ("tensorrt_llm", engine(medusa_choices="${medusa_choices}"), "parameter medusa_choices: got ''; expected a whole tree"),
        ("tensorrt_llm", engine(enable_kv_cache_reuse="yes"), "parameter enable_kv_cache_reuse: got 'yes'; expected true or false"),
        ("tensorrt_llm", engine(stats_check_period="5"), "stats_check_period: got '5'; unknown; the backend would ignore it"),
        ("tensorrt_llm", engine().replace("decoding_mode", "decodingmode"), "parameter decoding_mode: missing; expected medusa"),
        ("tensorrt_llm", engine().replace('"tensorrt_llm"', '"llm"', 1), "name: got llm; expected tensorrt_llm, as its folder"),
        ("ensemble", ENSEMBLE.replace('"QUERY"', '"QUESTION"'), "step preprocessing: it has no input QUESTION"),
        ("ensemble", ENSEMBLE.replace('"QUERY"', '"END_ID"'), "step preprocessing: its input QUERY gets nothing"),
        ("ensemble", ENSEMBLE.replace('"output_ids"', '"ids"'), "step tensorrt_llm: it has no output ids"),
        ("ensemble", ENSEMBLE.replace('value: "_INPUT_ID" } output', 'value: "_IDS" } output'),
         "step tensorrt_llm: _IDS is neither an input nor of a step before"),
        ("ensemble", ENSEMBLE.replace('"postprocessing"', '"post"'), "step post: no such model in the repository"),
        ("ensemble", ENSEMBLE.replace('value: "text_output"', 'value: "text"'), "output text_output: no step gives it"),
        ("ensemble", ENSEMBLE.replace("size: 4", "size: ${triton_max_batch_size}"), "${triton_max_batch_size} is not filled in"),
        ("ensemble", ENSEMBLE.replace("max_batch_size", "max_batchsize"), 'no field named "max_batchsize"'),
    ],
)  # fmt: skip
def test_faults(model: str, text: str, expected: str, repository: Path) -> None:
    path = repository / model / "config.pbtxt"
    assert path.read_text() != text, "the fault is one"
    path.write_text(text)
    problems = verify_foreign_repository(repository)
    assert any(expected in problem and problem.startswith(str(path)) for problem in problems), problems


def test_missing_files(repository: Path) -> None:
    (repository / "preprocessing" / "1" / "model.py").unlink()
    (repository / "ensemble" / "1").rmdir()
    found = verify_foreign_repository(repository)
    assert [problem.partition("config.pbtxt: ")[2] for problem in found] == [
        "no folder of a version, such as 1",
        "1: no model.py",
    ]


def test_what_the_engines_own_release_knows(repository: Path) -> None:
    (repository / "tensorrt_llm" / "config.pbtxt").write_text(engine(num_nodes="1"))
    assert verify_foreign_repository(repository) == []
    (repository / "tensorrt_llm" / "1" / "config.json").write_text(json.dumps({"version": "0.17.0"}))
    (problem,) = verify_foreign_repository(repository)
    assert "parameter num_nodes: got '1'; known from TensorRT-LLM 0.19 on; 0.17.0.post1 would ignore it" in problem
    (repository / "tensorrt_llm" / "1" / "config.json").write_text(json.dumps({"version": "0.9.0"}))
    (problem,) = verify_foreign_repository(repository)
    assert "expected 0.17 or later" in problem


def test_no_repository(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got no model repository; expected models with a config.pbtxt"):
        verify_foreign_repository(tmp_path)
