"""The parameters of Triton's tensorrtllm backend: their types, the values that it takes, and the releases that know them.

The backend reads every parameter as text. What it cannot read it replaces with a default and a warning at most, so a typing error in
``decoding_mode`` or ``medusa_choices`` costs the speed-up and nothing is said: here it is an error. Sources: model_state.cc and
model_instance_state.cc of TensorRT-LLM's triton_backend, and all_models/inflight_batcher_llm before and after it moved there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from medusa_export.core.errors import ConfigError, TreeError
from medusa_export.heads.contract.trtllm_releases import FIRST, TrtllmRelease
from medusa_export.heads.trees.tree import Tree


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        expected: what is right, in words.
        is_right: whether a text is.
        since: the first release that knows it; earlier ones ignore it.
        required: the backend throws without it.
        is_ours: only the models that this project writes around the engine need it so.
    """

    expected: str
    is_right: Callable[[str], bool]
    since: tuple[int, ...] = FIRST
    required: bool = False
    is_ours: bool = False


def _one_of(*values: str, since: tuple[int, ...] = FIRST, required: bool = False) -> Parameter:
    return Parameter(" or ".join(value or "nothing" for value in values), lambda text: text in values, since, required)


def _matching(pattern: str, expected: str, *, since: tuple[int, ...] = FIRST, required: bool = False) -> Parameter:
    return Parameter(expected, lambda text: re.fullmatch(pattern, text) is not None, since, required)


TRUE, FALSE = ("true", "True", "TRUE", "1"), ("false", "False", "FALSE", "0")  # how the backend reads them


def _flag(*allowed: tuple[str, ...], required: bool = False) -> Parameter:
    known = allowed or (TRUE, FALSE)
    expected = " or ".join(values[0] for values in known)
    return Parameter(expected, lambda text: any(text in values for values in known), required=required)


def _count(least: int = 0, since: tuple[int, ...] = FIRST) -> Parameter:
    return Parameter(f"an integer, {least} or more", lambda text: text.isdecimal() and int(text) >= least, since)


def _is_fraction(text: str) -> bool:
    return re.fullmatch(r"\d*\.?\d+", text) is not None and 0 < float(text) <= 1


def parse_choices(text: str) -> Tree:
    """The tree that ``medusa_choices`` stands for: ``{0}, {0, 0}``.

    Raises:
        ConfigError: another form.
        TreeError: a tree that breaks a rule, most of which the backend does not check.
    """
    if not re.fullmatch(r"\{\d+(, ?\d+)*\}(, ?\{\d+(, ?\d+)*\})*", text):
        raise ConfigError(
            "medusa_choices", repr(text[:60]), "choices like {0}, {1}, {0, 0}", "write the repository again"
        )
    return Tree.from_choices(
        [[int(index) for index in choice.split(",")] for choice in re.findall(r"\{([^}]*)\}", text)]
    )


def _is_tree(text: str) -> bool:
    try:
        return parse_choices(text).max_draft_len > 0
    except (ConfigError, TreeError):
        return False


