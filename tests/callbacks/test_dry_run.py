"""`fit --dry_run`: what it says is what the run then is, and nothing of it stays."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from oumi_pl.callbacks.dry_run import OneBatch, SomeLogps, roughly
from oumi_pl.data import examples as examples_module
from oumi_pl.data.plan import Layout
from oumi_pl.modules.sft import SFT
from oumi_pl.types import Update
from tests.command_line import CommandLine
from tests.models.test_lora import pretrained
from tests.test_dpo_command import DPO
from tests.tiny import LLAMA, data, pairs, write_jsonl

FIT = ("fit", "--config", "r.yaml")
TRAINED = (*FIT, "--export.enabled", "false", "--report", "false", "--samples.rows", "0")


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


def labels_of(printed) -> dict[str, str]:
    """Name -> value of the table; sections and names stand in columns."""
    lines = [line for line in printed.splitlines() if re.match(r".{11}\S", line)]
    return {line[11:28].strip(): line[28:].strip() for line in reversed(lines)}


def number(text) -> int:
    return int(re.match(r"[\d,]+", text).group().replace(",", ""))


def test_the_table_matches_the_real_run(cli):
    """Parameters, steps, tokens, groups, folder: each against the run itself. Nothing but the cache is left."""
    cli.recipe({"data.init_args.validation": 0.2, "trainer.max_steps": 5, "trainer.accumulate_grad_batches": 3})
    before = cli.files()
    actual = labels_of(cli.works(*FIT, "--dry_run"))
    assert cli.files() == before
    assert actual["folder"] == "runs/r"
    cli.works(*TRAINED)
    assert cli.state("runs/r")["status"] == "finished"
    assert "dry_run" not in (cli.directory / "runs/r/config.yaml").read_text()
    tokens = cli.column("runs/r", "train/num_tokens")
    assert number(actual["optimizer steps"]) == max(tokens)
    assert number(actual["tokens in all"]) == float(tokens[5])
    assert number(actual["tokens per step"]) == round(float(tokens[5]) / 5)
    saved = torch.load(cli.directory / "runs/r/checkpoints/step-00000005.ckpt", weights_only=True)
    numel = sum(value.numel() for value in saved["state_dict"].values())
    assert actual["parameters"] == f"{numel:,} trainable of {numel:,} (all)"
    assert actual["weights"] == "float32"
    assert actual["gradients"] == f"{numel * 4 / 1e3:.0f} kB"
    state = saved["optimizer_states"][0]["state"].values()
    held = sum(tensor.numel() * tensor.element_size() for moments in state for tensor in moments.values())
    assert actual["optimizer state"] == f"{held / 1e3:.0f} kB"
    assert actual["rows per update"].startswith("6: 2 x 3 x 1 ")
    for group in saved["optimizer_states"][0]["param_groups"]:
        decay = group["weight_decay"]
        assert actual[group["name"]].startswith(f"{len(group['params'])} tensor")
        assert actual[group["name"]].endswith(f" lr {group['initial_lr']:g}, weight decay {decay:g}")
    assert labels_of(cli.works(*FIT, "--dry_run", "true"))["folder"] == "runs/r-2"


def test_it_trains_only_on_the_largest_micro_batch(cli, monkeypatch):
    sizes, training_step = [], SFT.training_step
    monkeypatch.setattr(
        SFT,
        "training_step",
        lambda self, b, i: sizes.append((len(b["sample_ids"]), b["input_ids"].numel())) or training_step(self, b, i),
    )
    cli.recipe({"trainer.accumulate_grad_batches": 3, "val_every": 1, "data.init_args.validation": "rows.jsonl"})
    actual = labels_of(cli.works(*FIT, "--dry_run"))
    assert len(sizes) in range(4, 13)  # two to six updates of two micro-batches, as long as they are quick
    ((rows, tokens),) = set(sizes)
    assert actual["measured on"].startswith(f"micro-batches of {rows} rows, {tokens} tokens, the largest")
    assert "validation on 2 rows, " in actual["measured on"]


def test_the_largest_micro_batch_has_the_most_tokens(tmp_path):
    for settings in ({"batch_size": 3}, {"batch_size": 2, "packing": True}):
        made = data(tmp_path, n=25, **settings)
        made.setup("fit")
        plan, layout = made.plan(0), made.layout
        all_of_them = [rows for u in range(len(plan)) for rows in plan.micro_batches(u, layout)]

        def size(rows, made=made):
            return made.batch("train", [i for row in rows for i in row])["input_ids"].numel()

        sizes = [size(rows) for rows in all_of_them]
        assert size(made.largest_micro_batch()) == max(sizes)
        assert len(set(sizes)) > 1


def test_a_repeated_micro_batch_carries_the_counts_of_its_own_update(tmp_path):
    """The loader's own totals, with fewer micro-batches than the plan was made for, over two ranks."""
    built = data(tmp_path, n=25, batch_size=3)
    built.micro_batches = 4
    built.setup("fit")
    loader, rows = built.train_dataloader(), built.largest_micro_batch()
    loader.layout = Layout(3, micro_batches=2, ranks=2)
    plan = loader.position.plan
    loader.position.plan = lambda epoch: OneBatch(plan(epoch), rows)
    batches = list(loader)
    assert len(batches) == 2 * len(built.plan(0))
    for batch in batches:
        assert batch["sample_ids"] == [int(i) for row in rows for i in row]
        assert batch["update"] == Update(targets=4 * len(batch["targets"]), rows=4 * 3, parts=4)


