"""A script that trains by the Python API, for torchrun: DATA OUTPUT_DIR STRATEGY."""

import os
import sys

from transformers import TrainerCallback

from manyrank import SFTConfig, SFTTrainer


class Save(TrainerCallback):  # what one rank's callback asks for, all do
    def on_log(self, args, state, control, **kwargs):
        control.should_save = os.environ["RANK"] == "1" and state.global_step == 2


config = SFTConfig(
    "verify", data_path=sys.argv[1], output_dir=sys.argv[2], max_steps=3, logging_steps=1, strategy=sys.argv[3]
)
result = SFTTrainer(config, callbacks=[Save()]).train()
assert result.global_step == 3 and (result.folder / "checkpoint-2" / "manifest.json").is_file()
