"""A script whose training hangs and is interrupted twice: DATA OUTPUT_DIR."""

import os
import signal
import sys
import threading
import time

from transformers import TrainerCallback

from manyrank import SFTConfig, SFTTrainer


class Hang(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        for after in (0.5, 2.5):
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(60)


if __name__ == "__main__":
    config = SFTConfig(model="embedded", data_path=sys.argv[1], output_dir=sys.argv[2], max_length=256, max_steps=3)
    try:
        SFTTrainer(config, callbacks=[Hang()]).train()
    except KeyboardInterrupt:
        print("interrupted")
