"""Reward models from the command line: what a run shows and leaves, checkpoints, adapters, other engines."""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from oumi_pl.report.page import make as draw_report  # tests replace it in its module
from oumi_pl.runs.folders import saved_steps
from tests.command_line import GONE, CommandLine, jsonl
from tests.models.test_lora import pretrained
from tests.tiny import pairs, rated, write_jsonl

FIT = ("fit", "--config", "r.yaml")
REWARD = {
    "model.class_path": "Reward",
    "data.class_path": "RewardData",
    "data.init_args.train": "pairs.jsonl",
    "data.init_args.validation": 0.25,
    "model.init_args.optimizer.init_args.lr": 1e-2,
    "model.init_args.schedule": GONE,
}

SGD = {"class_path": "SGD", "init_args": {"lr": 0.1}}
"""Unlike Adam, it does not amplify the rounding in which two engines differ."""


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    line = CommandLine(tmp_path, monkeypatch, capsys)
    write_jsonl(tmp_path / "pairs.jsonl", pairs(24))
    write_jsonl(tmp_path / "rated.jsonl", rated(12))
    line.recipe(REWARD)
    return line


def test_a_run_leaves_metrics_reports_and_a_model(cli):
    out = cli.works(*FIT, "--trainer.max_steps", "4", "--val_every", "2")
    assert "model -> runs/r/model" in out
    assert float(cli.column("runs/r", "train/loss")[1]) == pytest.approx(0.6931, abs=1e-2)
    for name in ("chosen", "rejected", "margins", "accuracies", "chosen_std", "rejected_std"):
        assert list(cli.column("runs/r", f"train/rewards/{name}")) == [1, 2, 3, 4]
        assert list(cli.column("runs/r", f"val/rewards/{name}")) == [2, 4]
    report = json.loads((cli.directory / "runs/r/data.json").read_text())
    assert report["train"]["pairs"] == report["train"]["kept"] == 24 - report["validation"]["kept"]
    assert 0 < report["train"]["saved_by_sharing"] < 0.5
    draw_report(cli.directory / "runs/r")
    assert "rewards/margins" in (cli.directory / "runs/r/report.html").read_text()
    hf = AutoModelForSequenceClassification.from_pretrained(cli.directory / "runs/r/model")
    assert (type(hf).__name__, hf.config.num_labels) == ("LlamaForSequenceClassification", 1)


def test_preview_and_dry_run_say_what_is_scored(cli):
    out = cli.works("preview", "--config", "r.yaml", "-n", "1", "--plain")
    assert "2 carry loss" in out
    assert out.count("⟦⏎⟧") == 2  # the last token of each response
    mixed = ("--data.train", "rated.jsonl", "--data.validation", "null")
    out = cli.works("preview", "--config", "r.yaml", "-n", "1", "--plain", *mixed)
    assert "1 carry loss · outcome " in out
    before = cli.files()
    out = cli.works(*FIT, "--dry_run", *mixed, "--model.outcome_loss", "BCE")
    assert "Reward of LlamaForSequenceClassification" in out
    assert "BradleyTerry" in out
    assert cli.files() == before


def test_a_mixture_of_pairs_and_outcomes(cli):
    sources = '["pairs.jsonl", "rated.jsonl"]'
    cli.works(*FIT, "--data.train", sources, "--model.outcome_loss", "BCE", "--trainer.max_steps", "4")
    assert cli.column("runs/r", "val/outcomes/accuracies")
    assert cli.column("runs/r", "val/rewards/accuracies/pairs")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_checkpoint_is_exported_validated_and_started_from(cli, lora):
    """The exported checkpoint is the model of the run, and a run that starts there reads its head."""
    base = pretrained(cli.directory / "base")
    cli.recipe(
        REWARD | {"model.init_args.config": GONE, "model.init_args.model": base}
        | ({"model.init_args.lora": {"r": 4}} if lora else {})
    )  # fmt: skip
    cli.works(*FIT, "--trainer.max_steps", "4", "--val_every", "4")
    (checkpoint,) = saved_steps(cli.directory / "runs/r/checkpoints")
    cli.works("export", "--checkpoint", str(checkpoint), "--output", "exported")
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    ours, theirs = (load_file(cli.directory / folder / name) for folder in ("runs/r/model", "exported"))
    assert ours.keys() == theirs.keys()
    assert any(key.endswith("score.weight") for key in ours)
    assert all(bool((ours[key] == theirs[key]).all()) for key in ours)
    out = cli.works("validate", "--config", "r.yaml", "--ckpt_path", str(checkpoint))
    shown = dict(line.split() for line in out.splitlines() if line.startswith("val/"))
    expected = float(cli.column("runs/r", "val/loss")[4])
    assert float(shown["val/loss"]) == pytest.approx(expected, rel=1e-5)
    cli.works("export", "--checkpoint", str(checkpoint), "--output", "merged", *(["--merge"] if lora else []))
    for folder in ("exported", "merged"):
        out = cli.works("validate", "--config", "r.yaml", "--model.model", folder, "--model.lora", "null")
        shown = dict(line.split() for line in out.splitlines() if line.startswith("val/"))
        assert float(shown["val/loss"]) == pytest.approx(expected, rel=1e-4)


