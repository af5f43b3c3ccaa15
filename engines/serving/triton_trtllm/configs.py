"""The five models of a repository for a TensorRT-LLM engine, as data: preprocessing, tensorrt_llm, postprocessing, ensemble, BLS.

Names of the engine's inputs and outputs are those of the tensorrtllm backend (all_models/inflight_batcher_llm in TensorRT-LLM's
triton_backend). What a request may say is in triton/dialect.py; preprocessing refuses what would need more than greedy acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medusa_export.core.flags import NUMBER, Bounds, flag
from medusa_export.engines.serving.options import LIMITS, MAX_QUEUE, MAX_TEXT_BYTES, QUEUE_HELP, TEXT_HELP
from medusa_export.engines.serving.triton.dialect import NVIDIAS, OURS, STREAM
from medusa_export.heads.contract.trtllm_releases import TrtllmRelease
from medusa_export.heads.trees.tree import Tree

Config = dict[str, Any]
PANEL = "TensorRT-LLM engines"  # heading of --help
MOUNT = "/models"  # where the repository lies in the container
PREPROCESSING, ENGINE, POSTPROCESSING = "preprocessing", "tensorrt_llm", "postprocessing"
ENSEMBLE, BLS = "ensemble", "tensorrt_llm_bls"
METRICS_SINCE = (0, 19)  # the engine's outputs count drafts
WORKER = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"


@dataclass(frozen=True)
class EngineFacts:
    """What a built engine says about itself, and what it was exported with.

    Attributes:
        max_seq_len: tokens of prompt and answer together.
        paged_context: whether it was built with use_paged_context_fmha, which cache reuse and chunked context need.
        logits: "float32" or "float16".
        vocab_size: rows of the embedding; a tokenizer may have more tokens.
        window: tokens that a layer looks back, where it is fewer than all: one number, or one a layer.
        heads: Medusa heads that it was built with; None where its configuration does not say.
    """

    release: TrtllmRelease
    tree: Tree
    tp: int
    max_batch_size: int
    max_seq_len: int
    eos_token_ids: tuple[int, ...]
    paged_context: bool
    logits: str
    vocab_size: int
    window: int | list[int] | None = None
    heads: int | None = None

    @property
    def counts_drafts(self) -> bool:
        """Whether the engine's outputs say how many drafts were accepted."""
        return self.release.numbers[:2] >= METRICS_SINCE


@dataclass(frozen=True)
class TrtllmServing:
    """What a user may choose: flags of medusa-triton."""

    max_queue: int = flag(MAX_QUEUE, help=QUEUE_HELP, panel=LIMITS, bounds=NUMBER)
    kv_fraction: float = flag(
        0.9, help="Share of the free GPU memory for the key/value cache.", panel=PANEL, bounds=Bounds(above=0, most=1)
    )
    decoupled: bool = flag(
        True, help="Stream answers; without it, plain calls get one response.", panel=PANEL, opposite="--no-decoupled"
    )
    chunked_context: bool = flag(
        False,
        help="Read long prompts in parts, between other requests' steps.",
        panel=PANEL,
        opposite="--no-chunked-context",
    )
    max_text_bytes: int = flag(MAX_TEXT_BYTES, help=TEXT_HELP, panel=LIMITS, metavar="BYTES", bounds=NUMBER)


def _tensor(
    name: str, data_type: str, *dims: int, optional: bool = False, scalar: bool = False, ragged: bool = False
) -> Config:
    tensor: Config = {"name": name, "data_type": f"TYPE_{data_type}", "dims": list(dims)}
    tensor |= {"optional": True} if optional else {}
    tensor |= {"reshape": {"shape": []}} if scalar else {}  # a number a row, not a list of one
    return tensor | ({"allow_ragged_batch": True} if ragged else {})


# Every one of them has to be said to be optional in each of the three models that it goes through.
TEXT_INPUTS = [
    {**port.as_config(), "optional": port.name not in ("text_input", "max_tokens")} for port in (*NVIDIAS, *OURS)
]
PREPARED = [
    _tensor("input_ids", "INT32", -1),
    _tensor("input_lengths", "INT32", 1),
    _tensor("request_output_len", "INT32", 1),
    _tensor("end_id", "INT32", 1),
    _tensor("pad_id", "INT32", 1),
    _tensor("stop_words_list", "INT32", 2, -1),
]
TOKENS = [_tensor("output_ids", "INT32", -1, -1), _tensor("sequence_length", "INT32", -1)]
TEXT_OUTPUT = _tensor("text_output", "STRING", -1)


