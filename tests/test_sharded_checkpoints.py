"""Checkpoints of FSDP2: into it, out of it, as a folder of shards and as one file, with the best one and with LoRA."""

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import yaml

from oumi_pl.__main__ import main
from tests.command_line import RECIPE
from tests.tiny import conversations, write_jsonl

STEPS, HALF = 4, 2
MAMBA = {"model_type": "mamba", "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 300}


def recipe(folder: Path) -> None:
    tree = yaml.safe_load(yaml.safe_dump(RECIPE))
    # the full name, because PEFT imports other classes of this name
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "weight_decay": 0.1}}
    tree["model"]["init_args"]["optimizer"] = adamw
    tree["data"]["init_args"]["validation"] = "val.jsonl"
    tree["trainer"] = {"max_steps": STEPS, "accelerator": "cpu", "accumulate_grad_batches": 2}
    tree["checkpoint"] = {"every": HALF, "keep": 5, "monitor": "val/loss"}
    (folder / "r.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    write_jsonl(folder / "rows.jsonl", conversations(16))
    write_jsonl(folder / "val.jsonl", conversations(4, seed=9))


def step_file(folder: Path, name: str, step: int = HALF) -> Path:
    return folder / f"runs/{name}/checkpoints/step-{step:08d}.ckpt"


FSDP2 = {
    "class_path": "ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
}


def sharded(one_file: bool = False) -> list[str]:
    strategy = yaml.safe_load(yaml.safe_dump(FSDP2))
    strategy["init_args"]["save_distributed_checkpoint"] = not one_file
    accumulate = ["--trainer.accumulate_grad_batches=1", "--trainer.devices=2"]  # the same rows per update
    return [*accumulate, f"--trainer.strategy={json.dumps(strategy)}"]


DDP = ["--trainer.accumulate_grad_batches=1", "--trainer.devices=2", "--trainer.strategy=ddp"]


def fit(name: str, *args: str, ckpt: Path | None = None) -> list[str]:
    command = ["fit", "--config", "r.yaml", f"--name={name}", *args]
    return command if ckpt is None else [*command, f"--ckpt_path={ckpt}"]


def commands(folder: Path) -> dict[str, list[str]]:
    """What runs on two processes, in order, by name."""
    one = step_file(folder, "one")
    mamba = [f"--model.config={json.dumps(MAMBA)}", "--trainer.max_steps=1"]
    lora = ["--model.lora={r: 2}", "--trainer.precision=bf16-true", "--trainer.max_steps=2"]
    return {
        "one process to shards": fit("shards", *sharded(), ckpt=one),
        "one process to one file": fit("file", *sharded(one_file=True), ckpt=one),
        "shards from the start": fit("start", *sharded()),
        "shards to one file": fit("to-file", *sharded(one_file=True), ckpt=step_file(folder, "start")),
        "one file to shards": fit("to-shards", *sharded(), ckpt=step_file(folder, "file-start")),
        "ddp from shards": fit("ddp", *DDP, ckpt=step_file(folder, "start")),
        "ddp validates shards": ["validate", "--config", "r.yaml", *DDP, f"--ckpt_path={step_file(folder, 'start')}"],
        "fit from the best shards": fit("best", *sharded(), ckpt=folder / "runs/start/checkpoints/best.ckpt"),
        "fit from the best file": fit("best", *sharded(), ckpt=folder / "runs/file-start/checkpoints/best.ckpt"),
        "lora in bfloat16": fit("lora", *lora, *sharded()),
        "lora in bfloat16, one file": fit("lora-file", *lora, *sharded(one_file=True)),
        "nested blocks": fit("mamba", *mamba, *sharded()),
    }


def run(command: list[str]) -> dict:
    """Runs a command line in this process; how it ended and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = main(command)
        except BaseException:
            code = traceback.format_exc()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":  # on two processes: Lightning starts the second by running this file again
    os.chdir(sys.argv[1])
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        for number, (case, command) in enumerate(commands(Path(sys.argv[1])).items()):
            if case == "one file to shards":
                run(fit("file-start", *sharded(one_file=True)))
            result = run(command)
            rank = os.environ.get("LOCAL_RANK", "0")
            Path(sys.argv[1], f"result-{number}-{rank}.json").write_text(json.dumps({"case": case} | result))
            print(case, rank, result["code"], flush=True)
