"""`--logger`: one word adds a tracker, which gets the metrics of `metrics.csv`, config, data report and pictures."""

import csv
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image

from oumi_pl.callbacks.tracking import Tracking
from oumi_pl.errors import UserError
from oumi_pl.runs import loggers
from tests.command_line import RECIPE, CommandLine
from tests.tiny import conversations, write_jsonl

ROOT = Path(__file__).parents[2]
WHOLE = {"val_every": 1, "data.init_args.validation": "rows.jsonl", "report": True}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


def in_csv(run):
    """Metric and step -> value."""
    with (Path(run) / "metrics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {(k, int(row["step"])): float(v) for row in rows for k, v in row.items() if v and k != "step"}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, []),
        ("wandb", ["wandb"]),
        ("tensorboard, wandb", ["tensorboard", "wandb"]),
        (["mlflow", "tensorboard", "mlflow"], ["mlflow", "tensorboard"]),
    ],
)
def test_names(given, found):
    assert loggers.names(given) == found


class StandIn(DummyLogger):
    """Keeps what it is told, as the name that it was made by."""

    def __init__(self, name):
        super().__init__()
        self.called, self.metrics, self.files, self.config, self.ended = name, {}, [], None, None

    def log_metrics(self, metrics, step=None):
        self.metrics |= {(name, step): value for name, value in metrics.items()}


@pytest.fixture
def stand_ins(monkeypatch):
    """Loggers of no library in the places of all three, by name."""
    built = {}

    def make(name, run, step, earlier):
        assert (run / "run.json").is_file(), "before the run folder is there, nothing may be written"
        built[name] = StandIn(name)
        built[name].place = (run, step, dict(earlier))
        return built[name], "nowhere"

    def log_file(logger, file, step):
        logger.files.append((file.name, step))

    monkeypatch.setattr(loggers, "PACKAGES", dict.fromkeys(loggers.PACKAGES, ()))
    monkeypatch.setattr(loggers, "_log_in", lambda: None)
    monkeypatch.setattr(loggers, "make", make)
    monkeypatch.setattr(loggers, "own_id", lambda logger: f"{getattr(logger, 'called', 'csv')}-1")
    for name, kept in {"log_file": log_file, "log_config": "config", "finish": "ended"}.items():
        keep = kept if callable(kept) else lambda logger, value, *_, kept=kept, **__: setattr(logger, kept, value)
        only = lambda logger, *args, keep=keep, **kwargs: (  # noqa: E731
            keep(logger, *args, **kwargs) if isinstance(logger, StandIn) else None
        )
        monkeypatch.setattr(loggers, name, only)
    return built


@pytest.mark.parametrize(
    ("recipe", "options", "names"),
    [
        ({}, ["--logger", "tensorboard,mlflow", "--engine", "hf"], ["tensorboard", "mlflow"]),
        ({"logger": ["mlflow", "wandb"]}, [], ["mlflow", "wandb"]),
    ],
)
def test_a_word_adds_a_logger_that_gets_everything(command, stand_ins, recipe, options, names):
    command.recipe(WHOLE | recipe)
    command.works("fit", "--config", "r.yaml", *options)
    assert list(stand_ins) == names
    expected = in_csv("runs/r")
    assert len({name for name, _ in expected}) > 10
    for name, logger in stand_ins.items():
        assert logger.place == (Path("runs/r"), 0, {})
        assert logger.metrics == pytest.approx(expected, rel=1e-6)
        assert logger.config["data"]["init_args"]["train"] == "rows.jsonl"
        start, end = ("config.yaml", "recipe.yaml", "data.json"), ("curves.png", "report.html")
        assert logger.files == [*((file, 0) for file in start), *((file, 2) for file in end)]
        assert logger.ended is True
        assert command.state("runs/r")["loggers"][name] == f"{name}-1"


def test_a_resumed_run_goes_on_where_it_was(command, stand_ins):
    command.works("fit", "--config", "r.yaml", "--logger", "wandb", "--checkpoint.every", "1")
    first = dict(stand_ins["wandb"].metrics)
    command.works("fit", "--resume", "runs/r", "--trainer.max_steps", "3")
    assert stand_ins["wandb"].place == (Path("runs/r"), 2, {"wandb": "wandb-1"})
    output = stand_ins["wandb"].metrics
    assert {step for _, step in output} == {
        2,
        3,
    }  # that of the checkpoint again, for a run may stop before it is logged
    assert output[("train/loss", 2)] == first[("train/loss", 2)]


