#!/usr/bin/env bash
# One machine, through torchrun:   launch/torchrun.sh RECIPE STRATEGY NPROC [--key value ...]
set -euo pipefail
(($# >= 3)) || { sed -n 's/^# //p' "$0" >&2; exit 2; }
recipe=$1 strategy=$2 nproc=$3
shift 3
exec torchrun --standalone --nproc_per_node "$nproc" -m manyrank.train "$recipe" --strategy "$strategy" "$@"
