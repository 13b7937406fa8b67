"""Checkpoints of FSDP2: into it, out of it, as a folder of shards and as one file, with the best one and with LoRA."""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file

from oumi_pl.__main__ import main
from oumi_pl.errors import UserError
from oumi_pl.models.export import read_checkpoint
from oumi_pl.models.lm import LM
from oumi_pl.models.sharding import decoder_layers
from oumi_pl.runs.folders import newest_checkpoint
from tests.command_line import RECIPE
from tests.conftest import free_port
from tests.models.test_lora import pretrained
from tests.models.test_sharding import WIDE, multiply_exactly
from tests.tiny import conversations, data, distance, module, trainer, write_jsonl

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


OFFLOADED = [
    *("--trainer.accumulate_grad_batches=1", "--trainer.devices=2", "--trainer.strategy=Sharded"),
    *("--trainer.strategy.offload=true", "--trainer.gradient_clip_val=1.0e6"),
]
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
        "one file from the start": fit("file-start", *sharded(one_file=True)),
        "one file to shards": fit("to-shards", *sharded(), ckpt=step_file(folder, "file-start")),
        "ddp from shards": fit("ddp", *DDP, ckpt=step_file(folder, "start")),
        "ddp validates shards": ["validate", "--config", "r.yaml", *DDP, f"--ckpt_path={step_file(folder, 'start')}"],
        "fit from the best shards": fit("best", *sharded(), ckpt=folder / "runs/start/checkpoints/best.ckpt"),
        "fit from the best file": fit("best", *sharded(), ckpt=folder / "runs/file-start/checkpoints/best.ckpt"),
        "lora in bfloat16": fit("lora", *lora, *sharded()),
        "lora in bfloat16, one file": fit("lora-file", *lora, *sharded(one_file=True)),
        "nested blocks": fit("mamba", *mamba, *sharded()),
    }


PRETRAINED_LORA = ["--model.model=base", "--model.config=null", "--model.lora={r: 2, init_lora_weights: gaussian}"]
FREEZE = ["--model.freeze=[model.layers.0, model.embed_tokens]"]


def frozen_commands(folder: Path) -> dict[str, list[str]]:
    """What runs on two processes with other frozen weights than the run whose checkpoint it goes on from."""
    commands = {}
    for kind, one_file in (("shards", False), ("file", True)):
        on_two = sharded(one_file)
        for name, settings in (("full", []), ("lora", PRETRAINED_LORA)):
            case = f"{name} {kind}"
            for start, end in (([], FREEZE), (FREEZE, [])):
                then = "thawed" if start else "frozen"
                source = f"{name}-{kind}-{then}-start"
                commands[f"{case}, before {then}"] = fit(source, *settings, *start, *on_two)
                ckpt = step_file(folder, source)
                commands[f"{case}, {then}"] = fit(f"{name}-{kind}-{then}", *settings, *end, *on_two, ckpt=ckpt)
        best = folder / f"runs/full-{kind}-frozen/checkpoints/best.ckpt"
        commands[f"best of {kind} from Python"] = [str(best)]
    return commands


QLORA = ["--model.model=wide", "--model.config=null", "--model.lora={r: 2}", "--model.quantization=nf4"]


def quantized_commands(folder: Path) -> dict[str, list[str]]:
    """What runs on two processes with adapters on a quantized base."""
    one = step_file(folder, "one")
    return {
        "qlora to shards": fit("shards", *QLORA, *sharded(), ckpt=one),
        "qlora in one file": fit("file-start", *QLORA, *sharded(one_file=True)),
        "qlora from one file": fit("file", *QLORA, *sharded(), ckpt=step_file(folder, "file-start")),
        "qlora in shards": fit("start", *QLORA, *sharded()),
        "qlora offloaded": fit("offloaded", *QLORA, *OFFLOADED, ckpt=step_file(folder, "start")),
    }


COMMANDS = {"checkpoints": commands, "frozen": frozen_commands, "quantized": quantized_commands}


