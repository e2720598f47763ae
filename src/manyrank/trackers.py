"""Where transformers' tracker callbacks write: they look it up in the environment. No torch.

W&B        its files in the run's folder, project and tags from the recipe; a resumed run goes on as the same W&B run
TensorBoard  logs/tensorboard, also after a resume, so that it shows one run

What the user has set in the environment stands, but for what the recipe says, too.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from .config import TrainConfig

WANDB_ID = "wandb_run_id"  # a file in logs/


def prepare(config: TrainConfig, output_dir: Path) -> None:
    """Tell the trackers of the recipe. Writes nothing."""
    if "wandb" in config.report_to:
        os.environ.setdefault("WANDB_DIR", str(output_dir))
        if config.wandb_project:
            os.environ["WANDB_PROJECT"] = config.wandb_project
        if config.wandb_tags:
            os.environ["WANDB_TAGS"] = ",".join(config.wandb_tags)
    if "tensorboard" in config.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output_dir / "logs" / "tensorboard"))


def continue_run(config: TrainConfig, output_dir: Path) -> None:
    """Give W&B the id of this run, which is kept in its folder: whoever trains on there goes on with the same W&B run."""
    if "wandb" not in config.report_to:
        return
    file = output_dir / "logs" / WANDB_ID
    if "WANDB_RUN_ID" not in os.environ:
        os.environ["WANDB_RUN_ID"] = file.read_text().strip() if file.is_file() else secrets.token_hex(4)
    file.write_text(os.environ["WANDB_RUN_ID"] + "\n")
    os.environ.setdefault("WANDB_RESUME", "allow")
