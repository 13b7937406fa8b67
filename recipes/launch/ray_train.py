"""Trains a recipe on a Ray cluster: python ray_train.py WORKERS RUNS_DIR RECIPE [further options of `fit`]

Each worker runs the command line in a process of its own. If one fails, Ray starts all of them again, and `--resume
auto` continues from the newest checkpoint in RUNS_DIR, which all nodes have to see and no other run may use.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import ray.train.collective
import ray.train.torch


def train(options: dict) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = ray.train.collective.broadcast_from_rank_zero(free.getsockname()[1])
    local = ray.train.get_context().get_local_world_size()
    ranks = {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(local), "TORCHELASTIC_RUN_ID": "ray"}
    command = [sys.executable, "-m", "oumi_pl", "fit", "--resume", "auto", "--runs_dir", options["runs"]]
    command += ["--trainer.devices", "auto", "--config", *options["recipe"]]
    process = subprocess.Popen(command, env=os.environ | ranks, cwd=options["folder"])
    step, is_running = 0, True
    try:
        while is_running and not process.poll():  # a worker whose process failed fails, and Ray ends the others
            time.sleep(5)
            last, steps = step, [int(p.stem[5:]) for p in Path(options["runs"]).glob("*/checkpoints/step-*.ckpt")]
            now = (max(steps, default=0), process.poll() is None)
            step, is_running = ray.train.collective.broadcast_from_rank_zero(now)
            if step > last:
                ray.train.report({"step": step})  # by all workers together
        if code := process.wait():
            raise RuntimeError(f"oumi_pl ended with exit code {code}; see its output above")
    finally:
        process.kill()


if __name__ == "__main__":
    ray.init()
    scale = ray.train.ScalingConfig(num_workers=int(sys.argv[1]), use_gpu="GPU" in ray.cluster_resources())
    config = {"folder": str(Path.cwd()), "runs": str(Path(sys.argv[2]).resolve()), "recipe": sys.argv[3:]}
    retries = ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=3))
    ray.train.torch.TorchTrainer(train, train_loop_config=config, scaling_config=scale, run_config=retries).fit()
