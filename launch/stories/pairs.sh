#!/usr/bin/env bash
# Questions and answers with a preset: look at the data, try one step, then train.
#   make story-pairs        DATA=my.jsonl MODEL=Qwen/Qwen2.5-1.5B PRESET=qwen_lora launch/stories/pairs.sh [--key value ...]
set -euo pipefail
data=${DATA:-data/sample.jsonl} out=${OUT:-output/story-pairs} model=${MODEL:-embedded} preset=${PRESET:-qwen_lora}
common=(--model "$model" --data_path "$data" --eval_split 0.1 --eval_steps 20 --logging_steps 10 --learning_rate 1e-3)
manyrank data inspect "$preset" "${common[@]}"
manyrank train "$preset" "${common[@]}" --output_dir "$out" --dry_run "$@"
manyrank train "$preset" "${common[@]}" --output_dir "$out" "$@"
manyrank report "$out"
