#!/usr/bin/env bash
# One machine, through accelerate launch:   launch/local.sh RECIPE STRATEGY NPROC [--key value ...]
set -euo pipefail
(($# >= 3)) || { sed -n 's/^# //p' "$0" >&2; exit 2; }
recipe=$1 strategy=$2 nproc=$3
shift 3
exec manyrank train "$recipe" --via accelerate --strategy "$strategy" --nproc "$nproc" "$@"