def test_a_run_in_bfloat16_with_lora_trains_and_exports(cli):
    """The frozen weights are bfloat16, the head and the adapter float32."""
    base = pretrained(cli.directory / "base")
    settings = {"model": base, "config": GONE, "lora": {"r": 4}, "dtype": "bfloat16"}
    cli.recipe(REWARD | {f"model.init_args.{name}": value for name, value in settings.items()})
    for precision in ("bf16-mixed", "32-true"):
        cli.works(*FIT, "--trainer.precision", precision, "--name", precision)
        adapter = load_file(cli.directory / f"runs/{precision}/model/adapter_model.safetensors")
        assert {str(value.dtype) for value in adapter.values()} == {"torch.float32"}


def test_trl_trains_the_same_recipe(cli):
    cli.recipe(REWARD | {"model.init_args.optimizer": SGD})
    cli.works(*FIT, "--engine", "trl", "--name", "trl")
    cli.works(*FIT, "--name", "ours")
    for column in ("train/loss", "train/grad_norm", "val/loss", "val/rewards/margins"):
        ours, theirs = (
            [float(value) for value in cli.column(f"runs/{name}", column).values()] for name in ("ours", "trl")
        )
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6), column
    hf = AutoModelForSequenceClassification.from_pretrained(cli.directory / "runs/trl/model")
    assert hf.config.num_labels == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compare_finds_no_difference_to_trl(cli):
    """Updates of 8 pairs in micro-batches of 2; the last of an epoch is short."""
    cli.recipe(REWARD | {"trainer.accumulate_grad_batches": 4, "model.init_args.optimizer": SGD})
    out = cli.works("compare", "--config", "r.yaml", "--engines", "lightning,trl", "--steps", "4", "--output", "cmp")
    assert "trl equals lightning in all 4 steps" in out


@pytest.mark.slow
def test_the_quickstarts_pairs_are_ranked_from_random_weights(cli):
    """The bundled pairs differ in a smile, which a tiny model sees: it ranks above 95 % of the held-out ones right."""
    cli.recipe(
        REWARD
        | {
            "data.init_args.train": "bundled/preferences",
            "data.init_args.validation": "bundled/preferences/heldout",
            "data.init_args.batch_size": 16,
            "trainer.max_steps": 60,
        }
    )
    cli.works(*FIT, "--val_every", "60")
    assert float(cli.column("runs/r", "val/rewards/accuracies")[60]) > 0.95
    out = cli.works(
        *("score", "--model", "runs/r/model", "--input", "bundled/preferences/heldout", "--output", "scores.jsonl")
    )
    assert "of 240 pairs have the larger reward for the chosen response" in out


REFUSED = {
    "hf": ("--engine hf", "engine: hf can't train Reward; these can: lightning, trl"),
    "smoothing": ("--engine trl --model.loss.label_smoothing 0.1", "RewardTrainer has no label_smoothing"),
    "outcomes": ("--engine trl --model.outcome_loss BCE", "TRL's RewardTrainer trains on pairs alone"),
    "data of DPO": (
        "--data DPOData --data.train pairs.jsonl",
        "DPOData makes no rows for a reward model; use RewardDa",
    ),
    "data of SFT": ("--data SFTData --data.train rows.jsonl", "SFTData gives tokens, but Reward trains on pairs"),
    "loss of DPO": ("--model.loss Sigmoid", "model.loss: Sigmoid is not a subclass of PairLoss; known: "),
    "margins": ("--model.loss.margin true", "BradleyTerry needs the margin of each pair, and "),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(cli, options, message):
    loss = ("--model.loss", "BradleyTerry") if "--model.loss " not in options else ()
    assert message in cli.fails(*FIT, *loss, *options.split())


def test_predict_is_refused_by_name(cli):
    cli.works(*FIT)
    (checkpoint,) = saved_steps(cli.directory / "runs/r/checkpoints")
    command = ("predict", "--config", "r.yaml", "--ckpt_path", str(checkpoint))
    assert "predict: Reward does not complete prompts" in cli.fails(*command)


def test_rows_without_pairs_are_refused(cli):
    cli.write("pairs.jsonl", jsonl({"prompt": "a", "chosen": "b"}))
    assert "pairs.jsonl:1: no format fits the columns chosen, prompt" in cli.fails(*FIT, "--data.validation", "null")
