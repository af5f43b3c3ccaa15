"""Prompts that a chat model invents itself: sampled from its chat template's user turn, as in Magpie (arXiv 2406.08464)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.onnxruntime.slots import BatchDecoder
from medusa_export.exporter.engine_dirs.onnxruntime import write_base_engine
from medusa_export.heads.decoding.sampling import Sampler, Sampling

MARK = "THE-USERS-WORDS"
MIN_CHARACTERS = 20


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face directory of a chat model.")],
    output: Annotated[Path, typer.Option(help="JSONL file to write.")],
    count: Annotated[int, typer.Option(help="Prompts to draw; short and endless ones are left out.")] = 100,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_tokens: int = 256,
    slots: Annotated[int, typer.Option(help="Prompts at once.")] = 32,
    seed: int = 0,
) -> None:
    """Write prompts for medusa-data."""
    sampling = Sampling(temperature, top_p, max_tokens, seed)
    with tempfile.TemporaryDirectory() as folder:
        write_base_engine(Path(folder) / "engine", model, source={}, max_length=max_tokens + 128)
        decoder = BatchDecoder(Path(folder) / "engine", slots=slots)
        found = invent(decoder, read_tokenizer(model), count, sampling)
    rows = ({"id": f"invented-{seed}-{n}", "source": "invented", "prompt": text} for n, text in enumerate(found))
    output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {output}: {len(found)} prompts of {count} drawn")


def invent(decoder: BatchDecoder, tokenizer: Any, count: int, sampling: Sampling) -> list[str]:
    """User turns in the order in which they ended, without duplicates.

    Args:
        count: how many are drawn.
    """
    template = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    prefix = tokenizer(template.split(MARK)[0], add_special_tokens=False)["input_ids"]
    draw = Sampler(sampling.temperature, sampling.seed, sampling.top_p).draw
    ends, found = set(decoder.info.eos_token_ids), dict[str, None]()
    turns: list[list[int]] = []
    started = 0
    while started < count or turns:
        while started < count and len(turns) < decoder.slots:
            turns.append([draw(decoder.admit(prefix))])
            started += 1
        logits = decoder.step([turn[-1] for turn in turns])
        for slot in reversed(range(len(turns))):  # backwards, because the last one moves into a slot that ends
            turns[slot].append(draw(logits[slot]))
            is_whole = turns[slot][-1] in ends
            if is_whole or len(turns[slot]) >= sampling.max_tokens:
                text = tokenizer.decode(turns[slot], skip_special_tokens=True).strip()
                if is_whole and len(text) >= MIN_CHARACTERS:
                    found[text] = None
                decoder.release(slot)
                last = turns.pop()
                if slot < len(turns):
                    turns[slot] = last
    return list(found)


if __name__ == "__main__":
    typer.run(main)