def test_what_fails_is_reported(command, stand_ins):
    command.recipe({"trainer.callbacks": [{"class_path": "failing.Fails"}]})
    command.write(
        "failing.py",
        "import lightning as L\nclass Fails(L.Callback):\n"
        "    def on_train_batch_end(self, *_):\n        raise RuntimeError('no')\n",
    )
    code, _, _ = command.run("fit", "--config", "r.yaml", "--logger", "mlflow")
    assert code == 1
    assert stand_ins["mlflow"].ended is False


@pytest.mark.parametrize("name", loggers.PACKAGES)
def test_a_missing_package_is_reported_before_anything_is_written(command, monkeypatch, name):
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    message = command.fails("fit", "--config", "r.yaml", "--logger", name)
    assert message.startswith(f"error: logger: {name} needs {name}")
    assert "pip install 'oumi_pl[tracking]'" in message


def test_an_unknown_logger_is_refused(command):
    message = command.fails("fit", "--config", "r.yaml", "--logger", "tensorboard,wandbb")
    assert message == "error: logger: unknown logger 'wandbb'; did you mean 'wandb'?"


def test_a_command_that_does_not_train_needs_none(command, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    command.recipe(WHOLE | {"logger": "wandb"})
    assert "would run on untrained weights" in command.fails("validate", "--config", "r.yaml")


def test_only_the_first_rank_logs(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    tracking = Tracking(["tensorboard"])
    tracking.on_train_start(None, None)  # would fail on what it is given
    tracking.on_fit_end(None, None)
    assert tracking.added == []


def scalars(folder):
    """All events as TensorBoard shows them, and the reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)], events


def test_tensorboard_shows_the_run(command):
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install 'oumi_pl[tracking]'")
    command.recipe(WHOLE | {"logger": "tensorboard"})
    command.works("fit", "--config", "r.yaml")
    run = command.directory / "runs" / "r"
    actual, events = scalars(run / "tensorboard")
    expected = in_csv(run)
    shown = {(tag, step): value for tag, step, value in actual if not tag.startswith("final/")}
    assert shown == pytest.approx(expected, rel=1e-6)
    assert len(actual) == len(expected) + 4  # the last of train/loss, val/loss, val/nll, val/mean_token_accuracy
    assert ("final/val/loss", 2, pytest.approx(expected["val/loss", 2])) in actual
    for file in ("config.yaml", "data.json", "recipe.yaml"):
        (text,) = events.Tensors(f"{file}/text_summary")
        written = text.tensor_proto.string_val[0].decode().splitlines()
        assert [line.removeprefix("    ") for line in written] == (run / file).read_text().splitlines()
    (picture,) = events.Images("curves")
    assert (picture.width, picture.height) == Image.open(run / "curves.png").size
    assert "data" in yaml.safe_load((run / "tensorboard" / "hparams.yaml").read_text())


def test_tensorboard_shows_nothing_twice_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install 'oumi_pl[tracking]'")
    killed, _ = loggers.make("tensorboard", tmp_path / "run", 0, {})
    for step in range(1, 6):
        killed.log_metrics({"loss": 100.0 + step}, step)
        killed.save()
    resumed, _ = loggers.make("tensorboard", tmp_path / "run", 3, {})
    for step in range(3, 7):
        resumed.log_metrics({"loss": 200.0 + step}, step)
    loggers.finish(resumed, True)
    actual, _ = scalars(tmp_path / "run" / "tensorboard")
    assert actual == [("loss", step, (100.0 if step < 3 else 200.0) + step) for step in range(1, 7)]


def test_a_picture_keeps_its_colours(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install 'oumi_pl[tracking]'")
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "curves.png")
    logger, _ = loggers.make("tensorboard", tmp_path, 0, {})
    loggers.log_file(logger, tmp_path / "curves.png", 7)
    loggers.finish(logger, True)
    _, events = scalars(tmp_path / "tensorboard")
    (shown,) = events.Images("curves")
    (tmp_path / "shown.png").write_bytes(shown.encoded_image_string)
    assert shown.step == 7
    assert np.array_equal(np.asarray(Image.open(tmp_path / "shown.png")), pixels)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_without_a_key_is_refused_at_once_unless_it_is_offline(monkeypatch, mode):
    def login():
        raise ValueError("No API key configured. Use `wandb login` to log in.")

    settings = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    library = SimpleNamespace(setup=lambda: settings, login=login, Error=ValueError)
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.setattr(loggers, "PACKAGES", dict.fromkeys(loggers.PACKAGES, ()))
    if mode == "offline":
        loggers.refuse_unusable(["wandb"])
        return
    with pytest.raises(UserError, match=r"logger: wandb: No API key configured.*WANDB_MODE=offline"):
        loggers.refuse_unusable(["wandb"])


def test_a_server_that_is_away_is_reported_at_once(command, monkeypatch):
    monkeypatch.setattr(loggers, "PACKAGES", dict.fromkeys(loggers.PACKAGES, ()))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        message = command.fails("fit", "--config", "r.yaml", "--logger", "mlflow")
    assert message.startswith(f"error: logger: mlflow: {uri}, as MLFLOW_TRACKING_URI says, can't be reached: ")


def records(file):
    """The records of a `.wandb` file: blocks of 32 KiB, records in parts (LevelDB's log format)."""
    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield part
            part = b""


def wandb_offline(run):
    """What the offline runs of W&B hold: metrics by name and step, ids, files, config and exit codes."""
    from wandb.proto import wandb_internal_pb2

    metrics, ids, files, config, codes = {}, set(), set(), {}, []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            match record.WhichOneof("record_type"):
                case "history":
                    row = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
                    step = int(row.get("trainer/global_step", -1))
                    metrics |= {(k, step): json.loads(v) for k, v in row.items()}
                case "run":
                    ids.add(record.run.run_id)
                    config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
                case "config":
                    config |= {i.key: json.loads(i.value_json) for i in record.config.update}
                case "files":
                    files |= {one.path for one in record.files.files}
                case "exit":
                    codes.append(record.exit.exit_code)
    return metrics, ids, files, config, codes


@pytest.mark.slow
def test_wandb_and_mlflow_offline_hold_a_run_that_was_stopped_and_resumed(tmp_path):
    pytest.importorskip("wandb", reason="needs W&B: pip install 'oumi_pl[tracking]'")
    pytest.importorskip("mlflow", reason="needs MLflow: pip install 'oumi_pl[tracking]'")
    pytest.importorskip("sqlalchemy", reason="needs SQLAlchemy: pip install 'oumi_pl[tracking]'")
    from mlflow.tracking import MlflowClient

    write_jsonl(tmp_path / "rows.jsonl", conversations(16))
    changed = {"logger": ["wandb", "mlflow"], "report": True, "trainer": {"max_steps": 5000, "accelerator": "cpu"}}
    recipe = RECIPE | changed
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    fit = [sys.executable, "-m", "oumi_pl", "fit"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "MLFLOW"))}
    environment |= {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "OUMI_PL_CACHE": str(tmp_path / "cache")}
    run = tmp_path / "runs" / "r"
    stopped = subprocess.Popen([*fit, "--config", "r.yaml"], cwd=tmp_path, env=environment)
    while not in_steps(run) and stopped.poll() is None:
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 128 + signal.SIGTERM
    until = str(json.loads((run / "run.json").read_text())["step"] + 5)
    resumed = [*fit, "--resume", str(run), "--trainer.max_steps", until]
    subprocess.run(resumed, cwd=tmp_path, env=environment, check=True)

    expected, known = in_csv(run), json.loads((run / "run.json").read_text())["loggers"]
    metrics, ids, files, config, codes = wandb_offline(run)
    assert {key: metrics.get(key) for key in expected} == pytest.approx(expected)
    assert ids == {known["wandb"]}
    assert codes == [1, 0]
    assert {f"oumi_pl/{name}" for name in ("config.yaml", "recipe.yaml", "data.json", "report.html")} <= files
    assert {Path(name).name.partition("_")[0] for name in files if name.startswith("media/")} == {"curves", "report"}
    assert config["model"]["init_args"]["config"]["hidden_size"] == 32

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow' / 'mlflow.db'}")
    kept = client.get_run(known["mlflow"])
    logged = [(k, m) for k in kept.data.metrics for m in client.get_metric_history(known["mlflow"], k)]
    points = {(k, m.step): m.value for k, m in logged}
    assert points == pytest.approx(expected)
    assert len(logged) == len(points)
    assert (kept.info.status, kept.info.run_name) == ("FINISHED", "r")
    assert kept.data.params["model/init_args/config/hidden_size"] == "32"
    artifacts = {one.path for one in client.list_artifacts(known["mlflow"])}
    assert artifacts == {"config.yaml", "recipe.yaml", "data.json", "curves.png", "report.html"}
    assert len(client.search_runs(["1"])) == 1
    assert not (tmp_path / "mlruns").exists()
    assert not (tmp_path / "wandb").exists()


def in_steps(run):
    return (run / "metrics.csv").is_file() and len(in_csv(run)) > 20
