#!/usr/bin/env bash
# Correct reasoning traces: keep the solutions that are right, train QLoRA on them, compare base and tuned.
#   make story-traces       RAW=gsm8k_model_solutions.jsonl MODEL=Qwen/Qwen2.5-1.5B launch/stories/traces.sh [--key value ...]
# What is there already is not made again, and a stopped training resumes, so that a job can be queued again.
set -euo pipefail
trap : USR1 # of a job whose time is up: the training answers it
raw=${RAW:-data/stories/traces.jsonl} out=${OUT:-output/story-traces} model=${MODEL:-embedded}
[[ -d $out/data ]] || manyrank data prepare gsm8k_verified --data_path "$raw" --output_dir "$out/data"
[[ -d $out/run/final_model ]] || manyrank train --model "$model" --method qlora --data_path "$out/data/train.jsonl" \
  --eval_data_path "$out/data/validation.jsonl" --eval_steps 25 --save_steps 25 --logging_steps 5 \
  --per_device_train_batch_size 8 --learning_rate 3e-3 --num_train_epochs 8 --max_length 512 \
  --output_dir "$out/run" --resume_from_checkpoint auto "$@"
[[ -d $out/evaluation ]] || manyrank evaluate "$out/run" --data "$out/data/validation.jsonl" --metrics loss,numeric \
  --max-new-tokens 64 --output "$out/evaluation"