def run(command: list[str]) -> dict:
    """Runs a command line in this process; how it ended and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = main(command)
        except BaseException:
            code = traceback.format_exc()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def on_two_processes(folder: Path, which: str) -> dict:
    """How each of `COMMANDS[which]` ended, by case and rank."""
    worker = [sys.executable, __file__, str(folder), which]
    ended = subprocess.run(worker, capture_output=True, text=True, timeout=560)
    assert ended.returncode == 0, ended.stderr[-3000:]
    results = {}
    for file in folder.glob("result-*.json"):
        result = json.loads(file.read_text())
        results[result["case"], int(file.stem[-1])] = result
    return results


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder of runs of one process and of two, and how each command ended on each rank."""
    folder = tmp_path_factory.mktemp("sharded")
    recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OUMI_PL_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MASTER_PORT", free_port())
        alone = run(fit("one"))
        assert alone["code"] == 0, alone["err"]
        results = on_two_processes(folder, "checkpoints")
        # back on one process
        for source in ("start", "file-start"):
            step = step_file(folder, source)
            results[f"validate {source}", 0] = run(["validate", "--config", "r.yaml", f"--ckpt_path={step}"])
            results[f"resume {source}", 0] = run(fit(f"alone-{source}", ckpt=step))
    return folder, results


def final(folder: Path, name: str) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(folder / "runs" / name)
    assert checkpoint is not None
    assert checkpoint.name == f"step-{STEPS:08d}.ckpt"
    return read_checkpoint(checkpoint)["state_dict"]


def ended_well(results, case):
    for rank in (0, 1):
        assert results[case, rank]["code"] == 0, results[case, rank]["err"][-2000:]


