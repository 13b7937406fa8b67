"""Sets up Lightning's loggers for TensorBoard, Weights & Biases and MLflow for a run folder.

They log in addition to `metrics.csv`, which is always written.

| name | writes to | view it with |
|---|---|---|
| `tensorboard` | `RUN/tensorboard` | `tensorboard --logdir runs` |
| `wandb` | `RUN/wandb`, and the server unless `WANDB_MODE=offline` | its page; `wandb sync` uploads an offline run |
| `mlflow` | `runs/mlflow`, or `MLFLOW_TRACKING_URI` | `mlflow ui --backend-store-uri sqlite:///runs/mlflow/mlflow.db` |

`WANDB_PROJECT` and `MLFLOW_EXPERIMENT_NAME` set the project of the runs, which is `oumi_pl` by default.
"""

import json
import logging
import os
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from oumi_pl.errors import UserError, nearest, reason

PACKAGES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
"""Name -> the packages that it needs."""
SERVER_TIMEOUT = 10.0
"""Seconds to wait for the first answer of a tracking server."""
PROJECT = "oumi_pl"
OFFLINE = "to do without its server, set WANDB_MODE=offline"
STEP = "trainer/global_step"
"""Lightning's name of the step in W&B."""


def names(given: str | Sequence[str] | None) -> list[str]:
    """The logger names in a list or a comma-separated text.

    Raises:
        UserError: a name is unknown; suggests the nearest.
    """
    listed = given.split(",") if isinstance(given, str) else list(given or ())
    unique = list(dict.fromkeys(str(name).strip() for name in listed))
    for name in unique:
        if name not in PACKAGES:
            raise UserError(f"logger: unknown logger {name!r}{nearest(name, PACKAGES)}")
    return unique


def missing(name: str) -> list[str]:
    """The packages that a logger needs and that are not installed."""
    return [package for package in PACKAGES[name] if find_spec(package) is None]


def refuse_unusable(named: Sequence[str]) -> None:
    """Refuses loggers that aren't installed, have no account logged in, or whose server can't be reached.

    Called first, so that a run does not fail after loading its model.

    Raises:
        UserError: with the remedy.
    """
    for name in named:
        if lacking := missing(name):
            raise UserError(
                f"logger: {name} needs {', '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not "
                "installed: pip install 'oumi_pl[tracking]'"
            )
    if "wandb" in named:
        _log_in()
    if "mlflow" in named:
        _reach_server(os.environ.get("MLFLOW_TRACKING_URI", ""))


def make(
    name: str,
    run: Path,
    step: int,
    earlier: Mapping[str, Any],
    *,
    folder: Path | None = None,
    run_name: str | None = None,
    project: str = PROJECT,
    store: str | None = None,
) -> tuple[Logger, str]:
    """Creates a logger for an existing run folder.

    Args:
        name: One of `PACKAGES`.
        run: The run folder.
        step: Current step. What a killed run logged of this step and later ones is discarded.
        earlier: Name of a logger -> its id of this run, if the run is resumed.
        folder: Folder for TensorBoard; by default `tensorboard` in the run folder.
        run_name: Name of the run in W&B and MLflow; by default that of the run folder.
        project: Project in W&B and MLflow, unless the environment sets it.
        store: URI of MLflow's store, unless the environment sets it; by default beside the run folder.

    Returns:
        The logger, and a line that says where to view it.

    Raises:
        UserError: the server can't be reached, or refuses.
    """
    if name == "tensorboard":
        return _tensorboard(run, folder or run / "tensorboard", step)
    begin = _wandb if name == "wandb" else partial(_mlflow, store=store)
    try:
        return begin(run, earlier.get(name), run_name or run.name, project)
    except Exception as error:  # of the network, the server, or any library in between
        offline = f"; {OFFLINE}" if name == "wandb" else ""
        raise UserError(f"logger: {name}: {reason(error).rstrip('.')}{offline}") from error


def own_id(logger: Logger) -> str | None:
    """The logger's id of this run, by which a resumed run finds it; None for TensorBoard, which goes by the folder."""
    return None if isinstance(logger, TensorBoardLogger) else str(logger.version)


def not_logged(logger: Logger, row: Mapping[str, float], step: int) -> dict[str, float]:
    """The metrics of a step that have not been logged yet: MLflow would keep and show duplicates."""
    if not isinstance(logger, MLFlowLogger):
        return dict(row)
    history = logger.experiment.get_metric_history
    return {name: value for name, value in row.items() if all(m.step != step for m in history(logger.run_id, name))}


def log_config(logger: Logger, config: dict[str, Any], resumed: bool) -> None:
    """Logs the settings of a config as hyper-parameters."""
    config = _set(config)
    if isinstance(logger, MLFlowLogger) and resumed:
        return  # MLflow does not allow changing parameters
    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(config, metrics={})  # with their results at the end, see `log_results`
    elif isinstance(logger, WandbLogger | MLFlowLogger):
        logger.log_hyperparams(config)


def log_results(logger: Logger, config: dict[str, Any], metrics: Mapping[str, float], step: int) -> None:
    """Logs the final metrics with the hyper-parameters, for TensorBoard's comparison of runs."""
    if isinstance(logger, TensorBoardLogger) and metrics:
        final = {f"final/{name}": value for name, value in metrics.items()}
        logger.log_hyperparams(_set(config), metrics=final, step=step)


