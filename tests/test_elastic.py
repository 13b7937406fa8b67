"""A run goes on under another number of processes and another strategy: every way in, and every way out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from oumi_pl.models.export import read_checkpoint
from oumi_pl.runs.folders import newest_checkpoint
from tests.command_line import RECIPE
from tests.conftest import free_port
from tests.test_sharded_checkpoints import run
from tests.tiny import conversations, distance, write_jsonl

STEPS, HALF, ROWS = 4, 2, 8
HSDP = '{"class_path": "Sharded", "init_args": {"replicas": 2}}'
TENSOR = '{"class_path": "Sharded", "init_args": {"tensor": 2}}'
LAYOUTS = {
    "one process": (1, "auto"),
    "ddp over two": (2, "ddp"),
    "two shards": (2, "fsdp2"),
    "four shards": (4, "fsdp2"),
    "two replicas of two shards": (4, HSDP),
    "two tensor ranks": (2, TENSOR),
    "two shards of two tensor ranks": (4, TENSOR),
}
"""Number of processes and strategy."""


def recipe(folder: Path) -> None:
    tree = yaml.safe_load(yaml.safe_dump(RECIPE))
    tree["model"]["init_args"]["optimizer"] = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": 1e-2, "weight_decay": 0.1},
    }
    tree["trainer"] = {"max_steps": STEPS, "accelerator": "cpu"}
    tree["checkpoint"] = {"every": HALF, "keep": 5}
    (folder / "r.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    write_jsonl(folder / "rows.jsonl", conversations(2 * ROWS))


def fit(layout: str, source: str | None = None) -> list[str]:
    """The command that trains from the start, or goes on from the middle of another layout's run."""
    processes, strategy = LAYOUTS[layout]
    name = layout if source is None else f"{source} to {layout}"
    command = ["fit", "--config", "r.yaml", f"--name={name}", f"--trainer.devices={processes}"]
    reading = processes // 2 if strategy == TENSOR else processes  # tensor ranks read the same rows
    command += [f"--trainer.strategy={strategy}", f"--trainer.accumulate_grad_batches={ROWS // 2 // reading}"]
    if source is None:
        return command
    return [*command, f"--ckpt_path=runs/{source}/checkpoints/step-{HALF:08d}.ckpt"]


def on_processes(folder: Path, processes: int, *, resume: bool) -> None:
    """Runs all layouts of this number of processes, which are started once."""
    worker = [sys.executable, __file__, str(folder), str(processes), str(int(resume))]
    environment = os.environ | {"MASTER_PORT": free_port()}
    ended = subprocess.run(worker, capture_output=True, text=True, timeout=900, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of each layout, and one of each layout that went on from each."""
    folder = tmp_path_factory.mktemp("elastic")
    recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUMI_PL_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        for resume in (False, True):
            for processes in (1, 2, 4):
                on_processes(folder, processes, resume=resume)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_a_run_goes_on_in_any_layout_and_exports_the_same_model(folder, source, target):
    whole, name = folder / "runs/one process", f"{source} to {target}"
    result = json.loads((folder / f"{name}.json").read_text())
    assert result["code"] == 0, result["err"][-2000:]
    checkpoint = newest_checkpoint(folder / "runs" / name)
    assert checkpoint is not None
    assert checkpoint.name == f"step-{STEPS:08d}.ckpt"
    expected = read_checkpoint(newest_checkpoint(whole))["state_dict"]
    assert distance(read_checkpoint(checkpoint)["state_dict"], expected) < 1e-5
    exported, of_whole = (load_file(run / "model/model.safetensors") for run in (folder / "runs" / name, whole))
    assert distance(exported, of_whole) < 1e-5


if __name__ == "__main__":  # on several processes: Lightning starts the others by running this file again
    os.chdir(sys.argv[1])
    torch.set_num_threads(1)
    sources = list(LAYOUTS) if int(sys.argv[3]) else [None]
    for layout, (processes, _) in LAYOUTS.items():
        for source in sources:
            if processes == int(sys.argv[2]):
                result = run(fit(layout, source))
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    Path(f"{layout if source is None else f'{source} to {layout}'}.json").write_text(json.dumps(result))
