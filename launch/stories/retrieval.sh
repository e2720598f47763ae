#!/usr/bin/env bash
# Answers from passages: train, find the passages of a question, and answer from them.
#   make story-retrieval    DATA=my.jsonl PASSAGES=my.txt QUESTION="..." MODEL=Qwen/Qwen2.5-1.5B launch/stories/retrieval.sh [--key value ...]
# What is there already is not made again.
set -euo pipefail
data=${DATA:-data/sample.jsonl} passages=${PASSAGES:-data/stories/passages.txt} model=${MODEL:-embedded}
question=${QUESTION:-What is the variance of a Bernoulli variable with p = 0.3?} out=${OUT:-output/story-retrieval}
[[ -d $out/final_model ]] || manyrank train --model "$model" --data_path "$data" --learning_rate 1e-3 --output_dir "$out" "$@"
python "$(dirname "$0")/retrieval.py" "$out" "$passages" "$question"