def log_file(logger: Logger, file: Path, step: int) -> None:
    """Logs a file of the run folder as a picture, a page or text."""
    if isinstance(logger, TensorBoardLogger):
        _to_tensorboard(logger.experiment, file, step)
    elif isinstance(logger, WandbLogger):
        _to_wandb(logger, file)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(file))


def finish(logger: Logger, success: bool) -> None:
    """Ends the logger's run, so that a later run in this process starts a new one."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=0 if success else 1)
    else:
        if isinstance(logger, MLFlowLogger):
            import mlflow

            mlflow.flush_async_logging()
        logger.finalize("success" if success else "failed")


def _set(config: Any) -> Any:
    """A config without keys that are null."""
    if isinstance(config, dict):
        return {key: _set(value) for key, value in config.items() if value is not None}
    return config


def _tensorboard(run: Path, folder: Path, step: int) -> tuple[Logger, str]:
    # TensorBoard hides events after the checkpoint that a killed run resumes from
    purge: dict[str, Any] = {"purge_step": step} if step else {}
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False, **purge)
    return logger, f"{folder}; to look at all runs: tensorboard --logdir {run.parent}"


def _log_in() -> None:
    """Asks for an API key if there is none. Otherwise W&B would ask only when training begins."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        wandb.login()
    except wandb.Error as error:
        raise UserError(f"logger: wandb: {reason(error).rstrip('.')}; {OFFLINE}") from error


def _reach_server(uri: str) -> None:
    """Checks that a server answers. MLflow itself would retry for minutes when training is about to begin."""
    if not uri.startswith(("http://", "https://")):
        return
    unverified = ssl.create_default_context()  # MLflow verifies certificates itself, by its own settings
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    try:
        urllib.request.urlopen(uri, timeout=SERVER_TIMEOUT, context=unverified).close()
    except urllib.error.HTTPError:  # an error status is an answer too
        pass
    except OSError as error:
        why = reason(getattr(error, "reason", None) or error)
        raise UserError(f"logger: mlflow: {uri}, as MLFLOW_TRACKING_URI says, can't be reached: {why}") from error


def _wandb(run: Path, earlier: str | None, name: str, project: str) -> tuple[Logger, str]:
    import wandb

    begun = wandb.init(
        project=os.environ.get("WANDB_PROJECT", project),
        name=name,
        dir=run,
        id=earlier,
        resume="allow",
        settings=wandb.Settings(silent=True),
    )
    begun.define_metric(STEP)
    begun.define_metric("*", step_metric=STEP, step_sync=True)
    where = f"{run / 'wandb'}, offline; to upload it: wandb sync {Path(begun.dir).parent}"
    return WandbLogger(experiment=begun), where if begun.offline else str(begun.url)


def _mlflow(run: Path, earlier: str | None, name: str, project: str, *, store: str | None = None) -> tuple[Logger, str]:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    for library in ("alembic", "mlflow"):  # they log the creation of each table
        logging.getLogger(library).setLevel(logging.WARNING)
    own = run.parent.resolve() / "mlflow"
    server = os.environ.get("MLFLOW_TRACKING_URI") or store
    uri = server or f"sqlite:///{own / 'mlflow.db'}"
    if not server:
        own.mkdir(exist_ok=True)
    client = MlflowClient(uri)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", project)
    if client.get_experiment_by_name(experiment) is None:
        client.create_experiment(experiment, None if server else (own / "artifacts").as_uri())
    if earlier:
        try:
            client.update_run(earlier, status="RUNNING")
        except MlflowException:  # the store is another than before
            earlier = None
    # in the background, because a commit to the database or a server takes as long as a step of a small model
    logger = MLFlowLogger(experiment, run_name=name, tracking_uri=uri, run_id=earlier, synchronous=False)
    shown = run.parent / "mlflow"
    look = f"{shown}; to look at all runs: mlflow ui --backend-store-uri sqlite:///{shown / 'mlflow.db'}"
    return logger, server or look


def _to_tensorboard(writer: Any, file: Path, step: int) -> None:
    if file.suffix == ".png":
        import numpy as np
        from PIL import Image

        writer.add_image(file.stem, np.asarray(Image.open(file).convert("RGB")), step, dataformats="HWC")
    elif file.suffix in (".yaml", ".json"):  # TensorBoard can't show HTML
        text = file.read_text(encoding="utf-8")
        writer.add_text(file.name, "\n".join(f"    {line}" for line in text.splitlines()), step)


def _to_wandb(logger: WandbLogger, file: Path) -> None:
    import wandb

    experiment: Any = logger.experiment
    # in a folder of our own among the files of the run, where W&B writes a config.yaml as well
    place = Path(experiment.dir) / "oumi_pl" / file.name
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, place)
    experiment.save(str(place), base_path=experiment.dir, policy="now")
    if file.suffix == ".png":
        logger.log_image(file.stem, [str(file)])
    elif file.suffix == ".html":
        page: Any = wandb.Html(str(file), inject=False)
        logger.log_metrics({file.stem: page})
    elif file.name == "data.json":
        experiment.summary["data"] = json.loads(file.read_text(encoding="utf-8"))
