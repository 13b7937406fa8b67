"""Out of memory: what is told is reckoned from what was measured. By hand, by pretended devices, and for real."""

import resource
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oumi_pl.callbacks import memory
from oumi_pl.callbacks.memory import Shortage, gigabytes, shorter, size_in_words, smaller, tried
from oumi_pl.modules.sft import SFT
from tests.command_line import CommandLine
from tests.test_dpo_command import DPO
from tests.tiny import LLAMA, pairs, write_jsonl

FIT = ("fit", "--config", "r.yaml", "--report", "false", "--samples.rows", "0", "--export.enabled", "false")
GB = 10**9

KNOWN = Shortage(
    total=80 * GB, held=24 * GB, to_come=0, taken=100 * GB, measured=True, batch_size=8, accumulate=4, max_length=2048
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # 0.95 * (80 - 24) = 53.2 GB are left; a row takes 12.5, so that 4.26 fit
        ({}, (4, 8)),
        # 43 more GB to come leave 12.35: 0.99 rows
        ({"to_come": 43 * GB}, None),
        # 42 leave 13.3: 1.06 rows
        ({"to_come": 42 * GB}, (1, 32)),
        # of 6 x 5 = 30 rows, 3.19 fit at 100 / 6 each: 3 divides 30
        ({"batch_size": 6, "accumulate": 5}, (3, 10)),
        # of 7 x 1, 3.72 fit; 7 is a prime, so that only 1 leaves the product whole
        ({"batch_size": 7, "accumulate": 1}, (1, 7)),
        # 6.08 rows would fit at 70 GB, and neither 6 nor 5 divides 32
        ({"taken": 70 * GB}, (4, 8)),
        # the same, but those 70 GB were not all of it: at most half of 8, and of 6 x 5, 3
        ({"taken": 70 * GB, "measured": False}, (4, 8)),
        ({"taken": 60 * GB, "measured": False, "batch_size": 6, "accumulate": 5}, (3, 10)),
        # it fell over though all was reckoned to fit: the next smaller one in any case
        ({"taken": 10 * GB}, (4, 8)),
        ({"batch_size": 1, "accumulate": 32}, None),
    ],
)
def test_the_largest_micro_batch_of_the_same_update_that_fits(changes, expected):
    shortage = replace(KNOWN, **changes)
    assert smaller(shortage) == expected
    if expected:
        assert expected[0] * expected[1] == shortage.batch_size * shortage.accumulate


def test_the_longest_row_that_fits():
    alone = replace(KNOWN, batch_size=1, accumulate=32)
    assert shorter(alone) == 1088  # 53.2 of 100 GB: 1089.5 of 2048 tokens, in steps of 64
    assert shorter(replace(alone, taken=60 * GB)) == 1792  # 1815.9
    assert shorter(replace(alone, held=79 * GB, total=80 * GB)) is None  # 0.95 GB: 19 tokens
    assert shorter(replace(alone, measured=False, taken=60 * GB)) == 1024  # half, as long as nothing was measured