def test_the_reference_is_computed_only_for_the_pairs_of_the_dry_run(cli, monkeypatch):
    write_jsonl(cli.directory / "pairs.jsonl", pairs(40))
    cli.recipe(DPO | {"trainer.max_steps": 3, "data.init_args.validation": 0.2})
    computed = []
    write = SomeLogps.write
    monkeypatch.setattr(SomeLogps, "write", lambda self, c, logps: computed.append(c) or write(self, c, logps))
    actual = labels_of(cli.works(*FIT, "--dry_run"))
    assert len(computed) == 4  # two pairs to train on, two to validate
    assert actual["reference"].startswith("log-probabilities of 40 rows will be computed once, before the first update")
    assert not list((cli.directory / "cache").rglob("000000.bin"))
    cli.works(*TRAINED)
    tokens = cli.column("runs/r", "train/num_tokens")
    assert number(actual["tokens in all"]) == float(tokens[3])
    assert labels_of(cli.works(*FIT, "--dry_run"))["reference"] == "the initial model, from the cache"


def test_the_size_of_a_teachers_cache_is_printed(cli):
    """Five float32 values for each target at k = 2: two ids, two probabilities, and that of all other tokens."""
    pretrained(cli.directory / "teacher")
    distill = {"model.class_path": "Distill", "model.init_args.teacher": "./teacher", "model.init_args.top_k": 2}
    cli.recipe(distill | {"trainer.max_steps": 3, "data.init_args.validation": 0.2})
    actual = labels_of(cli.works(*FIT, "--dry_run"))
    assert not list((cli.directory / "cache").rglob("000000.bin"))
    cli.works(*TRAINED)
    files = list((cli.directory / "cache" / "reference").rglob("*.bin"))
    size = sum(file.stat().st_size for file in files)
    report = json.loads((cli.directory / "runs/r/data.json").read_text())
    checksums = 8 * len(files)
    assert size == 4 * 5 * sum(split["target_tokens"] for split in report.values()) + checksums
    assert actual["teacher"].startswith(f"distributions, {size / 1e9:.2g} GB on disk, of ")


def test_a_stream_is_read_in_its_own_order(cli):
    write_jsonl(cli.directory / "texts.jsonl", [{"text": f"document {i} says {i * i}"} for i in range(30)])
    changes = {
        "model.class_path": "Pretrain",
        "data": {"class_path": "PretrainData", "init_args": {"train": "texts.jsonl", "max_length": 16}},
        "data.init_args.tokenizer": {"class_path": "ByteTokenizer"},
        "data.init_args.streaming": True,
        "data.init_args.shuffle_buffer": 0,
        "data.init_args.batch_size": 3,
        "trainer.max_steps": 4,
        "trainer.accumulate_grad_batches": 2,
    }
    cli.recipe(changes)
    actual = labels_of(cli.works(*FIT, "--dry_run"))
    assert actual["measured on"] == "micro-batches of 3 rows, 48 tokens, as all of them are"
    cli.works(*TRAINED)
    assert number(actual["tokens in all"]) == float(cli.column("runs/r", "train/num_tokens")[4]) == 4 * 2 * 3 * 16


