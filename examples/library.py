"""The library instead of the commands: export, measure, decode. ``python examples/library.py MODEL HEADS PROMPTS.jsonl OUTPUT``"""

from __future__ import annotations

import sys
from pathlib import Path

from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.backends import engine_builder, open_engine
from medusa_export.engines.bench.arguments import RunArguments
from medusa_export.engines.bench.run import run
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.tuning.auto import choose_tree
from medusa_export.engines.verify.selfcheck import check_engine
from medusa_export.exporter.job.arguments import ExportArguments
from medusa_export.exporter.pipeline.export import export
from medusa_export.heads.contract.engine_tools import EngineTools
from medusa_export.heads.trees.tree import load_tree

model, heads, prompts, output = map(Path, sys.argv[1:])
wanted = ExportArguments(ckpt=model, heads=heads, output=output, quant="fp8")  # the flags of medusa-export
export(wanted, EngineTools(check_engine, choose_tree, engine_builder(wanted.engine)))

report = run(
    RunArguments(engine=output / "engine", prompts=prompts, max_new_tokens=64, repeats=1)
)  # those of medusa-run
decoding, whole, parity = report["decode_speedup"]["median"], report["speedup"]["median"], report["parity"]
print(f"decoding {decoding:.2f}x, whole answers {whole:.2f}x, {parity['exact']} of {parity['prompts']} outputs equal")

engine, tokenizer = open_engine(output / "engine"), read_tokenizer(output / "engine")
ids = encode_chat(tokenizer, [{"role": "user", "content": "Why is the sky blue?"}])
tree = load_tree(str(output / "engine/tree.json"))
answer = generate(engine, ids, tree, max_new_tokens=64, eos_token_ids=engine.info.eos_token_ids)
print(f"{len(answer.tokens)} tokens in {len(answer.accepted)} steps: {tokenizer.decode(answer.tokens)}")
