#!/usr/bin/env bash
# Training data that the base model writes: the flags of the reference workflow, handed to medusa-data.
#   prepare_data.sh --model M --server True             serve M on 127.0.0.1:$PORT (default 8000) until it is stopped
#   prepare_data.sh --data_path D --output_path O       answer the prompts of D through that server,
#                   [--served M]                        ask it for M, where it lists other models too (transformers serve does)
#                   [--model M]                         or run M in this process, without a server
#                   [further flags of medusa-data]
set -euo pipefail
bin="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin"
[ -x "$bin/medusa-data" ] && PATH="$bin:$PATH"
port=${PORT:-8000}
model="" served="" server=False
arguments=()
while [ $# -gt 0 ]; do
  if [ $# -lt 2 ]; then
    echo "error: $1: got no value; expected one; see examples/prepare_data.sh" >&2
    exit 2
  fi
  case "$1" in
    --model) model=$2 ;;
    --server) server=$2 ;;
    --served) served=$2 ;;
    --data_path) arguments+=(--prompts "$2") ;;
    --output_path) arguments+=(--output "$2") ;;
    *) arguments+=("$1" "$2") ;;
  esac
  shift 2
done
case "$server" in
  True | true)
    if [ -z "$model" ]; then
      echo "error: --model: got nothing; expected the model to serve; give it" >&2
      exit 2
    fi
    if command -v vllm >/dev/null; then
      exec vllm serve "$model" --host 127.0.0.1 --port "$port"
    fi
    exec transformers serve "$model" --host 127.0.0.1 --port "$port" ;;
  False | false) ;;
  *)
    echo "error: --server: got $server; expected True or False; correct it" >&2
    exit 2 ;;
esac
if [ -n "$model" ]; then
  exec medusa-data --model "$model" "${arguments[@]}"
fi
exec medusa-data --server "http://127.0.0.1:$port" ${served:+--model "$served"} "${arguments[@]}"
