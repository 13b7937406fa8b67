"""KTO from the command line: what a run leaves, preview, dry run, another engine, mistakes."""

import json

import pytest
import transformers

from tests.command_line import GONE, CommandLine, jsonl
from tests.tiny import conversations, feedback, write_jsonl

FIT = ("fit", "--config", "r.yaml")
KTO = {
    "model.class_path": "KTO",
    "data.class_path": "KTOData",
    "data.init_args.train": "feedback.jsonl",
    "data.init_args.validation": 0.25,
    "data.init_args.batch_size": 4,
    "model.init_args.optimizer.init_args.lr": 1e-2,
    "model.init_args.schedule": GONE,
}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    line = CommandLine(tmp_path, monkeypatch, capsys)
    write_jsonl(tmp_path / "feedback.jsonl", feedback(24, seed=3))
    line.recipe(KTO)
    return line


def test_a_run_leaves_metrics_samples_and_a_model(cli):
    options = ("--trainer.max_steps", "4", "--val_every", "2", "--samples.rows", "2")
    code, _, err = cli.run(*FIT, *options)
    assert code == 0, err
    assert "reference: the initial model, computed before training" in err
    assert float(cli.column("runs/r", "train/loss")[1]) == 0.5
    assert float(cli.column("runs/r", "train/kl")[1]) == 0.0
    assert float(cli.column("runs/r", "train/kl")[4]) > 0.0
    for name in ("chosen", "rejected", "margins", "sign_accuracy"):
        assert list(cli.column("runs/r", f"val/rewards/{name}")) == [2, 4]
    report = json.loads((cli.directory / "runs/r/data.json").read_text())["train"]
    assert 0 < report["desirable"] < report["kept"]
    samples = [json.loads(line) for line in (cli.directory / "runs/r/samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 2, 4}
    assert transformers.AutoModelForCausalLM.from_pretrained("runs/r/model").config.model_type == "llama"


def test_advice_on_unbalanced_labels(cli):
    with pytest.warns(UserWarning, match="training rows are desirable and .* are not, which are weighted"):
        cli.works(*FIT)
    assert any("set model.undesirable_weight" in text for text in cli.state("runs/r")["warnings"])


def test_preview_shows_the_label_and_what_carries_loss(cli):
    out = cli.works("preview", "--config", "r.yaml", "--plain", "-n", "2", "--data.validation", "null")
    row = feedback(24, seed=3)[1]
    assert "desirable 1" in out
    assert "desirable 0" in out
    assert f"⟦{row['completion'][0]['content']}" in out
    longest = cli.works("preview", "--config", "r.yaml", "--plain", "--longest", "-n", "1")
    assert "carry loss" in longest


@pytest.mark.parametrize("options", [(), ("--model.kl", "false"), ("--model.lora", "{r: 2}")])
def test_a_dry_run_computes_the_reference_of_its_own_rows(cli, options):
    out = cli.works(*FIT, "--dry_run", "--trainer.accumulate_grad_batches", "2", *options)
    assert "one update" in out
    if not options:
        assert "of 48 rows will be computed once" in out  # rows and mismatched rows
    assert not (cli.directory / "runs").exists()


def test_validate_compares_a_checkpoint_with_its_reference(cli):
    cli.works(*FIT, "--trainer.max_steps", "4", "--val_every", "4")
    out = cli.works("validate", "--config", "r.yaml", "--ckpt_path", "runs/r/checkpoints/step-00000004.ckpt")
    shown = dict(line.split() for line in out.splitlines() if line.startswith("val/"))
    for name in ("loss", "kl"):
        assert float(shown[f"val/{name}"]) == pytest.approx(float(cli.column("runs/r", f"val/{name}")[4]), rel=1e-5)


def test_trl_trains_the_same_recipe(cli):
    cli.works(*FIT)
    cli.works(*FIT, "--engine", "trl", "--name", "by-trl")
    for name in ("train/loss", "train/grad_norm", "train/kl", "val/loss", "train/rewards/margins"):
        ours, theirs = (list(map(float, cli.column(f"runs/{run}", name).values())) for run in ("r", "by-trl"))
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_compare_with_trl(cli):
    code, out, err = cli.run("compare", "--config", "r.yaml", "--engines", "lightning,trl", "--steps", "3")
    assert code == 0, err
    assert "trl equals lightning in all 3 steps, within 1e-05" in out


ROWS = {
    "no label": (
        [{"prompt": "a", "response": "b"}],
        "feedback.jsonl:1: no column says whether the response is good; known: label, kto_tag, desirable, thumbs",
    ),
    "a label of words": (
        [{"prompt": "a", "response": "b", "label": "so so"}],
        "feedback.jsonl:1: column 'label' holds 'so so' instead of a label",
    ),
    "a score": (
        [{"prompt": "a", "response": "b", "score": 4.5}],
        "the label is a number besides 1, 0 and -1, and so a score; set data.threshold",
    ),
    "one prompt": (
        [{"prompt": "a", "response": str(i), "label": i % 2} for i in range(8)],
        "data.train: all rows have the same prompt",
    ),
    "no labels": ([{"prompt": "a", "response": "b", "label": None}] * 2, "none of 2 rows is left (2 no label)"),
}


@pytest.mark.parametrize(("rows", "message"), ROWS.values(), ids=ROWS)
def test_rows_that_are_no_feedback(cli, rows, message):
    cli.write("feedback.jsonl", jsonl(*rows))
    assert message in cli.fails(*FIT, "--data.validation", "null")


OPTIONS = {
    "beta": ("--model.loss KTOLoss --model.loss.beta 0", "model.loss: beta is 0.0, but has to be above 0"),
    "class": ("--model.loss Sigmoid", "model.loss: Sigmoid is not a subclass of ResponseLoss; known: "),
    "weight": ("--model.desirable_weight -1", "model.desirable_weight is -1.0, but has to be 0 or more"),
    "no reference": ("--model.reference none", "KTOLoss compares with a reference"),
    "data of SFT": ("--data SFTData --data.train rows.jsonl", "data: KTO trains on responses with a label"),
    "data of DPO": ("--data DPOData", "data: DPOData gives pairs, but KTO trains on tokens; "),
    "accumulation on TRL": (
        "--engine trl --trainer.accumulate_grad_batches 2",
        "trainer.accumulate_grad_batches: TRL estimates the KL divergence on each micro-batch",
    ),
    "no divergence on TRL": ("--engine trl --model.kl false", "model.kl: TRL computes KTOLoss with the KL divergence"),
    "another engine": ("--engine hf", "engine: hf can't train KTO; these can: lightning, trl"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_invalid_options_are_refused(cli, options, message):
    assert message in cli.fails(*FIT, *options.split())


def test_rows_of_sft_with_a_label(cli):
    rows = [row | {"label": i % 2 == 0} for i, row in enumerate(conversations(8))]
    cli.write("feedback.jsonl", jsonl(*rows))
    cli.works(*FIT)
