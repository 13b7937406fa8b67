"""TensorBoard, Weights & Biases and MLflow, as Lightning's loggers."""

import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.errors import UserError

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainingParams

logger = logging.getLogger("oumi_pl")

INSTALL = "install it with: pip install 'oumi_pl[tracking]'"


def loggers(params: "TrainingParams") -> list[Any]:
    """The loggers that the parameters switch on.

    TensorBoard is on unless it is switched off, so that it may be absent: that is warned of, and nothing more.

    Raises:
        UserError: if one was asked for and is not installed.
    """
    from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

    made: list[Any] = []
    if params.enable_tensorboard:
        if installed("tensorboard") or installed("tensorboardX"):
            directory = params.logging_dir or str(Path(params.output_dir) / "tensorboard")
            made.append(TensorBoardLogger(directory, name="", version=""))
        else:
            logger.warning("training.enable_tensorboard: tensorboard is not installed; %s", INSTALL)
    if params.enable_wandb:
        if not installed("wandb"):
            raise UserError(f"training.enable_wandb: wandb is not installed; {INSTALL}")
        project = os.environ.get("WANDB_PROJECT", "oumi")
        made.append(WandbLogger(name=params.run_name, project=project, save_dir=params.output_dir))
    if params.enable_mlflow:
        if not installed("mlflow"):
            raise UserError(f"training.enable_mlflow: mlflow is not installed; {INSTALL}")
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "oumi")
        uri = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")  # MLflow's own default
        made.append(MLFlowLogger(experiment, run_name=params.run_name, tracking_uri=uri, save_dir=params.output_dir))
    return made


def installed(module: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(module) is not None
