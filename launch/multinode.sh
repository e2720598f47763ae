#!/usr/bin/env bash
# One of several machines; run it on each:   launch/multinode.sh RECIPE STRATEGY [--key value ...]
# NNODES, NODE_RANK (0 on the first) and ENDPOINT (HOST:PORT of the first) come from the environment; NPROC defaults to
# the number of GPUs. output_dir in the recipe or on the command line must be a folder that all machines share. A machine that
# went away comes back with the same command: the run resumes from its newest checkpoint.
set -euo pipefail
(($# >= 2)) || { sed -n 's/^# //p' "$0" >&2; exit 2; }
recipe=$1 strategy=$2
shift 2
[[ " $* " =~ " --resume"([_-]from|=|" ") ]] || set -- "$@" --resume_from_checkpoint auto
exec manyrank train "$recipe" --strategy "$strategy" \
  --nnodes "${NNODES:?how many machines}" --node_rank "${NODE_RANK:?number of this machine, from 0}" \
  --rdzv_endpoint "${ENDPOINT:?HOST:PORT of the first machine}" ${NPROC:+--nproc "$NPROC"} "$@"
