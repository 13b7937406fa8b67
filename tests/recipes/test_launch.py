"""The files to copy for torchrun, SLURM, SkyPilot and Ray."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.command_line import RECIPE
from tests.conftest import free_port
from tests.tiny import conversations, write_jsonl

LAUNCH = Path(__file__).parents[2] / "recipes/launch"
SKY_KEYS = {"name", "num_nodes", "resources", "envs", "file_mounts", "setup", "run", "workdir", "secrets", "config"}
"""Keys of a task, from SkyPilot's documentation."""


def prepared(folder: Path) -> Path:
    folder.mkdir()
    tree = RECIPE | {"trainer": {"max_steps": 2, "accelerator": "cpu"}, "checkpoint": {"every": 1}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    write_jsonl(folder / "rows.jsonl", conversations(16))
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    """That of a launcher that starts this environment's Python."""
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "OUMI_PL_CACHE": str(folder / "cache")} | more


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "runs").glob("*/checkpoints/step-*.ckpt"))
    return torch.load(newest, weights_only=True)["state_dict"]


def assert_trained_like_one_process(folder: Path, tmp_path: Path) -> None:
    one = prepared(tmp_path / "one")
    command = [sys.executable, "-m", "oumi_pl", "fit", "--config", "recipe.yaml", "--trainer.devices", "1"]
    command += ["--trainer.accumulate_grad_batches", "2"]
    subprocess.run(command, cwd=one, env=environment(one), check=True, capture_output=True)
    assert len(list((folder / "runs").iterdir())) == 1
    actual, expected = weights(folder), weights(one)
    assert all(torch.allclose(actual[name], expected[name], rtol=1e-5, atol=1e-6) for name in expected)


def program(folder: Path, name: str, text: str) -> None:
    """A stand-in for a program of the cluster."""
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("file", sorted(LAUNCH.iterdir()), ids=lambda file: file.name)
def test_a_file_is_a_page_in_its_language(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 50
    if file.suffix == ".sh":
        subprocess.run(["sh", "-n", str(file)], check=True)
    elif file.suffix == ".py":
        ast.parse(text)
    else:
        subprocess.run(["bash", "-n"], input=yaml.safe_load(text)["run"], text=True, check=True)


def test_the_task_of_skypilot_has_keys_that_it_knows():
    task = yaml.safe_load((LAUNCH / "skypilot.yml").read_text())
    assert set(task) <= SKY_KEYS
    assert task["file_mounts"]["/runs"]["mode"] == "MOUNT_CACHED"
    assert "--runs_dir /runs" in task["run"]


@pytest.mark.slow
def test_skypilot_reads_the_task():
    sky = pytest.importorskip("sky", reason="needs SkyPilot: pip install skypilot")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yml"))
    assert task.num_nodes == 1
    assert [storage.mode.name for storage in task.storage_mounts.values()] == ["MOUNT_CACHED"]


@pytest.mark.slow
def test_two_workers_of_ray_train_one_model(tmp_path):
    pytest.importorskip("ray.train", reason="needs Ray: pip install 'ray[train]'")
    folder = prepared(tmp_path / "two")
    command = [sys.executable, str(LAUNCH / "ray_train.py"), "2", "runs", "recipe.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "{'step': 2}" in done.stdout + done.stderr
    assert_trained_like_one_process(folder, tmp_path)


@pytest.mark.parametrize(
    ("code", "is_queued"), [(0, False), (2, False), (128 + signal.SIGUSR1, True), (128 + signal.SIGTERM, False)]
)
def test_a_slurm_job_is_queued_again_if_its_time_was_over(tmp_path, code, is_queued):
    program(tmp_path, "srun", f'echo "$@" > srun.txt; exit {code}')
    program(tmp_path, "scontrol", 'echo "$@" > scontrol.txt')
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "2"}
    command = ["sh", str(LAUNCH / "slurm.sh"), "sft/llama3.1_8b_fsdp2", "--name", "mine"]
    assert subprocess.run(command, cwd=tmp_path, env=environment(tmp_path, **slurm)).returncode == code
    started = "--wait=60 python -m oumi_pl fit --resume auto --config sft/llama3.1_8b_fsdp2 --name mine"
    assert (tmp_path / "srun.txt").read_text() == f"{started} --trainer.devices 8 --trainer.num_nodes 2\n"
    assert (tmp_path / "scontrol.txt").exists() == is_queued
    if is_queued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"


@pytest.mark.slow
def test_two_tasks_of_slurm_train_one_model(tmp_path):
    folder = prepared(tmp_path / "two")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "1"}
    slurm |= {"SLURM_JOB_NAME": "a", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    program(
        folder,
        "srun",
        'shift; SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & SLURM_PROCID=0 SLURM_LOCALID=0 "$@"; code=$?; wait; exit $code',
    )
    command = ["sh", str(LAUNCH / "slurm.sh"), "recipe.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment(folder, **slurm), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_trained_like_one_process(folder, tmp_path)


@pytest.mark.slow
def test_torchrun_starts_a_group_again_after_a_rank_died(tmp_path):
    """The second rank kills itself once, after the first checkpoint."""
    folder = prepared(tmp_path / "two")
    (folder / "dying.py").write_text(
        "import os, signal\nfrom pathlib import Path\nimport lightning as L\n\n\nclass Dying(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.global_step == 1 and trainer.global_rank == 1 and not Path('died').exists():\n"
        "            Path('died').touch()\n            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    tree["trainer"]["callbacks"] = [{"class_path": "dying.Dying"}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    command = ["sh", str(LAUNCH / "torchrun.sh"), "recipe.yaml"]
    extra = {"DEVICES": "2", "RESTARTS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment(folder, **extra), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "died").exists()
    assert "resuming" in done.stdout
    assert_trained_like_one_process(folder, tmp_path)
