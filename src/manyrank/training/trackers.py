"""The environment from which transformers' tracker callbacks read where to write. No torch.

W&B        its files in the run's folder, project and tags from the recipe; a resumed run goes on as the same W&B run
MLflow     where MLFLOW_TRACKING_URI says, else where MLflow itself would write; a resumed run goes on as the same one
TensorBoard  logs/tensorboard, also after a resume, so that it shows one run

What the user has set in the environment stands, but for what the recipe says, too.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ..config.resolve import TrainConfig
from ..errors import UserError

WANDB_ID, MLFLOW_ID = "wandb_run_id", "mlflow_run_id"  # files in logs/


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
    """Give W&B and MLflow the id of this run, kept in its folder: whoever trains on there goes on with the same run of theirs.

    Raises:
        UserError: MLflow has no such run, or cannot begin one.
        OSError: the id cannot be written down.
    """
    if "wandb" in config.report_to:
        file = output_dir / "logs" / WANDB_ID
        if "WANDB_RUN_ID" not in os.environ:
            os.environ["WANDB_RUN_ID"] = file.read_text().strip() if file.is_file() else secrets.token_hex(4)
        file.write_text(os.environ["WANDB_RUN_ID"] + "\n")
        os.environ.setdefault("WANDB_RESUME", "allow")
    if "mlflow" in config.report_to:
        _continue_mlflow(output_dir / "logs" / MLFLOW_ID, name=config.run_name or output_dir.name)


def _continue_mlflow(file: Path, *, name: str) -> None:
    """A run of a script, or one that the user has named, stands."""
    import mlflow

    if mlflow.active_run() or "MLFLOW_RUN_ID" in os.environ:
        return
    run_id = file.read_text().strip() if file.is_file() else None
    try:
        if "MLFLOW_EXPERIMENT_NAME" in os.environ:
            mlflow.set_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])
        with mlflow.start_run(run_id=run_id, run_name=None if run_id else name) as run:
            pass
    except mlflow.MlflowException as error:
        what = (
            f"MLflow cannot {f'resume run {run_id}' if run_id else 'start a run'}: {str(error).strip().splitlines()[0]}"
        )
        fix = "set MLFLOW_TRACKING_URI, such as sqlite:////data/mlflow.db"
        fix = f"{fix}, as it was; or remove {file}, and it starts another run" if run_id else fix
        where = f"report_to mlflow, MLFLOW_TRACKING_URI {os.environ.get('MLFLOW_TRACKING_URI', 'not set')}"
        raise UserError(what, where=where, fix=fix) from None
    os.environ["MLFLOW_RUN_ID"] = run.info.run_id  # transformers opens it again; afterwards, since its end unsets this
    file.write_text(run.info.run_id + "\n")
