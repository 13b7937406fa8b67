"""Losses and gradient norms, update by update, are those of Oumi 0.9.

Oumi's are in `benchmarks/results/oumi_losses.txt`, with the command that measured them.
"""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from peft.tuners.lora import LoraLayer

from oumi_pl.core.configs import TrainingConfig
from oumi_pl.train import train
from tests.core import per_step

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "oumi_losses.txt"
LINES = [line for line in FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
OUMI = {name: columns for line in LINES for name, columns in json.loads(line).items()}
FAST = ("sft", "sft_completions", "dpo", "kto_apo")
RUNS = [
    pytest.param(name, engine, marks=() if name in FAST and engine is None else pytest.mark.slow)
    for name in per_step.SETTINGS
    for engine in (None, "lightning")
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("per_step")
    per_step.write(folder)
    return folder


@pytest.fixture
def same_adapters(monkeypatch):
    """LoRA's matrices A begin with the numbers that Oumi's began with."""
    reset = LoraLayer.reset_lora_parameters

    def fixed(self, adapter_name, *args, **kwargs):
        reset(self, adapter_name, *args, **kwargs)
        weight = self.lora_A[adapter_name].weight
        weight.data = torch.from_numpy(per_step.adapter_weights(tuple(weight.shape)))

    monkeypatch.setattr(LoraLayer, "reset_lora_parameters", fixed)


@pytest.mark.usefixtures("same_adapters")
@pytest.mark.parametrize(("name", "engine"), RUNS)
def test_losses_and_gradient_norms_are_those_of_oumi(files, tmp_path, monkeypatch, name, engine):
    monkeypatch.chdir(files)
    tree = per_step.config(name)
    (tmp_path / "oumi.yaml").write_text(yaml.safe_dump(tree))
    overrides = ["--training.output_dir", str(tmp_path / "run")]
    train(TrainingConfig.from_yaml_and_arg_list(tmp_path / "oumi.yaml", overrides), engine)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels, unpredicted = per_step.FIRST.get(name, (1, 0))
    factor = labels / (labels - unpredicted)
    for column, theirs in OUMI[name].items():
        ours = [float(row[f"train/{column}"]) for row in rows if row[f"train/{column}"]]
        expected = [factor * value for value in theirs]
        tolerance = per_step.WINDOWS.get(name, 1e-5) * (1 if column == "loss" else 10)
        assert ours[: len(theirs)] == pytest.approx(expected, rel=tolerance), column


def test_every_setting_was_measured():
    assert OUMI.keys() == per_step.SETTINGS.keys()
    assert all(len(columns["loss"]) == per_step.UPDATES for columns in OUMI.values())
