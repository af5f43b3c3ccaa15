"""Autoregressive decoding in the same precision: the engine against ``transformers`` generate, interleaved.

medusa-export --ckpt quickstart/model --heads examples/smollm2-135m-medusa-v2 --output /tmp/float
python benchmarks/peers.py /tmp/float/engine quickstart/model
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from medusa_export.engines.base import AUTOREGRESSIVE, generate
from medusa_export.engines.machine import hardware, versions
from medusa_export.engines.onnxruntime import OnnxRuntimeEngine
from medusa_export.heads.conversations import encode_chat, load_prompts, read_tokenizer
from medusa_export.heads.model import load_reference

PROMPTS = Path(__file__).resolve().parent.parent / "examples" / "spec_bench_39.jsonl"


def main(
    engine_dir: Annotated[Path, typer.Argument(help="An engine exported with --quant none.")],
    checkpoint: Annotated[Path, typer.Argument(help="The Hugging Face checkpoint.")],
    limit: Annotated[int, typer.Option(help="Prompts.")] = 8,
    new_tokens: Annotated[int, typer.Option(help="Tokens a prompt; the end of sequence is ignored.")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print tokens/s of both and their ratio, prefill included."""
    engine, model = OnnxRuntimeEngine(engine_dir), load_reference(checkpoint, torch.float32)
    tokenizer = read_tokenizer(engine_dir)
    rates: dict[str, list[float]] = {"engine": [], "transformers": []}
    same = 0
    for turn, prompt in enumerate(load_prompts(PROMPTS, limit)):
        ids = encode_chat(tokenizer, prompt.messages)
        outputs = {}
        for name in ("engine", "transformers") if turn % 2 else ("transformers", "engine"):
            start = time.perf_counter()
            if name == "engine":
                result = generate(engine, ids, AUTOREGRESSIVE, max_new_tokens=new_tokens, eos_token_ids=())
                outputs[name] = result.tokens
            else:
                outputs[name] = _transformers(model, ids, new_tokens)
            rates[name].append(new_tokens / (time.perf_counter() - start))
        same += outputs["engine"] == outputs["transformers"]
    ratio = median(ours / theirs for ours, theirs in zip(rates["engine"], rates["transformers"], strict=True))
    table = Table("", "tokens/s (median)", title=f"autoregressive, {limit} prompts, {new_tokens} tokens each")
    for name, values in rates.items():
        table.add_row(name, f"{median(values):.1f}")
    table.add_row("ratio (median of pairs)", f"{ratio:.2f}")
    table.add_row("equal outputs", f"{same} of {limit}")
    Console().print(table)
    if json_file:
        body = {"rates": rates, "ratio": ratio, "equal": same, "hardware": hardware(), "versions": versions()}
        json_file.write_text(json.dumps(body, indent=1) + "\n")


def _transformers(model: torch.nn.Module, ids: list[int], new_tokens: int) -> list[int]:
    # With pad equal to a token of the prompt, generate would mask that token out: the mask is given.
    prompt = torch.tensor([ids])
    settings = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "eos_token_id": None}
    with torch.inference_mode():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)  # type: ignore[operator]
    return out[0, len(ids) :].tolist()


if __name__ == "__main__":
    typer.run(main)
