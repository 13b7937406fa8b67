"""`plan` prints what an update takes, and what to change if it does not fit."""

import re
import subprocess
import sys

import pytest
import yaml

from oumi_pl.__main__ import main

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
    text = output(capsys, "--devices", "2", "--card", "a100")
    for part in ("fits into 80.0 GB", "parameters", "head chunk", "communication", "TFLOP per update", "sent"):
        assert part in text
    assert "8,192 tokens: 8 x 1 x 2 (batch_size x accumulate_grad_batches x devices)" in text
    assert re.search(r"time +about .* per update on A100 80GB SXM at 50% of its peak: [\d,]+ tokens per second", text)


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
    ("trainer", "args", "devices"),
    [
        ({"devices": 2, "num_nodes": 2}, (), 4),
        ({"devices": 2, "num_nodes": 2}, ("--trainer.devices", "3"), 6),
        ({"devices": 2, "num_nodes": 2}, ("--trainer.num_nodes=1",), 2),
        ({"devices": 2, "num_nodes": 2}, ("--devices", "5"), 5),
        ({"devices": [0, 1]}, (), 2),
        ({"devices": "auto"}, (), 1),
    ],
)
def test_devices_are_those_of_all_nodes(capsys, tmp_path, trainer, args, devices):
    (tmp_path / "devices.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    text = output(capsys, "--config", str(tmp_path / "devices.yaml"), *args)
    assert f"8 x 1 x {devices} (batch_size" in text


def test_more_devices_get_the_same_update(capsys, tmp_path):
    args = ("--trainer.strategy", "fsdp2", "--trainer.accumulate_grad_batches", "2", "--memory", "0.055")
    text = output(capsys, *args, code=1)
    devices, options = re.search(r"(\d+) devices (--.*) \(.*, the same update\)", text).groups()
    after = output(capsys, *args, "--devices", devices, *options.split())
    tokens = re.compile(r"update +([\d,]+) tokens")
    assert tokens.search(after)[1] == tokens.search(text)[1]


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