def test_what_an_allocator_says_it_was_asked_for():
    assert tried(RuntimeError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has")) == 3 * 2**29
    assert tried(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")) == 4096
    assert tried(MemoryError()) == 0
    assert [gigabytes(n) for n in (0, 5000, 5_000_000, 12.34e9)] == ["0 kB", "5 kB", "5 MB", "12.3 GB"]


def test_the_size_of_a_batch_is_what_the_module_counts():
    assert size_in_words({"rows": 2, "tokens": 1060, "positions": 1060}) == "2 rows, 1,060 tokens"
    assert size_in_words({"rows": 1, "tokens": 60, "positions": 80}) == "1 row, 60 tokens, 80 with padding"


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.fixture
def device(monkeypatch):
    """A pretended device of 40 GB: 10 are held, and each micro-batch takes as many GB as `device["takes"]`."""
    state = {"takes": [], "used": 10 * GB, "peak": 10 * GB, "there": 40 * GB}
    monkeypatch.setattr(memory, "used", lambda _: state["used"])
    monkeypatch.setattr(memory, "peak_memory", lambda _: state["peak"])
    monkeypatch.setattr(memory, "available", lambda _: state["there"])
    training_step = SFT.training_step

    def step(module, batch, i):
        if not state["takes"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB.")
        state["peak"] = max(state["peak"], state["used"] + state["takes"].pop(0) * GB)
        return training_step(module, batch, i)

    monkeypatch.setattr(SFT, "training_step", step)
    return state


def out_of_memory(cli, *args) -> list[str]:
    """The lines of the message."""
    code, _, err = cli.run(*FIT, *args)
    assert code == 2, err
    assert "Traceback" not in err
    assert "error: out of memory" in err, err
    lines = err[err.index("error: out of memory") :].splitlines()
    assert len(lines) <= 5
    return lines


def test_a_measured_step_tells_how_many_rows_fit(cli, device):
    write_jsonl(cli.directory / "rows.jsonl", [{"text": "x" * 55}] * 40)
    device["takes"] = [25, 25]
    lines = out_of_memory(cli, "--data.batch_size", "6", "--trainer.accumulate_grad_batches", "2")
    assert lines[0].startswith("error: out of memory on cpu in step 2, in a micro-batch of 6 rows, ")
    assert lines[1].strip() == "40.0 GB in total; 10.0 GB were in use before it, and it takes 25.0 GB more"
    # 28.5 GB for what took 25: by that it fits, and yet it didn't; of the divisors of 12 below 6, the greatest
    assert lines[2].strip() == ("what fits: --data.batch_size 4 --trainer.accumulate_grad_batches 3 (the same updates)")
    assert "--model.gradient_checkpointing true" in lines[3]
    device |= {"takes": [25, 25], "peak": 10 * GB, "there": 22 * GB}
    # 0.95 * (22 - 10) = 11.4 GB for 6 rows of 25 GB: 2.7 rows
    lines = out_of_memory(cli, "--data.batch_size", "6", "--trainer.accumulate_grad_batches", "2")
    assert "--data.batch_size 2 --trainer.accumulate_grad_batches 6" in lines[2]


def test_nothing_measured_yet(cli, device):
    lines = out_of_memory(cli, "--data.batch_size", "8")
    assert "in step 1" in lines[0]
    assert "and it takes at least 5.4 GB more" in lines[1]
    assert "what may fit: --data.batch_size 4 --trainer.accumulate_grad_batches 2" in lines[2]
    lines = out_of_memory(cli, "--data.batch_size", "1", "--model.gradient_checkpointing", "true")
    assert "a single row is too much; what may fit: --data.max_length 64" in lines[2]
    assert "bf16-mixed" in lines[3]


def test_a_dry_run_knows_the_whole_update(cli, device):
    """It tries two micro-batches of six, and what is to be turned is of the run."""
    lines = out_of_memory(cli, "--dry_run", "--data.batch_size", "4", "--trainer.accumulate_grad_batches", "6")
    assert "--data.batch_size 2 --trainer.accumulate_grad_batches 12 (the same updates)" in lines[2]
    assert not (cli.directory / "runs").exists()


def test_what_is_held_leaves_no_room(cli, device):
    device["used"] = 39 * GB
    lines = out_of_memory(cli)
    assert "smaller micro-batches don't help" in lines[2]
    assert "weights 141 kB, gradients 141 kB, optimizer state 282 kB" in lines[3]
    assert "--model.lora.r 16" in lines[4]
    assert "bf16-true" in lines[4]


def test_a_run_with_a_checkpoint_goes_on_from_it(cli, device):
    device["takes"] = [25, 25, 25]
    lines = out_of_memory(cli, "--trainer.max_steps", "9", "--checkpoint.every", "2")
    options = "--data.batch_size 1 --trainer.accumulate_grad_batches 2"
    assert lines[2].strip() == f"what fits: {options} (the same updates)"
    assert lines[-1].strip() == f"resume from the last checkpoint: oumi_pl fit --resume runs/r {options}"
    assert cli.state("runs/r")["status"] == "failed"


@pytest.mark.parametrize(
    ("where", "said", "helps"),
    [
        ("oumi_pl.modules.base.build_model", "while the model was loaded", "--model.lora.r 16"),
        ("torch.optim.AdamW._init_group", "at the end of step 1", "optimizer state 282 kB"),
        (
            "oumi_pl.modules.sft.SFT.validation_step",
            "in validation, in a batch of 2 rows, ",
            "--data.eval_batch_size 1",
        ),
    ],
)
def test_where_it_happened(cli, monkeypatch, where, said, helps):
    cli.recipe({"data.init_args.validation": "rows.jsonl"})
    monkeypatch.setattr(where, _full)
    lines = out_of_memory(cli)
    assert said in lines[0]
    assert any(helps in line for line in lines[1:])


def test_a_second_model_is_named(cli, monkeypatch):
    write_jsonl(cli.directory / "pairs.jsonl", pairs(8))
    cli.recipe(DPO | {"model.init_args.reference": "online", "data.init_args.validation": None})
    monkeypatch.setattr("torch.optim.AdamW._init_group", _full)
    assert any("model.reference: initial" in line for line in out_of_memory(cli))


def _full(*_, **__):
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_for_real(cli, monkeypatch):
    """The host has no more to give: the allocator's own error, and numbers of this process."""
    write_jsonl(cli.directory / "rows.jsonl", [{"text": "x" * 500}] * 64)
    wide = LLAMA | {"hidden_size": 256, "intermediate_size": 4096}
    cli.recipe({"model.init_args.config": wide, "data.init_args.max_length": 512, "data.init_args.batch_size": 64})
    before, rooms = resource.getrlimit(resource.RLIMIT_AS), []
    training_step = SFT.training_step

    def step(*args):
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        rooms.append(mapped + 500 * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (rooms[0], before[1]))
        return training_step(*args)

    monkeypatch.setattr(SFT, "training_step", step)
    try:
        lines = out_of_memory(cli)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert len(rooms) == 1
    assert f"{gigabytes(rooms[0])} in total" in lines[1]
    assert "in step 1, in a micro-batch of 64 rows, 32," in lines[0]
    assert "what may fit: --data.batch_size " in lines[2]
