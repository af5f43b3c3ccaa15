#!/usr/bin/env bash
# Trains Medusa heads: the flags of the reference workflow, handed to medusa-train; on every GPU where there are several.
#   launch.sh --model M --data D --output_dir O [--mode medusa] [--num_epochs 1] [--lr 1e-4] [--save_steps 100]
#             [--only_medusa_heads True] [--heads 4] [--layers 1] [further flags of medusa-train]
set -euo pipefail
bin="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin"
[ -x "$bin/medusa-train" ] && PATH="$bin:$PATH"
only_heads=True
arguments=()
while [ $# -gt 0 ]; do
  if [ $# -lt 2 ] && [[ "$1" != --keep-truncated && "$1" != --bf16 ]]; then
    echo "error: $1: got no value; expected one; see examples/launch.sh" >&2
    exit 2
  fi
  case "$1" in
    --model) arguments+=(--ckpt "$2") ;;
    --data) arguments+=(--data "$2") ;;
    --output_dir) arguments+=(--output "$2") ;;
    --num_epochs) arguments+=(--epochs "$2") ;;
    --lr) arguments+=(--lr "$2") ;;
    --save_steps) arguments+=(--checkpoint-every "$2") ;;
    --heads) arguments+=(--num-heads "$2") ;;
    --layers) arguments+=(--num-layers "$2") ;;
    --only_medusa_heads) only_heads=$2 ;;
    --mode)
      if [ "$2" != medusa ]; then
        echo "error: --mode: got $2; expected medusa; leave it out" >&2
        exit 2
      fi ;;
    --keep-truncated | --bf16) arguments+=("$1"); shift; continue ;;
    *) arguments+=("$1" "$2") ;;
  esac
  shift 2
done
gpus=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU || true)
case "$only_heads" in
  True | true) exec medusa-train "${arguments[@]}" ;;
  False | false) arguments+=(--joint) ;;
  *)
    echo "error: --only_medusa_heads: got $only_heads; expected True or False; correct it" >&2
    exit 2 ;;
esac
if [ "$gpus" -gt 1 ]; then
  exec torchrun --standalone --nproc_per_node "$gpus" --no-python medusa-train "${arguments[@]}"
fi
exec medusa-train "${arguments[@]}"
