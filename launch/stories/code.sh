#!/usr/bin/env bash
# Code that passes its tests: run the tests of every example, keep those that pass, train on them.
#   make story-code         RAW=code.jsonl MODEL=Qwen/Qwen2.5-Coder-1.5B launch/stories/code.sh [--key value ...]
set -euo pipefail
raw=${RAW:-data/stories/code.jsonl} out=${OUT:-output/story-code} model=${MODEL:-embedded}
manyrank data prepare code --data_path "$raw" --output_dir "$out/data" --overwrite
manyrank train q_code --model "$model" --data_path "$out/data/train.jsonl" --eval_data_path "$out/data/validation.jsonl" \
  --max_steps 20 --warmup_steps 2 --eval_steps 10 --save_steps 10 --logging_steps 5 --learning_rate 1e-3 \
  --output_dir "$out/run" "$@"
manyrank generate "$out/run" "$out/data/validation.jsonl" "$out/answers.jsonl" --max-new-tokens 64
