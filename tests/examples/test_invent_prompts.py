"""examples/invent_prompts.py on a tiny model that ends its turns: what is kept, what is left out, and that a seed repeats itself."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "invent_prompts.py"
END = 2


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("invent_prompts", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def likely_to_end(model: Path) -> None:
    """Every token's logit is close to every other's, so that the end of a turn comes once in a while."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 0.01
    tensors["lm_head.weight"][END] += 0.1 * tensors["lm_head.weight"].abs().max()
    save_file(tensors, path, {"format": "pt"})


def test_prompts(
    script: Any,
    tiny_checkpoint: Callable[..., Path],
    tiny_tokenizer: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_tokenizer(tiny_checkpoint(tmp_path / "model", max_position_embeddings=512))
    likely_to_end(model)

    def invent(seed: int) -> list[dict[str, Any]]:
        output = tmp_path / "prompts.jsonl"
        script.main(model, output, count=40, slots=4, max_tokens=60, seed=seed)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert capsys.readouterr().out == f"wrote {output}: {len(rows)} prompts of 40 drawn\n"
        return rows

    first = invent(3)
    assert first == invent(3)
    assert first != invent(4)
    texts = [row["prompt"] for row in first]
    assert 0 < len(texts) < 40  # some ran to the limit or were too short
    assert len(set(texts)) == len(texts) == len({row["id"] for row in first})
    assert min(map(len, texts)) >= 20
    assert max(len(text.split()) for text in texts) < 60
    assert not any("</s>" in text for text in texts)
