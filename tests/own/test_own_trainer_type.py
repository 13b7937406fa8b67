"""A trainer type of one module file and one data file, outside the package: every command works on it.

`thumbs.py` and `thumbs_data.py` beside this file are all that there is of it.
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from oumi_pl.__main__ import main
from oumi_pl.runs.folders import saved_steps
from tests.tiny import LLAMA, conversations, write_jsonl

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ROWS = 24
KILL = """
import os, signal
from lightning.pytorch.callbacks import Callback

class Kill(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if str(trainer.fit_loop.epoch_loop.total_batch_idx) == os.environ.get("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
"""
RECIPE = {
    "seed_everything": 1,
    "model": {
        "class_path": "thumbs.Thumbs",
        "init_args": {
            "config": LLAMA,
            "beta": 0.5,
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 3.0e-3}},
        },
    },
    "data": {
        "class_path": "thumbs_data.ThumbsData",
        "init_args": {
            "train": "rows.jsonl",
            "validation": 0.25,
            "tokenizer": {"class_path": "ByteTokenizer"},
            "max_length": 256,
            "batch_size": 2,
        },
    },
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "accumulate_grad_batches": 2},
    "checkpoint": {"every": 3},
    "samples": {"max_new_tokens": 4},
}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A directory with the recipe and its rows; the two files are found as modules of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "kill.py").write_text(KILL)
    rng = random.Random(0)
    rows = [
        {"prompt": user["content"], "answer": answer["content"], "good": rng.random() < 0.5}
        for user, answer in (row["messages"] for row in conversations(ROWS))
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return tmp_path


def metrics(run):
    with (run / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_two_files_have_at_most_80_lines():
    assert sum(len((HERE / name).read_text().splitlines()) for name in ("thumbs.py", "thumbs_data.py")) <= 80


def test_it_learns_and_its_run_can_be_inspected(work, capsys):
    assert main(["preview", "--config", "r.yaml", "--plain"]) == 0
    assert "⟦" in capsys.readouterr().out
    assert main(["fit", "--config", "r.yaml", "--dry_run"]) == 0
    assert not (work / "runs").exists()
    assert main(["fit", "--config", "r.yaml"]) == 0
    rows = metrics(work / "runs" / "r")
    assert float(rows[-1]["train/loss"]) < 0.9 * float(rows[0]["train/loss"])
    assert float(rows[-1]["val/accuracy"]) >= 0.0
    capsys.readouterr()
    assert (
        main(["validate", "--config", "r.yaml", "--ckpt_path", str(saved_steps(work / "runs/r/checkpoints")[-1])]) == 0
    )
    assert "val/accuracy" in capsys.readouterr().out
    (work / "runs/r/report.html").unlink()
    assert main(["runs", "report", "r"]) == 0
    assert (work / "runs/r/report.html").stat().st_size > 10_000
    samples = [json.loads(line) for line in (work / "runs/r/samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} >= {0, len(rows)}


def test_the_exported_folder_loads_with_its_head(work):
    assert main(["fit", "--config", "r.yaml"]) == 0
    run = work / "runs" / "r"
    checkpoint = saved_steps(run / "checkpoints")[-1]
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert main(["export", "--checkpoint", str(checkpoint), "--output", "exported", "--trust"]) == 0
    for folder in (run / "model", work / "exported"):
        hf = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(hf.lm_head.weight, state["model.hf.lm_head.weight"])
        from thumbs import Thumbs

        again = Thumbs(model=str(folder))
        again.assemble(None)
        assert torch.equal(again.threshold.weight, state["threshold.weight"])
        assert torch.equal(again.threshold.bias, state["threshold.bias"])
        assert again.threshold.weight.any()


@pytest.mark.parametrize(
    "lora", [pytest.param(None, id="full"), pytest.param({"r": 4}, id="lora", marks=pytest.mark.slow)]
)
def test_a_killed_and_resumed_run_is_bit_identical(work, lora):
    recipe = json.loads(json.dumps(RECIPE))
    if lora is not None:
        recipe["model"]["init_args"]["lora"] = lora
    recipe["trainer"]["callbacks"] = [{"class_path": "kill.Kill"}]
    (work / "r.yaml").write_text(yaml.safe_dump(recipe))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}

    def fit(*args, **more):
        command = [sys.executable, "-m", "oumi_pl", "fit", "--config", "r.yaml", "--report", "false", *args]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=300)

    whole = fit("--name", "whole")
    assert whole.returncode == 0, whole.stderr
    killed = fit("--name", "killed", KILL_AT="15")  # between two checkpoints, in the middle of an update
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = fit("--resume", "runs/killed")
    assert resumed.returncode == 0, resumed.stderr
    expected, got = (
        torch.load(saved_steps(work / "runs" / name / "checkpoints")[-1], weights_only=True)["state_dict"]
        for name in ("whole", "killed")
    )
    assert "threshold.weight" in expected
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    columns = ("step", "train/loss", "train/accuracy", "val/loss")
    lines = [[[row[name] for name in columns] for row in metrics(work / "runs" / name)] for name in ("whole", "killed")]
    assert lines[0] == lines[1]
