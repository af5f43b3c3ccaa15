"""What a request may say on Triton, in NVIDIA's dialect: names and types of the ensemble and the tensorrt_llm_bls of TensorRT-LLM.

Both kinds of repository read it with this module, of which the one for TensorRT-LLM has a copy. What Medusa cannot honour is refused
by name where it would change the answer, and taken where it would not. Source: all_models/inflight_batcher_llm of TensorRT-LLM's
triton_backend. What is not declared here (images, draft models) Triton itself refuses by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medusa_export.core.errors import ConfigError

Value = Any  # str, int, float, bool, or a list of them
Values = dict[str, Value]
_MOST_TOLD = 8  # values of a list in a message
KINDS = {
    "STRING": "OS",
    "INT64": "iu",
    "INT32": "iu",
    "UINT64": "iu",
    "FP16": "f",
    "FP32": "f",
    "BOOL": "b",
}  # of numpy's types


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        dims: (1,) for one value; with -1 for a list, which is read in one row.
        is_optional: for inputs; an absent one has the value that the server's options say.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    is_optional: bool = True

    def as_config(self) -> dict[str, Any]:
        """The fields of ModelInput or ModelOutput."""
        config: dict[str, Any] = {"name": self.name, "data_type": f"TYPE_{self.data_type}", "dims": list(self.dims)}
        return config | ({"optional": True} if self.is_optional else {})


STREAM = Port("stream", "BOOL")
NVIDIAS = (
    Port("text_input", "STRING", is_optional=False),
    Port("max_tokens", "INT32"),
    Port("bad_words", "STRING", dims=(-1,)),
    Port("stop_words", "STRING", dims=(-1,)),
    Port("exclude_input_in_output", "BOOL"),
    Port("end_id", "INT32"),
    Port("pad_id", "INT32"),
    Port("top_k", "INT32"),
    Port("top_p", "FP32"),
    Port("temperature", "FP32"),
    Port("length_penalty", "FP32"),
    Port("repetition_penalty", "FP32"),
    Port("min_tokens", "INT32"),
    Port("presence_penalty", "FP32"),
    Port("frequency_penalty", "FP32"),
    Port("seed", "UINT64"),
    Port("random_seed", "UINT64"),  # its name until TensorRT-LLM 0.17
    Port("return_log_probs", "BOOL"),
    Port("return_context_logits", "BOOL"),
    Port("return_generation_logits", "BOOL"),
    Port("return_perf_metrics", "BOOL"),
    Port("num_return_sequences", "INT32"),
    Port("beam_width", "INT32"),
    Port("embedding_bias_words", "STRING", dims=(-1,)),
    Port("embedding_bias_weights", "FP32", dims=(-1,)),
    Port("prompt_embedding_table", "FP16", dims=(-1, -1)),
    Port("prompt_vocab_size", "INT32"),
    Port("prompt_table_extra_id", "UINT64"),
    Port("decoder_text_input", "STRING"),
    Port("return_num_input_tokens", "BOOL"),
    Port("return_num_output_tokens", "BOOL"),
    Port("guided_decoding_guide_type", "STRING"),
    Port("guided_decoding_guide", "STRING"),
    Port("lora_task_id", "UINT64"),
    Port("lora_weights", "FP16", dims=(-1, -1)),
    Port("lora_config", "INT32", dims=(-1, 3)),
)
OURS = (Port("system", "STRING"), Port("chat", "BOOL"), Port("stop", "STRING", dims=(-1,)))
TIMEOUT = Port("timeout_s", "FP32")


@dataclass(frozen=True)
class Limit:
    """What an input may be where it is not honoured: the values that change nothing.

    Attributes:
        expected: them, in words.
    """

    changes_nothing: Callable[[Value], bool]
    expected: str


OFF = Limit(lambda value: not value, "false")
ZERO = Limit(lambda value: bool(value == 0), "0")
ONE = Limit(lambda value: bool(value == 1), "1")
NO_GUIDE = Limit(lambda text: not text, "none: answers are not guided here; medusa-serve has response_format")
NO_LORA = Limit(lambda values: not values, "none: there are no LoRA adapters")
# In no table: pad_id fills batches, length_penalty weighs beams, and there is one row and one beam; prompt_table_extra_id tells
# tables of embeddings apart, and there is none.
UNHONOURED = {
    "bad_words": Limit(lambda words: not any(words), "none: words cannot be banned"),
    "exclude_input_in_output": Limit(bool, "true: answers are without their prompt"),
    "return_context_logits": OFF,
    "return_generation_logits": OFF,
    "return_perf_metrics": OFF,
    "num_return_sequences": ONE,
    "beam_width": ONE,
    "embedding_bias_words": Limit(lambda words: not any(words), "none: logits cannot be biased"),
    "embedding_bias_weights": Limit(lambda weights: not any(weights), "0s, or none: logits cannot be biased"),
    "prompt_embedding_table": Limit(lambda table: not table, "none: a prompt is text, not embeddings"),
    "prompt_vocab_size": Limit(lambda value: value == 0, "0: a prompt is text, not embeddings"),
    "decoder_text_input": Limit(lambda text: not text, "none: the model has no encoder"),
    "return_num_input_tokens": OFF,
    "return_num_output_tokens": OFF,
    "guided_decoding_guide_type": NO_GUIDE,
    "guided_decoding_guide": NO_GUIDE,
    "lora_task_id": Limit(lambda value: value == 0, "0: there are no LoRA adapters"),
    "lora_weights": NO_LORA,
    "lora_config": NO_LORA,
}
# Of TensorRT-LLM's DecodingMode::Medusa, which accepts greedily and has no penalties, banned words or log-probabilities.
GREEDY = {
    "temperature": Limit(lambda value: value == 0, "0, or top_k 1: this engine decodes greedily"),
    "repetition_penalty": ONE,
    "presence_penalty": ZERO,
    "frequency_penalty": ZERO,
    "min_tokens": Limit(lambda value: bool(value <= 1), "0 or 1"),
    "return_log_probs": OFF,
}


def read_inputs(arrays: Mapping[str, Any], ports: Sequence[Port], parameters: Iterable[str] = ()) -> Values:
    """The values of a request's tensors, by name. An integer may be of any width: Triton has compared types with the configuration.

    Args:
        arrays: numpy arrays, with or without a batch axis.
        parameters: names of the request's parameters: where ``/generate`` puts what is no input, a misspelt one for instance.

    Raises:
        ConfigError: an unknown name, another type, another number of values, or bytes that are no UTF-8.
    """
    known = {port.name: port for port in ports}
    if unknown := sorted({*arrays, *parameters} - known.keys()):
        raise ConfigError("input", unknown[0], f"one of {', '.join(known)}", "correct the request")
    missing = [port.name for port in ports if not port.is_optional and port.name not in arrays]
    if missing:
        raise ConfigError(missing[0], "nothing", "one value", "add it to the request")
    return {name: _value(known[name], array) for name, array in arrays.items()}


def settle(values: Mapping[str, Value], end_ids: Sequence[int], limits: Mapping[str, Limit] | None = None) -> Values:
    """The values in one form: ``stop`` for both names, ``seed`` for both, ``temperature`` always, ``ignore_eos`` for ``end_id``.

    As in TensorRT-LLM, ``top_k`` above 1 or ``top_p`` without a temperature draw at temperature 1, ``top_k`` 1 is greedy, and
    ``top_p`` 0 means none. With neither, a temperature above 0 draws from all tokens, where TensorRT-LLM would ignore it.

    Args:
        end_ids: tokens that end the model's answers.
        limits: of the engine, besides UNHONOURED.

    Raises:
        ConfigError: a value that would change the answer and is not honoured.
    """
    found = dict(values)
    found["stop"] = [word for name in ("stop", "stop_words") for word in found.pop(name, ()) if word]
    if "random_seed" in found:
        older = found.pop("random_seed")
        if found.setdefault("seed", older) != older:
            raise ConfigError("random_seed", f"{older}", f"{found['seed']}, as seed says", "leave one of them out")
    if found.get("top_p") == 0:
        del found["top_p"]
    draws = found.get("top_k", 0) > 1 or found.get("top_p", 1) < 1
    found["temperature"] = 0.0 if found.get("top_k") == 1 else found.get("temperature", float(draws))
    end_id = found.pop("end_id", None)
    if end_id is not None and end_id != -1 and end_id not in end_ids:
        expected = f"{', '.join(map(str, end_ids)) or 'none'}, or -1 for no end"
        raise ConfigError("end_id", f"{end_id}", expected, "leave it out")
    found["ignore_eos"] = end_id == -1
    for name, limit in {**UNHONOURED, **(limits or {})}.items():
        if name in found and not limit.changes_nothing(found[name]):
            raise ConfigError(name, _told(found[name]), limit.expected, "change it, or leave it out")
    return found


def _told(value: Value) -> str:
    if isinstance(value, list) and len(value) > _MOST_TOLD:
        return f"{len(value)} values"
    return f"{value:g}" if isinstance(value, float) else f"{value}".lower()


def _value(port: Port, array: Any) -> Value:
    if array.dtype.kind not in KINDS[port.data_type]:
        raise ConfigError(port.name, f"{array.dtype}", f"a tensor of {port.data_type}", "correct the request")
    values = array.reshape(-1).tolist()
    if port.data_type == "STRING":
        values = [_text(port.name, value) for value in values]
    if -1 in port.dims:
        return values
    if len(values) != 1:
        raise ConfigError(port.name, f"{len(values)} values", "one", "correct the request")
    return values[0]


def _text(name: str, value: object) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise ConfigError(name, "bytes that are no UTF-8", "text", "encode it as UTF-8") from error