RESUMED = {
    "one process to shards": "shards",
    "one process to one file": "file",
    "shards from the start": "start",
    "one file from the start": "file-start",
    "shards to one file": "to-file",
    "one file to shards": "to-shards",
    "ddp from shards": "ddp",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_any_checkpoint_resumes_as_on_one_process(done, case):
    """The weights after step 4 are those of one process, whichever way they went; and the best are exported."""
    folder, results = done
    ended_well(results, case)
    assert distance(final(folder, RESUMED[case]), final(folder, "one")) < 1e-5
    assert (folder / f"runs/{RESUMED[case]}/model/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["start", "file-start"])
def test_sharded_runs_resume_on_one_process(done, source):
    folder, results = done
    assert results[f"resume {source}", 0]["code"] == 0, results[f"resume {source}", 0]["err"][-2000:]
    assert distance(final(folder, f"alone-{source}"), final(folder, "one")) < 1e-5


@pytest.mark.slow
def test_sharded_checkpoints_are_validated_on_one_process_and_under_ddp(done):
    _, results = done
    ended_well(results, "ddp validates shards")
    losses = []
    for case in ("ddp validates shards", "validate start", "validate file-start"):
        assert results[case, 0]["code"] == 0, results[case, 0]["err"][-2000:]
        lines = results[case, 0]["out"].splitlines()
        losses.append(float(next(line.split()[1] for line in lines if line.startswith("val/loss "))))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fit from the best shards", "fit from the best file"])
def test_training_can_not_resume_from_best_weights_alone(done, case):
    _, results = done
    for rank in (0, 1):
        assert results[case, rank]["code"] == 2
        assert "holds weights only (a best.ckpt): resume from a step-*.ckpt" in results[case, rank]["err"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name"),
    [("lora in bfloat16", "lora"), ("lora in bfloat16, one file", "lora-file"), ("nested blocks", "mamba")],
)
def test_adapters_in_bfloat16_and_nested_blocks_are_sharded(done, case, name):
    folder, results = done
    ended_well(results, case)
    assert (folder / f"runs/{name}/model/model.safetensors").is_file()


def test_blocks_within_blocks_are_not_sharded_again():
    """Mamba lists its block, and the mixer within it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**MAMBA)
    model = AutoModelForCausalLM.from_config(config)
    assert {"MambaBlock", "MambaMixer"} <= set(model._no_split_modules)
    assert [type(block).__name__ for block in decoder_layers(LM(model))] == ["MambaBlock"] * 2


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A folder of runs with other frozen weights after step 2, on two processes and on one."""
    folder = tmp_path_factory.mktemp("frozen")
    recipe(folder)
    pretrained(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OUMI_PL_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MASTER_PORT", free_port())
        for name, settings in (("full", []), ("lora", PRETRAINED_LORA)):
            for start, end in (([], FREEZE), (FREEZE, [])):
                then = "thawed" if start else "frozen"
                source = f"{name}-one-{then}-start"
                for command in (
                    fit(source, *settings, *start),
                    fit(f"{name}-one-{then}", *settings, *end, ckpt=step_file(folder, source)),
                ):
                    ended = run(command)
                    assert ended["code"] == 0, ended["err"]
        return folder, on_two_processes(folder, "frozen")


@pytest.mark.slow
@pytest.mark.parametrize("then", ["frozen", "thawed"])
@pytest.mark.parametrize("kind", ["shards", "file"])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_sharded_runs_resume_with_other_frozen_weights_as_on_one_process(frozen, name, kind, then):
    folder, results = frozen
    ended_well(results, f"{name} {kind}, before {then}")
    ended_well(results, f"{name} {kind}, {then}")
    one, two = final(folder, f"{name}-one-{then}"), final(folder, f"{name}-{kind}-{then}")
    start = read_checkpoint(step_file(folder, f"{name}-{kind}-{then}-start"))["state_dict"]
    assert distance(two, one) < 1e-5
    changed = {weight for weight in two if not torch.equal(two[weight], start[weight])}
    skipped = {weight for weight in two if ".layers.0." in weight or "embed_tokens" in weight}
    assert skipped
    assert changed == (two.keys() - skipped if then == "frozen" else two.keys())


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A folder of runs with adapters on a quantized base, on two processes and on one."""
    pytest.importorskip("bitsandbytes", "0.50")
    folder = tmp_path_factory.mktemp("quantized")
    recipe(folder)
    pretrained(folder / "wide", **WIDE)
    with pytest.MonkeyPatch.context() as patch:
        multiply_exactly(functools.partial(patch.setattr, raising=False))
        patch.chdir(folder)
        patch.setenv("OUMI_PL_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MASTER_PORT", free_port())
        ended = run(fit("one", *QLORA))
        assert ended["code"] == 0, ended["err"]
        results = on_two_processes(folder, "quantized")
        results["qlora back", 0] = results["qlora back", 1] = run(fit("back", *QLORA, ckpt=step_file(folder, "start")))
        return folder, results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("qlora in shards", "start"),
        ("qlora in one file", "file-start"),
        ("qlora to shards", "shards"),
        ("qlora from one file", "file"),
        ("qlora offloaded", "offloaded"),
        ("qlora back", "back"),
    ],
)
def test_adapters_on_a_sharded_quantized_base_resume_and_export_as_on_one_process(quantized, case, name):
    folder, results = quantized
    ended_well(results, case)
    assert distance(final(folder, name), final(folder, "one")) < 1e-5
    exported, of_one = (load_file(folder / f"runs/{run}/model/adapter_model.safetensors") for run in (name, "one"))
    assert distance(exported, of_one) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "file"])
def test_python_refuses_to_go_on_from_the_best_weights_of_a_sharded_run(frozen, kind):
    _, results = frozen
    for rank in (0, 1):
        assert "holds weights only (a best.ckpt)" in results[f"best of {kind} from Python", rank]["err"]


def fit_from_python(checkpoint: Path) -> dict:
    """Goes on from a checkpoint without the command line; the error."""
    recipe_data = data(checkpoint.parent, 16, batch_size=2)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    try:
        trainer(max_steps=3, devices=2, strategy=strategy).fit(module(), recipe_data, ckpt_path=checkpoint)
    except UserError as error:
        return {"err": str(error)}
    return {"err": ""}


if __name__ == "__main__":  # on two processes: Lightning starts the second by running this file again
    os.chdir(sys.argv[1])
    torch.set_num_threads(1)
    if sys.argv[2] == "quantized":
        multiply_exactly()
    for number, (case, command) in enumerate(COMMANDS[sys.argv[2]](Path(sys.argv[1])).items()):
        result = fit_from_python(Path(command[0])) if case.endswith("from Python") else run(command)
        rank = os.environ.get("LOCAL_RANK", "0")
        Path(sys.argv[1], f"result-{number}-{rank}.json").write_text(json.dumps({"case": case} | result))
