"""`plan` prints what an update takes, and what to change if it does not fit."""

import re
import subprocess
import sys

import pytest
import yaml

from oumi_pl.__main__ import main
from oumi_pl.commands.plan import devices_of

RECIPE = ("--config", "pretrain/c4_10m")


def output(capsys, *args, code=0):
    assert main(["plan", *RECIPE, *args]) == code
    return "".join(capsys.readouterr())


def refused(capsys, *args):
    assert main(["plan", *args]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def peak(text):
    """GB at the peak."""
    size, unit = re.search(r"peak +([\d.]+) (GB|MB)", text).groups()
    return float(size) * {"GB": 1, "MB": 1e-3}[unit]


def test_the_table(capsys):
    text = output(capsys, "--trainer.devices", "2", "--card", "a100")
    for part in ("fits into 80.0 GB", "parameters", "head chunk", "communication", "TFLOP per update", "sent"):
        assert part in text
    assert "8,192 tokens: 8 x 1 x 2 (batch_size x accumulate_grad_batches x devices)" in text
    assert re.search(r"time +about .* per update on A100 80GB SXM at 50% of its peak: [\d,]+ tokens per second", text)


def test_what_is_planned_as_if_it_were_not_set_is_named(capsys):
    assert re.search(
        r"left out +model\.compile and model\.fp8: ", output(capsys, "--model.compile", "true", "--model.fp8", "true")
    )
    assert "left out" not in output(capsys)


def test_what_does_not_fit_gets_advice_that_does(capsys):
    text = output(capsys, "--memory", "1", code=1)
    assert "does not fit into 1.0 GB" in text
    options = re.search(r"what fits +(--.*) \(", text)[1].split()
    assert peak(output(capsys, "--memory", "1", *options)) <= 0.95


def test_the_fastest_layout_that_fits(capsys):
    text = output(capsys, "--memory", "1", "--fit")
    assert "the fastest layout that fits: --data.batch_size" in text
    assert peak(text.rpartition("fastest layout")[2]) <= 0.95


def test_what_no_batch_can_help(capsys):
    text = output(capsys, "--memory", "0.05", code=1)
    assert "held all the time, whatever the batch" in text
    assert "--trainer.strategy fsdp2: sharding over several devices (FSDP2)" in text
    assert "lora" not in text  # its weights are random


@pytest.mark.parametrize(
    ("trainer", "args", "total", "devices", "of_node"),
    [
        ({"devices": 2, "num_nodes": 3}, [], None, 6, 2),
        ({"devices": 2, "num_nodes": 3}, ["--trainer.devices", "4"], None, 12, 4),
        ({"devices": 2, "num_nodes": 3}, ["--trainer.num_nodes=1"], None, 2, 8),
        ({"devices": 2, "num_nodes": 3}, [], 5, 5, 8),
        ({"devices": [0, 1]}, [], None, 2, 8),
        ({"devices": "auto"}, [], None, 1, 8),
        ({}, ["--trainer.devices", "16"], None, 16, 8),
    ],
)
def test_devices_are_those_of_all_nodes(tmp_path, trainer, args, total, devices, of_node):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer}))
    assert devices_of((path,), args, total) == (devices, of_node)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "plan needs a recipe"),
        ((*RECIPE, "--card", "h10"), "unknown card 'h10'; did you mean 'h100'"),
        ((*RECIPE, "--devices", "0"), "--devices is 0, but has to be above 0"),
        ((*RECIPE, "--devices", "2", "--trainer.devices", "2"), "--devices 2 is the number of all devices; leave out"),
        ((*RECIPE, "--trainer.devices", "auto"), "--trainer.devices is auto, but plan needs a number above 0"),
        ((*RECIPE, "--memory", "-1"), "--memory is -1, but has to be above 0"),
        ((*RECIPE, "--memory", "nan"), "--memory is nan, but has to be above 0"),
        ((*RECIPE, "--fraction", "2"), "--fraction is 2"),
        ((*RECIPE, "--device", "2"), "--device"),
        ((*RECIPE, "--data.batch_siz", "2"), "data.batch_size"),
        (("--config", "nothing"), "no recipe 'nothing'"),
    ],
)
def test_refused(capsys, args, message):
    assert message in refused(capsys, *args)


def test_the_help_needs_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "oumi_pl", "plan", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "transformers"}
    assert "--memory GB" in done.stdout
