"""A tiny float32 engine whose heads draft well: for loads that are about a server, not about a model.

    python benchmarks/tiny_engine.py OUT

The model walks a cycle through its vocabulary, a little disturbed by its layers, and head h knows the token h + 2 ahead. Writes
OUT/engine and OUT/prompts.jsonl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

VOCAB, HIDDEN, LAYERS, HEADS, CONTEXT, NOISE = 97, 64, 4, 3, 512, 0.1
SPECIAL = ["<unk>", "<s>", "</s>", "<user>", "<assistant>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}<assistant>"


def main(out: Annotated[Path, typer.Argument(help="Directory to make.")], prompts: int = 40) -> None:
    """Make it."""
    from medusa_export.exporter.engine_dirs.onnxruntime import write_engine
    from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
    from medusa_export.heads.trees.tree import Tree
    from medusa_export.quantize.formats import get_format
    from medusa_export.quantize.scales import Scales

    table = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(5))
    ahead = {steps: table.roll(steps, 0) for steps in range(1, HEADS + 2)}  # token t is at row t + steps
    _write_model(out / "model", table, ahead[1])
    _write_heads(out / "heads", ahead)
    checkpoint = MedusaCheckpoint.open(out / "model", out / "heads")
    tree = Tree.from_choices([[0], [1], [0, 0], [0, 0, 0]])
    write_engine(
        out / "engine", checkpoint, get_format("none"), Scales({}, {}, {}), tree=tree, max_length=CONTEXT,
        draft_vocab=None, save_tokenizer=_write_tokenizer, source={"checkpoint": "tiny"},
    )  # fmt: skip
    lines = (json.dumps({"prompt": f"w{n} w{n + 1} w{2 * n}"}) for n in range(prompts))
    (out / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _write_model(folder: Path, embedding: torch.Tensor, lm_head: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=80, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=CONTEXT, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, generator = AutoModelForCausalLM.from_config(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                scale = NOISE if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.get_input_embeddings().weight.copy_(embedding)
        model.get_output_embeddings().weight.copy_(lm_head)
    model.save_pretrained(folder)


def _write_heads(folder: Path, ahead: dict[int, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    tensors = {}
    for head in range(HEADS):
        tensors[f"{head}.0.linear.weight"] = torch.zeros(HIDDEN, HIDDEN)
        tensors[f"{head}.0.linear.bias"] = torch.zeros(HIDDEN)
        tensors[f"{head}.1.weight"] = ahead[head + 2].contiguous()
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": HEADS, "medusa_num_layers": 1}))


def _write_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{number}" for number in range(VOCAB - len(SPECIAL)))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    typer.run(main)
