#!/usr/bin/env bash
# From prompts to an answer of Triton, one command a step: workflow.sh MODEL OUTPUT
# Small as it stands: the heads that it trains only show the way. For a model to deploy, give your prompts and raise the
# numbers: PROMPTS=mine.jsonl COUNT=8000 TOKENS=512 EPOCHS=2 STEPS=2000 QUESTIONS=theirs.jsonl ASKED=100 workflow.sh MODEL OUTPUT
# Run again, it continues where it stopped.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
[ -x "$here/../.venv/bin/medusa-run" ] && PATH="$here/../.venv/bin:$PATH"
model=${1:?model: a directory, or owner/name on the hub} output=${2:?directory to write}
prompts=${PROMPTS:-$here/smollm2-135m-medusa-v2/prompts.jsonl} # to train on
count=${COUNT:-24} tokens=${TOKENS:-48}                        # how many of them, and tokens of an answer
epochs=${EPOCHS:-1} heads=${HEADS:-2} steps=${STEPS:-6}        # over the heads' data; Medusa heads; quantization-aware steps
quant=${QUANT:-fp8}                                            # see medusa-export formats
questions=${QUESTIONS:-$here/spec_bench_39.jsonl}              # like your users', and not among the prompts
asked=${ASKED:-4}                                              # questions from the top to measure with, from the end to choose the tree with
drafts=${DRAFTS:-auto}                                         # what guesses tokens: see medusa-run --help
triton=${TRITON-}                                              # --install: serve with a tritonserver that pip installs
port=${PORT:-8000}                                             # of Triton's HTTP; the next two are gRPC's and that of its metrics
mkdir -p "$output"
step() { printf '\n== %s\n' "$*"; }
is_made() { [ -d "$1" ] && echo "$1 is there"; } # directories appear whole or not at all

step "1 data: the model answers prompts"
"$here/prepare_data.sh" --model "$model" --data_path "$prompts" --output_path "$output/data.jsonl" --limit "$count" --max-tokens "$tokens"

step "2 heads: trained on the answers, the base frozen"
is_made "$output/heads" || "$here/launch.sh" --mode medusa --model "$model" --data "$output/data.jsonl" --output_dir "$output/heads" --num_epochs "$epochs" --heads "$heads" --keep-truncated

step "3 quantization-aware training: base and heads learn with the rounding of $quant"
is_made "$output/qat" || medusa-train --ckpt "$model" --heads "$output/heads" --data "$output/data.jsonl" --joint --quant "$quant" --max-steps "$steps" --batch-size 4 --keep-truncated --output "$output/qat"

step "4 export: quantize, write the checkpoint, the graph and the engine, choose the tree"
tail -n "$asked" "$questions" > "$output/tree-questions.jsonl"
medusa-export --ckpt "$output/qat" --quant "$quant" --calib "$prompts" --prompts "$output/tree-questions.jsonl" --output "$output/export"

step "5 verify: every number against its source"
medusa-export verify "$output/export"

step "6 run: the speed-up, and whether answers stay the same"
medusa-run --engine "$output/export/engine" --prompts "$questions" --limit "$asked" --max-new-tokens "$tokens" --repeats 1 --drafts "$drafts" --reference "$output/qat" --report "$output/report.json" --html "$output/report.html"

step "7 Triton: a model repository"
is_made "$output/repository" || medusa-triton --engine "$output/export/engine" --drafts "$drafts" --output "$output/repository"
medusa-triton verify "$output/repository"

if [ -z "$triton" ] && ! command -v tritonserver > /dev/null; then
  echo "no tritonserver on the PATH: TRITON=--install asks one that pip installs"
  exit
fi
step "8 serve: one question"
# shellcheck disable=SC2086  # a flag, or none
medusa-triton serve "$output/repository" --http-port "$port" --grpc-port $((port + 1)) --metrics-port $((port + 2)) $triton &
server=$!
trap 'kill "$server" 2> /dev/null; wait "$server"' EXIT
until curl -sf "127.0.0.1:$port/v2/health/ready"; do
  kill -0 "$server" 2> /dev/null || exit # what it wrote says why
  sleep 1
done
curl -sf "127.0.0.1:$port/v2/models/medusa/generate" -d '{"text_input": "Why is the sky blue?", "max_tokens": 16}'
