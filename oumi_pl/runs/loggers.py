"""TensorBoard, Weights & Biases and MLflow, by name: Lightning's loggers, set up for a run folder.

`metrics.csv` is always written; these are beside it. What a run leaves of them:

| name | where | to look at it |
|---|---|---|
| `tensorboard` | `RUN/tensorboard` | `tensorboard --logdir runs` |
| `wandb` | `RUN/wandb`, and the server unless `WANDB_MODE=offline` | its page; `wandb sync` uploads an offline run |
| `mlflow` | `runs/mlflow`, or `MLFLOW_TRACKING_URI` | `mlflow ui --backend-store-uri sqlite:///runs/mlflow/mlflow.db` |

`WANDB_PROJECT` and `MLFLOW_EXPERIMENT_NAME` name what the runs are put under, `oumi_pl` when left out.
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
from oumi_pl.models.hub import TIMEOUT

PACKAGES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
"""Name -> what has to be installed for it."""
PROJECT = "oumi_pl"
OFFLINE = "to do without its server, set WANDB_MODE=offline"
STEP = "trainer/global_step"
"""What Lightning's logger calls the step."""


def names(given: str | Sequence[str] | None) -> list[str]:
    """The names in a list, or in a text with commas between them.

    Raises:
        UserError: one is unknown; offers the nearest.
    """
    listed = given.split(",") if isinstance(given, str) else list(given or ())
    found = list(dict.fromkeys(str(name).strip() for name in listed))
    for name in found:
        if name not in PACKAGES:
            raise UserError(f"logger: there is no {name!r}{nearest(name, PACKAGES)}")
    return found


def missing(name: str) -> list[str]:
    """What has to be installed for a logger, and is not."""
    return [package for package in PACKAGES[name] if find_spec(package) is None]


def refuse_unusable(named: Sequence[str]) -> None:
    """Refuses a logger that isn't installed, that nobody is logged in to, or whose server is away, before all else.

    Raises:
        UserError: with what to do about it.
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
    """A logger for a run folder that is there.

    Args:
        name: One of `PACKAGES`.
        run: The run folder.
        step: Where the run stands: what was logged of it and of later ones, before it was killed, no longer counts.
        earlier: Name -> what the logger called this run when it began, where it was resumed.
        folder: Of TensorBoard; `tensorboard` in the run folder when left out.
        run_name: What W&B and MLflow call the run; the run folder's name when left out.
        project: What they put it under unless the environment says so.
        store: URI of MLflow's store unless the environment says so; beside the run folder when left out.

    Returns:
        The logger, and where to look at what it gets.

    Raises:
        UserError: the server can't be reached, or refuses.
    """
    if name == "tensorboard":
        return _tensorboard(run, folder or run / "tensorboard", step)
    begin = _wandb if name == "wandb" else partial(_mlflow, store=store)
    try:
        return begin(run, earlier.get(name), run_name or run.name, project)
    except Exception as error:  # of the network, of the server, of whichever library lies between
        offline = f"; {OFFLINE}" if name == "wandb" else ""
        raise UserError(f"logger: {name}: {reason(error).rstrip('.')}{offline}") from error


def own_id(logger: Logger) -> str | None:
    """What the logger calls this run, to be found again by; None where a folder says it all."""
    return None if isinstance(logger, TensorBoardLogger) else str(logger.version)


def not_logged(logger: Logger, row: Mapping[str, float], step: int) -> dict[str, float]:
    """Metrics of a step that a resumed run has not logged yet: MLflow would keep and show duplicates."""
    if not isinstance(logger, MLFlowLogger):
        return dict(row)
    history = logger.experiment.get_metric_history
    return {name: value for name, value in row.items() if all(m.step != step for m in history(logger.run_id, name))}


def log_config(logger: Logger, config: dict[str, Any], resumed: bool) -> None:
    """Logs what a config sets as hyper-parameters, to compare runs by."""
    config = _set(config)
    if isinstance(logger, MLFlowLogger) and resumed:
        return  # MLflow's parameters are never changed
    if isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(config, metrics={})  # with their results at the end, see `log_results`
    elif isinstance(logger, WandbLogger | MLFlowLogger):
        logger.log_hyperparams(config)


def log_results(logger: Logger, config: dict[str, Any], metrics: Mapping[str, float], step: int) -> None:
    """Logs the last metrics beside the hyper-parameters, where TensorBoard compares runs."""
    if isinstance(logger, TensorBoardLogger) and metrics:
        final = {f"final/{name}": value for name, value in metrics.items()}
        logger.log_hyperparams(_set(config), metrics=final, step=step)


def log_file(logger: Logger, file: Path, step: int) -> None:
    """Logs a file of the run folder, as what it is: a picture, a page, or text."""
    if isinstance(logger, TensorBoardLogger):
        _to_tensorboard(logger.experiment, file, step)
    elif isinstance(logger, WandbLogger):
        _to_wandb(logger, file)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(file))


def finish(logger: Logger, success: bool) -> None:
    """Ends a run of a logger, so that the next one in this process is another."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=0 if success else 1)
    else:
        if isinstance(logger, MLFlowLogger):
            import mlflow

            mlflow.flush_async_logging()
        logger.finalize("success" if success else "failed")


def _set(config: Any) -> Any:
    """A config without what is left out of it."""
    if isinstance(config, dict):
        return {key: _set(value) for key, value in config.items() if value is not None}
    return config


def _tensorboard(run: Path, folder: Path, step: int) -> tuple[Logger, str]:
    # events from a checkpoint on, of a run that was killed after it, are not shown
    purge: dict[str, Any] = {"purge_step": step} if step else {}
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False, **purge)
    return logger, f"{folder}; to look at all runs: tensorboard --logdir {run.parent}"


def _log_in() -> None:
    """Asks for a key while nothing is done yet, where none is known: W&B would ask when training begins."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        wandb.login()
    except wandb.Error as error:
        raise UserError(f"logger: wandb: {reason(error).rstrip('.')}; {OFFLINE}") from error


def _reach_server(uri: str) -> None:
    """Asks a server for any answer: left alone, MLflow tries for minutes, when training is about to begin."""
    if not uri.startswith(("http://", "https://")):
        return
    unverified = ssl.create_default_context()  # whom to trust, and with which key, is MLflow's own affair
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    try:
        urllib.request.urlopen(uri, timeout=TIMEOUT, context=unverified).close()
    except urllib.error.HTTPError:  # an answer
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

    for library in ("alembic", "mlflow"):  # the tables of a new database
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
        except MlflowException:  # another store than before
            earlier = None
    # in the background: a commit to the database, or the way to a server, takes as long as a small model's step
    logger = MLFlowLogger(experiment, run_name=name, tracking_uri=uri, run_id=earlier, synchronous=False)
    shown = run.parent / "mlflow"
    look = f"{shown}; to look at all runs: mlflow ui --backend-store-uri sqlite:///{shown / 'mlflow.db'}"
    return logger, server or look


def _to_tensorboard(writer: Any, file: Path, step: int) -> None:
    if file.suffix == ".png":
        import numpy as np
        from PIL import Image

        writer.add_image(file.stem, np.asarray(Image.open(file).convert("RGB")), step, dataformats="HWC")
    elif file.suffix in (".yaml", ".json"):  # a page has no place there
        text = file.read_text(encoding="utf-8")
        writer.add_text(file.name, "\n".join(f"    {line}" for line in text.splitlines()), step)


def _to_wandb(logger: WandbLogger, file: Path) -> None:
    import wandb

    experiment: Any = logger.experiment
    # among the run's files; W&B keeps hyper-parameters in a config.yaml of its own there
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
