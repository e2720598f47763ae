#!/usr/bin/env bash
# Run a command of the environment VENV on the stand-in GPUs: run.sh VENV LIBRARIES COMMAND ...
set -euo pipefail
venv=$1 libraries=$(realpath "$2")
shift 2
export FAKECUDA=1 LD_LIBRARY_PATH=$libraries PATH=$venv/bin:$PATH
export PYTHONPATH=$(dirname "$(realpath "$0")")/patches${PYTHONPATH:+:$PYTHONPATH}
LD_PRELOAD=$libraries/libcudart.so.13:$libraries/libcublasLt.so.13:$libraries/libcublas.so.13:$libraries/libnccl.so.2 exec "$@"
