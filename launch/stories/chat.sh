#!/usr/bin/env bash
# Instructions and conversations to a chat model, on two processes, stopped once in the middle and resumed.
#   make story-chat         ALPACA=a.json SHAREGPT=s.json MODEL=Qwen/Qwen2.5-1.5B launch/stories/chat.sh [--key value ...]
set -euo pipefail
alpaca=${ALPACA:-data/stories/alpaca.json} sharegpt=${SHAREGPT:-data/stories/sharegpt.json}
out=${OUT:-output/story-chat} model=${MODEL:-embedded}
[[ ! -e $out ]] || { echo "$out is there already: OUT=... names another folder"; exit 2; }
train=(manyrank train default --model "$model" --data_path "[$alpaca, $sharegpt]" --max_length 512 --num_train_epochs 2
  --learning_rate 1e-3 --save_steps 5 --logging_steps 5 --nproc 2 --output_dir "$out" "$@")
"${train[@]}" &
until compgen -G "$out/checkpoint-*/manifest.json" > /dev/null; do # SIGTERM, as a scheduler sends it: the run saves and ends with 75
  kill -0 $! || { wait $!; exit 1; }
  sleep 0.2
done
code=0
kill $! 2> /dev/null || true
wait $! || code=$?
((code == 75 || code == 0)) || exit "$code"
echo "stopped with $code; going on"
((code == 0)) || "${train[@]}" --resume_from_checkpoint auto
manyrank merge "$out" --output "$out/merged" --overwrite
printf 'I am Ada and I have 5 pens.\nWhat do I have?\n' | manyrank chat "$out" --max-new-tokens 40
