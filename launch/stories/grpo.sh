#!/usr/bin/env bash
# SFT on answers of which a third is right, GRPO with a reward for right ones, and base, SFT and GRPO side by side.
#   make story-grpo       SFT_DATA=my.jsonl DATA=prompts.jsonl MODEL=Qwen/Qwen2.5-1.5B launch/stories/grpo.sh [--key value ...]
# What is there already is not made again, and a stopped training resumes. The arguments go to GRPO.
set -euo pipefail
trap : USR1 # of a job whose time is up: the training answers it
sft_data=${SFT_DATA:-data/stories/sums_with_mistakes.jsonl} data=${DATA:-data/stories/sums.jsonl}
out=${OUT:-output/story-grpo} model=${MODEL:-embedded}
[[ -d $out/sft/final_model ]] || manyrank train --model "$model" --data_path "$sft_data" --global_batch_size 50 \
  --per_device_train_batch_size 50 --max_length 64 --max_steps 200 --learning_rate 3e-3 --save_steps 50 \
  --output_dir "$out/sft" --resume_from_checkpoint auto
[[ -d $out/grpo/final_model ]] || manyrank grpo --config from_sft --sft-model "$out/sft" --data_path "$data" \
  --rewards '{numeric: 1}' --num_generations 8 --global_batch_size 160 --gradient_accumulation_steps none \
  --per_device_train_batch_size 80 --max_completion_length 12 --max_steps 60 --learning_rate 1e-3 \
  --lr_scheduler_type constant --beta 0.02 --logging_steps 5 --save_steps 20 \
  --output_dir "$out/grpo" --resume_from_checkpoint auto "$@"
[[ -d $out/evaluation ]] || manyrank evaluate "$out/sft" "$out/grpo" --data "$data" --metrics loss,numeric --max_length 64 \
  --max-new-tokens 12 --output "$out/evaluation"
