"""A wrong value in config.json is one line, not a line a tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.exporter.verify.checkpoint import verify_trtllm


def edit(out: Path, **values: Any) -> None:
    path = out / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"dtype": "bfloat16"}, "dtype 'bfloat16' in config.json, but the ranks hold float16"),
        ({"vocab_size": 98}, "vocab_size 98 in config.json, but the embedding has 97 rows"),
        ({"num_medusa_heads": 3}, "num_medusa_heads 3 in config.json, but the ranks have 2"),
        ({"num_hidden_layers": 1}, "num_hidden_layers 1 in config.json, but the ranks have 2"),
        (
            {"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}},
            "tp_size 2 in config.json, but the ranks are of 1",
        ),
    ],
)
def test_the_cause_alone(values: dict[str, Any], line: str, make_case: Callable[..., Any], tmp_path: Path) -> None:
    out = make_case().write(tmp_path / "out")
    assert verify_trtllm(out) == []
    edit(out, **values)
    assert verify_trtllm(out) == [line]
