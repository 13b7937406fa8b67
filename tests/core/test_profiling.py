"""`training.profiler`: the files of PyTorch's profiler, where Oumi puts them."""

import gzip
import json

import yaml

from oumi_pl.core.configs import TrainingConfig, TrainingParams
from oumi_pl.core.trainers import Trainer
from oumi_pl.train import train
from tests.core.oumi import tiny_model
from tests.core.test_train import CONFIG
from tests.core.test_trainer import Points, Regression
from tests.tiny import conversations, write_jsonl


def test_tables_and_trace_of_the_updates_that_the_schedule_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "tiny")
    write_jsonl(tmp_path / "rows.jsonl", conversations(16))
    schedule = {"enable_schedule": True, "skip_first": 1, "wait": 0, "warmup": 1, "active": 1}
    profiler = {"enable_cpu_profiling": True, "profile_memory": True, "row_limit": 5, "schedule": schedule}
    tree = CONFIG | {"training": CONFIG["training"] | {"profiler": profiler, "save_steps": 0}}
    (tmp_path / "oumi.yaml").write_text(yaml.safe_dump(tree))
    train(TrainingConfig.from_yaml(tmp_path / "oumi.yaml"))
    names = {path.name for path in (tmp_path / "out/run/profiler").iterdir()}
    tables = ("cpu_time_total", "self_cpu_time_total", "cpu_memory_usage", "self_cpu_memory_usage")
    assert names == {f"prof_000_local_00_{name}.txt" for name in tables} | {"prof_000_local_00_pt_trace.json.gz"}
    with gzip.open(tmp_path / "out/run/profiler/prof_000_local_00_pt_trace.json.gz") as file:
        trace = json.load(file)
    steps = {event["name"] for event in trace["traceEvents"] if str(event.get("name")).startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#2"}


def test_oumis_own_trainer_records_the_whole_run(tmp_path):
    args = TrainingParams(output_dir=str(tmp_path), max_steps=2, enable_tensorboard=False, save_final_model=False)
    args.profiler.enable_cpu_profiling = True
    Trainer(Regression(), args=args, train_dataset=Points()).train()
    names = {path.name for path in (tmp_path / "profiler").iterdir()}
    files = ("cpu_time_total.txt", "self_cpu_time_total.txt", "pt_trace.json.gz")
    assert names == {f"prof_000_local_00_{name}" for name in files}