def test_a_dry_run_of_a_resume_starts_at_the_checkpoint(cli):
    cli.works(*TRAINED)
    before = {name: (cli.directory / name).stat().st_mtime_ns for name in cli.files()}
    out = cli.works("fit", "--resume", "runs/r", "--trainer.max_steps", "9", "--dry_run")
    assert labels_of(out)["optimizer steps"] == "9, of which 2 are done"
    assert labels_of(out)["folder"] == "runs/r"
    assert {name: (cli.directory / name).stat().st_mtime_ns for name in cli.files()} == before
    at_its_end = (*FIT, "--ckpt_path", "runs/r/checkpoints/step-00000002.ckpt")
    assert "nothing is left to train: the run ends at step 2" in (said := cli.fails(*at_its_end, "--dry_run"))
    assert said == cli.fails(*at_its_end)


def test_a_dry_run_of_a_resume_may_have_fewer_micro_batches_per_update(cli):
    """Lightning counts micro-batches, of which an update has fewer in a dry run."""
    cli.recipe({"trainer.max_steps": 1, "trainer.accumulate_grad_batches": 3})
    cli.works(*TRAINED)
    actual = labels_of(cli.works("fit", "--resume", "runs/r", "--trainer.max_steps", "9", "--dry_run"))
    assert actual["optimizer steps"] == "9, of which 1 are done"
    assert "with 2 of 3 micro-batches" in actual["one update"]


def test_callbacks_that_need_a_logger_work(cli):
    cli.recipe({"trainer.callbacks": [{"class_path": "LearningRateMonitor"}], "trainer.max_steps": 3})
    before = cli.files()
    assert labels_of(cli.works(*FIT, "--dry_run"))["optimizer steps"] == "3"
    assert cli.files() == before
    assert "no logger" in cli.fails(*FIT, "--trainer.logger", "false", "--dry_run")
    assert "no logger" in cli.run(*FIT, "--trainer.logger", "false")[2]


def test_options_that_a_dry_run_refuses(cli):
    assert "unknown option --dry_run" in cli.fails("validate", "--config", "r.yaml", "--dry_run")
    assert "--dry_run measures Lightning's loop, but --engine hf" in cli.fails(*FIT, "--dry_run", "--engine", "hf")
    cli.recipe({"trainer.max_steps": 3, "checkpoint": {"monitor": "val/los"}, "data.init_args.validation": 0.2})
    assert "did you mean 'val/loss'?" in cli.fails(*FIT, "--dry_run")
    cli.recipe({"runs_dir": "rows.jsonl"})
    assert "can't write to rows.jsonl" in cli.fails(*FIT, "--dry_run")


def test_adapters_and_base_weights_are_counted_separately(cli):
    actual = labels_of(cli.works(*FIT, "--dry_run", "--model.lora.r", "4"))
    hidden, inner, layers, kv = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["num_hidden_layers"], 16
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), *[(hidden, inner)] * 3]
    adapters = 4 * layers * sum(a + b for a, b in shapes)
    assert actual["parameters"].startswith(f"{adapters:,} trainable of ")
    assert actual["gradients"] == f"{4 * adapters / 1e3:.0f} kB"


def test_tokens_of_later_epochs_are_extrapolated(tmp_path, monkeypatch):
    monkeypatch.setattr(examples_module, "EXACT_EPOCHS", 2)
    built = data(tmp_path, n=10, batch_size=2)
    built.setup("fit")
    assert built.tokens(5 * 7) == 7 * int(np.sum(built.lengths("train")))


def test_times():
    assert [roughly(s) for s in (0.21, 47.4, 300, 7 * 3600, 8 * 86400)] == [
        "0.21 s",
        "47 s",
        "5 min",
        "7.0 h",
        "8.0 days",
    ]


@pytest.mark.slow
def test_on_two_processes(tmp_path):
    """Pairs, whose reference is computed by each for itself, and an update that is shared: none waits for the other."""
    write_jsonl(tmp_path / "pairs.jsonl", pairs(24))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "DPO", "init_args": {"config": LLAMA}},
                "data": {
                    "class_path": "DPOData",
                    "init_args": {
                        "train": "pairs.jsonl",
                        "validation": 0.25,
                        "tokenizer": {"class_path": "ByteTokenizer"},
                        "max_length": 128,
                        "batch_size": 2,
                    },
                },
                "trainer": {"max_steps": 3, "accelerator": "cpu", "devices": 2, "strategy": "ddp"},
            }
        )
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OUMI_PL_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "oumi_pl", "fit", "--config", "r.yaml", "--dry_run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.count("optimizer steps") == 1  # one of them prints
    assert labels_of(done.stdout)["pairs per update"].startswith("4: 2 x 1 x 2 ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "pairs.jsonl", "r.yaml"]