def model_configs(facts: EngineFacts, serving: TrtllmServing) -> dict[str, Config]:
    """The fields of every model's configuration, by model."""
    decoupled = {"model_transaction_policy": {"decoupled": serving.decoupled}}
    configs: dict[str, Config] = {
        PREPROCESSING: {
            **_python(PREPROCESSING, TEXT_INPUTS, PREPARED),
            "parameters": _parameters(
                eos_token_ids=",".join(map(str, facts.eos_token_ids)),
                max_seq_len=str(facts.max_seq_len),
                max_text_bytes=str(serving.max_text_bytes),
                vocab_size=str(facts.vocab_size),
            ),
        },
        ENGINE: {**_engine(facts, serving), **decoupled},
        POSTPROCESSING: {
            **_python(POSTPROCESSING, TOKENS, [TEXT_OUTPUT]),
            "parameters": _parameters(skip_special_tokens="true"),
        },
        ENSEMBLE: _ensemble(),
        BLS: {
            **_python(BLS, [*TEXT_INPUTS, STREAM.as_config()], _bls_outputs(facts)),
            # An instance waits for the answer of its request: as many as the engine decodes at once.
            "instance_group": [{"count": facts.max_batch_size, "kind": "KIND_CPU"}],
            **decoupled,
            "parameters": _parameters(acceptance=str(facts.counts_drafts).lower()),
        },
    }
    return {name: {**config, "max_batch_size": facts.max_batch_size} for name, config in configs.items()}


def engine_parameters(facts: EngineFacts, serving: TrtllmServing) -> dict[str, str]:
    """The tensorrtllm backend's parameters; ``parameter_problems`` knows what each may be."""
    parameters = {
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": f"{MOUNT}/{ENGINE}/1",
        "decoding_mode": "medusa",
        "medusa_choices": facts.tree.to_triton(),
        "max_beam_width": "1",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "kv_cache_free_gpu_mem_fraction": str(serving.kv_fraction),
        "enable_kv_cache_reuse": str(facts.paged_context).lower(),
        "enable_chunked_context": str(serving.chunked_context).lower(),
        "exclude_input_in_output": "true",
        "normalize_log_probs": "false",
        "cancellation_check_period_ms": "20",
        "executor_worker_path": WORKER,
        "multi_block_mode": "false",
        **dict.fromkeys(("tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path"), ""),
    }
    if facts.window:
        windows = facts.window if isinstance(facts.window, list) else [facts.window]
        parameters["max_attention_window_size"] = ",".join(map(str, windows))
    return parameters


def _engine(facts: EngineFacts, serving: TrtllmServing) -> Config:
    number = {"scalar": True}
    inputs = [
        _tensor("input_ids", "INT32", -1, ragged=True),
        *(_tensor(name, "INT32", 1, **number) for name in ("input_lengths", "request_output_len")),
        *(
            _tensor(name, "INT32", 1, optional=True, **number)
            for name in ("end_id", "pad_id", "beam_width", "runtime_top_k")
        ),
        _tensor("stop_words_list", "INT32", 2, -1, optional=True, ragged=True),
        *(_tensor(name, "BOOL", 1, optional=True, **number) for name in ("stop", "streaming")),
    ]
    logits = "FP16" if facts.logits == "float16" else "FP32"
    outputs = [*TOKENS, _tensor("context_logits", logits, -1, -1), _tensor("generation_logits", logits, -1, -1, -1)]
    if facts.counts_drafts:
        inputs.append(_tensor("return_perf_metrics", "BOOL", 1, optional=True, scalar=True))
        outputs.append(_tensor("acceptance_rate", "FP32", 1))
        outputs += [_tensor(name, "INT32", 1) for name in ("total_accepted_draft_tokens", "total_draft_tokens")]
    return {
        "name": ENGINE,
        "backend": "tensorrtllm",
        "dynamic_batching": {
            "max_queue_delay_microseconds": 0,
            "default_queue_policy": {"max_queue_size": serving.max_queue},
        },
        "input": inputs,
        "output": outputs,
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],  # the backend places the engine on the GPUs itself
        "parameters": _parameters(**engine_parameters(facts, serving)),
    }


def _ensemble() -> Config:
    """Text to text in three steps; what goes from one to the next has a name of its own, as a request has an end_id too."""
    texts, prepared, tokens = (
        [str(tensor["name"]) for tensor in tensors] for tensors in (TEXT_INPUTS, PREPARED, TOKENS)
    )
    between = {name: f"_{name}" for name in (*prepared, *tokens)}
    steps = [
        (PREPROCESSING, {name: name for name in texts}, {name: between[name] for name in prepared}),
        (
            ENGINE,
            {**{name: between[name] for name in prepared}, "streaming": "stream"},
            {name: between[name] for name in tokens},
        ),
        (POSTPROCESSING, {name: between[name] for name in tokens}, {"text_output": "text_output"}),
    ]
    return {
        "name": ENSEMBLE,
        "platform": "ensemble",
        "input": [*TEXT_INPUTS, STREAM.as_config()],
        "output": [TEXT_OUTPUT],
        "ensemble_scheduling": {
            "step": [
                {"model_name": model, "model_version": -1, "input_map": inputs, "output_map": outputs}
                for model, inputs, outputs in steps
            ]
        },
    }


def _bls_outputs(facts: EngineFacts) -> list[Config]:
    numbers = ["completion_tokens", "engine_steps"]
    numbers += ["total_accepted_draft_tokens", "total_draft_tokens"] if facts.counts_drafts else []
    return [TEXT_OUTPUT, *(_tensor(name, "INT32", 1) for name in numbers)]


def _python(name: str, inputs: list[Config], outputs: list[Config]) -> Config:
    return {
        "name": name,
        "backend": "python",
        "input": inputs,
        "output": outputs,
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
    }


def _parameters(**values: str) -> dict[str, dict[str, str]]:
    return {name: {"string_value": value} for name, value in values.items()}
