"""A trainer type with a head of its own that completes no prompts: prompts are left out, and all the rest works."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from oumi_pl.modules.base import LanguageModule
from tests.callbacks.test_dry_run import labels_of, number
from tests.command_line import GONE, CommandLine
from tests.tiny import LLAMA, pairs, write_jsonl

FIT = ("fit", "--config", "r.yaml")


class ScalarReward(LanguageModule):
    """Scores the end of each response; the chosen one should have the higher score, by the margin of its pair."""

    unit = "rows"
    branching = True
    generates = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.head = nn.Linear(LLAMA["hidden_size"], 1)

    def loss_sums(self, batch, split):
        scores = self.causal_lm(batch, lambda states: self.head(states.ends)).squeeze(-1)
        chosen, rejected = scores.view(-1, 2).unbind(1)
        margins = chosen - rejected - batch["fields"]["margin"].nan_to_num()
        return {
            "loss": -nn.functional.logsigmoid(margins).sum(),
            "rewards/accuracies": (chosen > rejected).double().sum(),
        }


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    built, rng = CommandLine(tmp_path, monkeypatch, capsys), random.Random(0)
    write_jsonl(tmp_path / "pairs.jsonl", [row | {"margin": rng.random()} for row in pairs(16)])
    changes = {
        "model.class_path": "tests.callbacks.test_no_prompts.ScalarReward",
        "model.init_args.schedule": GONE,
        "data.class_path": "DPOData",
        "data.init_args.train": "pairs.jsonl",
        "data.init_args.validation": 0.3,
        "samples": GONE,
    }
    built.changes = changes
    built.recipe(changes)
    return built


def test_a_dry_run_counts_the_head_and_leaves_out_what_there_is_not(cli):
    before = cli.files()
    actual = labels_of(cli.works(*FIT, "--dry_run", "--trainer.max_steps", "3"))
    assert cli.files() == before
    assert actual["trainer"].startswith("ScalarReward of LlamaForCausalLM")
    assert actual["pairs per update"].startswith("2: 2 x 1 x 1 ")
    assert not {"loss", "reference"} & actual.keys()
    cli.works(*FIT, "--trainer.max_steps", "3")
    saved = torch.load(cli.directory / "runs/r/checkpoints/step-00000003.ckpt", weights_only=True)["state_dict"]
    assert saved["head.weight"].shape == (1, LLAMA["hidden_size"])
    numel = sum({value.data_ptr(): value.numel() for value in saved.values()}.values())
    assert actual["parameters"] == f"{numel:,} trainable of {numel:,} (all)"
    assert number(actual["tokens in all"]) == float(cli.column("runs/r", "train/num_tokens")[3])


def test_a_run_says_once_that_there_are_no_samples_and_has_all_the_rest(cli):
    code, _, err = cli.run(*FIT, "--val_every", "1", "--report", "true")
    assert code == 0, err
    assert err.count("no samples are written: ScalarReward does not complete prompts\n") == 1
    assert not (cli.directory / "runs/r/samples.jsonl").exists()
    assert list(cli.column("runs/r", "val/rewards/accuracies")) == [1, 2]
    assert float(cli.column("runs/r", "train/rows_per_second")[2]) > 0
    assert cli.state("runs/r")["model"]["loss"] is None
    assert load_file(cli.directory / "runs/r/model/heads.safetensors").keys() == {"head.weight", "head.bias"}
    assert json.loads((cli.directory / "runs/r/data.json").read_text())["train"]["saved_by_sharing"] > 0


def test_answers_are_left_out(cli):
    answers = {"class_path": "Answers", "init_args": {"rows": 2, "max_new_tokens": 4}}
    cli.recipe(cli.changes | {"trainer.callbacks": [answers]})
    code, out, err = cli.run(*FIT, "--val_every", "1")
    assert code == 0, err
    assert err.count("no answers are written: ScalarReward does not complete prompts\n") == 1
    assert "no samples" not in err, "answers are what this recipe writes"
    assert "exact match" not in out
    assert not cli.column("runs/r", "val/exact_match")
    assert not (cli.directory / "runs/r/samples.jsonl").exists()


def test_prompts_are_refused(cli):
    refusal = "predict: ScalarReward does not complete prompts"
    assert refusal in cli.fails("predict", "--config", "r.yaml")
    cli.works(*FIT)
    checkpoint = "runs/r/checkpoints/step-00000002.ckpt"
    assert refusal in cli.fails("predict", "--config", "r.yaml", "--ckpt_path", checkpoint)
    message = cli.fails("generate", "--checkpoint", "runs/r", "--prompt", "a", "--trust")
    assert f"--checkpoint: {checkpoint} is of ScalarReward, which does not complete prompts" in message
