#!/usr/bin/env bash
# FasterDecoding's heads for Vicuna to TensorRT-LLM and Triton: vicuna_to_trtllm.sh OUTPUT PROMPTS.jsonl
# BASE and HEADS name other models: directories, or owner/name on the hub, from where 14 GB come otherwise. Where trtllm-build is not
# installed, the export says how to build the engine where it is; everything before that needs no GPU.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
base=${BASE:-lmsys/vicuna-7b-v1.3} heads=${HEADS:-FasterDecoding/medusa-vicuna-7b-v1.3} output=$1 prompts=$2

medusa-export --ckpt "$base" --heads "$heads" --chat-template "$here/vicuna.jinja" --quant fp8 --calib "$prompts" --kv-cache fp8 --engine tensorrt-llm --output "$output"
medusa-export verify "$output"
if [ -f "$output/engine/build.json" ]; then
  medusa-run --engine "$output/engine" --prompts "$prompts" --report "$output.json" --html "$output.html"
  medusa-triton --engine "$output/engine" --output "$output-triton"
  medusa-triton verify "$output-triton"
fi
