"""What an answer's tensors are. What a request's may be is in test_dialect.py."""

from __future__ import annotations

import numpy as np

from medusa_export.engines.serving.triton.tensors import INPUTS, LOGPROBS, OUTPUTS, write_outputs

VALUES = {
    "text_output": "é", "token_ids": [5, 6], "finish_reason": "", "prompt_tokens": 3, "completion_tokens": 2, "tokens_per_step": 1.5,
}  # fmt: skip


def test_outputs() -> None:
    arrays = write_outputs(VALUES)
    assert list(arrays) == [port.name for port in OUTPUTS if port not in LOGPROBS]
    assert arrays["text_output"].tolist() == [["é".encode()]]
    assert (arrays["token_ids"].dtype, arrays["token_ids"].tolist()) == (np.int32, [[5, 6]])
    assert arrays["tokens_per_step"].tolist() == [[1.5]]
    assert write_outputs({**VALUES, "token_ids": []})["token_ids"].shape == (1, 0)


def test_log_probabilities_have_a_beam() -> None:
    arrays = write_outputs({**VALUES, "cum_log_probs": -3.0, "output_log_probs": [-1.0, -2.0]})
    assert arrays["cum_log_probs"].tolist() == [[-3.0]]
    assert arrays["output_log_probs"].tolist() == [[[-1.0, -2.0]]]


def test_repositories_without_a_batch_axis_get_none() -> None:
    arrays = write_outputs(VALUES, is_batched=False)
    assert (arrays["text_output"].shape, arrays["token_ids"].shape) == ((1,), (2,))


def test_names_are_used_once() -> None:
    for ports in (INPUTS, OUTPUTS):
        assert len({port.name for port in ports}) == len(ports)
