"""Inputs and outputs of this project's own Triton models in one table, from which configurations, parsing and answers follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.engines.serving.triton.dialect import NVIDIAS, OURS, STREAM, TIMEOUT, Port

Array = npt.NDArray[Any]

DTYPES: dict[str, Any] = {
    "STRING": np.object_, "INT64": np.int64, "INT32": np.int32, "UINT64": np.uint64,
    "FP16": np.float16, "FP32": np.float32, "BOOL": np.bool_,
}  # fmt: skip
INPUTS = (*NVIDIAS, *OURS, STREAM, TIMEOUT)
LOGPROBS = (  # with return_log_probs; a beam, as NVIDIA's
    Port("cum_log_probs", "FP32", is_optional=False),
    Port("output_log_probs", "FP32", dims=(1, -1), is_optional=False),
)
OUTPUTS = (
    Port("text_output", "STRING", is_optional=False),
    Port("token_ids", "INT32", dims=(-1,), is_optional=False),
    Port("finish_reason", "STRING", is_optional=False),
    Port("prompt_tokens", "INT32", is_optional=False),
    Port("completion_tokens", "INT32", is_optional=False),
    Port("tokens_per_step", "FP32", is_optional=False),
    *LOGPROBS,
)


def write_outputs(values: Mapping[str, Any], *, is_batched: bool = True) -> dict[str, Array]:
    """Tensors of an answer, by name: every output that has its value in ``values``.

    Args:
        is_batched: with a batch axis of 1, as the configurations have it; those written before there was one have none.
    """
    arrays = {}
    for port in OUTPUTS:
        if port.name not in values:
            continue
        value = values[port.name]
        listed = list(value) if port.dims[-1] == -1 else [value]
        encoded = [item.encode() for item in listed] if port.data_type == "STRING" else listed
        shape = ((1,) if is_batched else ()) + tuple(len(listed) if size == -1 else size for size in port.dims)
        arrays[port.name] = np.array(encoded, dtype=DTYPES[port.data_type]).reshape(shape)
    return arrays
