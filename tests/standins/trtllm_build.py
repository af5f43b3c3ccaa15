"""A stand-in for ``trtllm-build``, which is not here: it records its arguments, prints a log, and writes files of the right names.

It builds nothing. STANDIN_RECORD: file to append the arguments to, as JSON. STANDIN_LOG: text to print. STANDIN_EXIT: exit status.
STANDIN_VERSION: what the engine's config.json says. STANDIN_FORGETS: a file name that it does not write.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

FLAGS = (
    "checkpoint_dir", "output_dir", "max_input_len", "max_seq_len", "max_batch_size", "max_beam_width", "max_num_tokens",
    "opt_num_tokens", "kv_cache_type", "workers", "log_level", "speculative_decoding_mode", "remove_input_padding",
    "gpt_attention_plugin", "gemm_plugin", "use_paged_context_fmha", "max_draft_len", "timing_cache",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="trtllm-build")
    for flag in FLAGS:
        parser.add_argument(f"--{flag}")
    given = parser.parse_args()
    with open(os.environ["STANDIN_RECORD"], "a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    print("[TensorRT-LLM] a stand-in: this builds nothing", flush=True)
    print(os.environ.get("STANDIN_LOG", ""), flush=True)
    if os.environ.get("STANDIN_EXIT"):
        sys.exit(int(os.environ["STANDIN_EXIT"]))
    checkpoint, output = Path(given.checkpoint_dir), Path(given.output_dir)
    config = json.loads((checkpoint / "config.json").read_text())
    output.mkdir(parents=True, exist_ok=True)
    for rank in range(config["mapping"]["tp_size"]):
        assert (checkpoint / f"rank{rank}.safetensors").is_file()
        print(f"[TRT-LLM] [I] Weights loaded, rank {rank}")
        print("[TRT] [I] Engine generation completed in 1.5 seconds.")
        if os.environ.get("STANDIN_FORGETS") != f"rank{rank}.engine":
            (output / f"rank{rank}.engine").write_bytes(b"no engine")
        print(f"[TRT-LLM] [I] Engine serialized. Total time: 00:00:0{rank}")
    build = {"max_batch_size": int(given.max_batch_size), "max_beam_width": int(given.max_beam_width)}
    build |= {"max_seq_len": int(given.max_seq_len) + config.get("max_draft_len", 0)}
    build |= {"speculative_decoding_mode": 4 if given.speculative_decoding_mode == "medusa" else 1}
    engine = {"version": os.environ.get("STANDIN_VERSION", "1.2.1"), "pretrained_config": config, "build_config": build}
    (output / "config.json").write_text(json.dumps(engine))


if __name__ == "__main__":
    main()
