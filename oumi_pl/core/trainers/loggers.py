"""The trackers that training parameters switch on."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oumi_pl.errors import UserError
from oumi_pl.runs.loggers import make, missing

if TYPE_CHECKING:
    from oumi_pl.core.configs import TrainingParams

logger = logging.getLogger("oumi_pl")


def trackers(params: "TrainingParams") -> list[str]:
    """Names of the trackers that are switched on.

    TensorBoard is on unless it is switched off, so that it may be absent: that is warned of, and nothing more.

    Raises:
        UserError: if one was asked for and is not installed.
    """
    switches = {"tensorboard": params.enable_tensorboard, "wandb": params.enable_wandb, "mlflow": params.enable_mlflow}
    names = []
    for name in [name for name, on in switches.items() if on]:
        if not missing(name):
            names.append(name)
            continue
        message = f"training.enable_{name}: {name} is not installed; install it with: pip install 'oumi_pl[tracking]'"
        if name != "tensorboard":
            raise UserError(message)
        logger.warning("%s", message)
    return names


def loggers(params: "TrainingParams") -> list[Any]:
    """Lightning's loggers for the trackers that are switched on, under the names of Oumi and of MLflow's own store.

    Raises:
        UserError: if one was asked for and can't be used.
    """
    folder = None if params.logging_dir is None else Path(params.logging_dir)
    oumi: dict[str, Any] = {"project": "oumi", "store": "sqlite:///mlflow.db", "run_name": params.run_name}
    return [make(name, Path(params.output_dir), 0, {}, folder=folder, **oumi)[0] for name in trackers(params)]