MOVED = (0, 19)  # the backend lies in TensorRT-LLM's own repository; what only that copy has is taken to be as old
PARAMETERS: dict[str, Parameter] = {
    "FORCE_CPU_ONLY_INPUT_TENSORS": _one_of("yes", "no"),
    "gpt_model_type": _one_of("inflight_fused_batching", "inflight_batching", required=True),  # Medusa needs it
    "gpt_model_path": _matching(r"/[^$]*", "an absolute path in the container", required=True),
    "decoding_mode": _one_of("medusa", required=True),
    "medusa_choices": Parameter("a whole tree, like {0}, {1}, {0, 0}", _is_tree, required=True),
    "max_beam_width": _one_of("1", required=True),
    "batch_scheduler_policy": _one_of("guaranteed_no_evict", "max_utilization"),
    "max_tokens_in_paged_kv_cache": _count(1),
    "kv_cache_free_gpu_mem_fraction": Parameter("a fraction, above 0 and at most 1", _is_fraction),
    "kv_cache_host_memory_bytes": _count(),
    "enable_kv_cache_reuse": _flag(),
    "enable_chunked_context": _flag(),
    "max_attention_window_size": _matching(r"\d+(,\d+)*", "numbers of tokens with commas between them"),
    "sink_token_length": _count(),
    "exclude_input_in_output": replace(_flag(TRUE, required=True), is_ours=True),  # our models expect the answer alone
    "normalize_log_probs": _flag(),
    "cancellation_check_period_ms": _count(1),
    "stats_check_period_ms": _count(1),
    "iter_stats_max_iterations": _count(),
    "request_stats_max_iterations": _count(),
    "gpu_device_ids": _matching(r"\d+(,\d+)*(;\d+(,\d+)*)*", "device numbers: commas within an instance, semicolons between"),
    "participant_ids": _matching(r"\d+(,\d+)*(;\d+(,\d+)*)*", "ranks: commas within an instance, semicolons between"),
    "num_nodes": _count(1, MOVED),
    "executor_worker_path": _matching(r"/.*trtllmExecutorWorker", "the path of trtllmExecutorWorker"),
    "multi_block_mode": _flag(FALSE),  # Medusa does not run with it
    "enable_context_fmha_fp32_acc": _flag(),
    "cuda_graph_mode": _flag(),
    "cuda_graph_cache_size": _count(),
    "enable_trt_overlap": _flag(),
    "gpu_weights_percent": Parameter("a fraction, above 0 and at most 1", _is_fraction),
    "recv_poll_period_ms": _count(),
    "kv_cache_onboard_blocks": _flag(),
    "cross_kv_cache_fraction": _one_of(""),  # of encoder-decoder models
    "encoder_model_path": _one_of(""),
    "worker_path": _matching(r"/.*trtllmExecutorWorker", "the path of trtllmExecutorWorker"),  # its name before executor_worker_path
    "lora_cache_max_adapter_size": _count(1),
    "lora_cache_optimal_adapter_size": _count(1),
    "lora_cache_gpu_memory_fraction": Parameter("a fraction, above 0 and at most 1", _is_fraction),
    "lora_cache_host_memory_bytes": _count(1),
    "lora_prefetch_dir": _matching("/.*", "an absolute path in the container"),
    # Of other ways to draft, which would take Medusa's place.
    "speculative_decoding_fast_logits": _flag(FALSE),
    "lookahead_window_size": _one_of(""),
    "lookahead_ngram_size": _one_of(""),
    "lookahead_verification_set_size": _one_of(""),
    "eagle_choices": _one_of(""),
    # Read without a fallback by later releases: they have to be there. Guided decoding is for engines without drafts.
    "tokenizer_dir": _matching(".*", "anything: the backend passes it over", required=True),
    "guided_decoding_backend": _one_of("", required=True),
    "xgrammar_tokenizer_info_path": _one_of("", required=True),
}  # fmt: skip


# Of the models around the engine: what may be another value than the one written.
FREE = {"max_text_bytes": _count(1), "skip_special_tokens": _one_of("true", "false")}


def parameter_problems(parameters: Mapping[str, str], release: TrtllmRelease, *, is_ours: bool = True) -> list[str]:
    """What a release would refuse, ignore or read as something else, one line each.

    Args:
        is_ours: whether this project's models are around the engine.
    """
    problems = []
    for name in dict.fromkeys((*PARAMETERS, *parameters)):
        text = parameters.get(name)
        if fault := parameter_fault(name, text, release, is_ours=is_ours):
            got = "missing" if text is None else f"got {text[:60]!r}"
            problems.append(f"parameter {name}: {got}; {fault}")
    return problems


def parameter_fault(name: str, text: str | None, release: TrtllmRelease, *, is_ours: bool = True) -> str:
    """What is wrong with a parameter, in words; nothing where the backend takes it.

    Args:
        text: its value; None where it is not there.
        is_ours: whether this project's models are around the engine.
    """
    row = PARAMETERS.get(name)
    if row is None:
        return "unknown; the backend would ignore it"
    if text is not None and release.numbers[:2] < row.since:
        known = ".".join(map(str, row.since))
        return f"known from TensorRT-LLM {known} on; {release.name} would ignore it"
    is_wrong = row.required if text is None else not row.is_right(text)
    return f"expected {row.expected}" if is_wrong and (is_ours or not row.is_ours) else ""
