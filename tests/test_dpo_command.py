"""Preference training from the command line: what a run leaves, a loss of one's own, mistakes, models of recipes."""

import json

import pytest
import transformers

from oumi_pl.config import files as recipe_files
from oumi_pl.errors import UserError
from tests.command_line import GONE, CommandLine, jsonl
from tests.tiny import pairs, write_jsonl

FIT = ("fit", "--config", "r.yaml")
DPO = {
    "model.class_path": "DPO",
    "data.class_path": "DPOData",
    "data.init_args.train": "pairs.jsonl",
    "data.init_args.validation": 0.25,
    "model.init_args.optimizer.init_args.lr": 1e-2,
    "model.init_args.schedule": GONE,
}
OFFSET = """
import torch.nn.functional as F
from oumi_pl.types import PreferenceLoss

class Offset(PreferenceLoss):
    def __init__(self, beta: float = 0.1):
        self.beta = beta

    def __call__(self, pairs):
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(chosen - rejected - pairs.margins)
"""


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    line = CommandLine(tmp_path, monkeypatch, capsys)
    write_jsonl(tmp_path / "pairs.jsonl", [row | {"margin": 1.0} for row in pairs(24)])
    line.recipe(DPO)
    return line


def test_a_run_leaves_metrics_reports_and_a_model(cli):
    out = cli.works(*FIT, "--trainer.max_steps", "4", "--val_every", "2")
    assert "model -> runs/r/model" in out
    assert float(cli.column("runs/r", "train/loss")[1]) == pytest.approx(0.6931472)
    assert float(cli.column("runs/r", "train/rewards/margins")[1]) == 0
    assert float(cli.column("runs/r", "train/rewards/accuracies")[1]) == 0.5
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl", "lengths/chosen"):
        assert list(cli.column("runs/r", f"train/{name}")) == [1, 2, 3, 4]
        assert list(cli.column("runs/r", f"val/{name}")) == [2, 4]
    assert float(cli.column("runs/r", "train/rows_per_second")[2]) > 0
    report = json.loads((cli.directory / "runs/r/data.json").read_text())
    assert 0 < report["train"]["saved_by_sharing"] < 0.5
    assert transformers.AutoModelForCausalLM.from_pretrained("runs/r/model").config.model_type == "llama"


def test_the_first_lines_name_policy_and_reference(cli):
    said = [cli.run(*FIT, *extra)[2] for extra in ((), (), ("--model.share_prompt", "false"))]
    assert "reference: the initial model, computed before training" in said[0]
    assert "prompts are computed once per pair" in said[0]
    assert "of the tokens saved where prompts are shared" in said[0]
    assert "reference: the initial model, from the cache" in said[1]
    assert "prompts are computed for each response: share_prompt is off" in said[2]


def test_a_loss_of_ones_own(cli):
    cli.write("offset.py", OFFSET)
    cli.works(*FIT, "--model.loss", "offset.Offset", "--model.loss.beta", "0.2", "--name", "own")
    assert float(cli.column("runs/own", "train/loss")[1]) == pytest.approx(1.3132617)  # log(1 + e), at a margin of 1


WRONG_LOSSES = {
    "averaged": ("(chosen - rejected).sigmoid().mean()", "returned a tensor of shape [] for 2 pairs"),
    "of a column": ("(chosen - rejected)[:, None]", "returned a tensor of shape [2, 1] for 2 pairs"),
    "detached": ("(chosen - rejected).detach()", "returned losses without a gradient"),
    "without margins": ("chosen - rejected - pairs.margins", "there are rows without a margin"),
}


@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_a_loss_of_ones_own_that_is_wrong(cli, name):
    (value, message), module = WRONG_LOSSES[name], name.replace(" ", "_")
    write_jsonl(cli.directory / "pairs.jsonl", pairs(24))
    cli.write(f"{module}.py", OFFSET.replace("-F.logsigmoid(chosen - rejected - pairs.margins)", value))
    code, _, err = cli.run(*FIT, "--model.loss", f"{module}.Offset")
    assert (code, "Traceback" in err) == (2, False)
    assert message in err


def test_a_resume_with_other_rows_is_refused(cli):
    cli.works(*FIT, "--trainer.max_steps", "2")
    write_jsonl(cli.directory / "pairs.jsonl", pairs(20))
    code, _, err = cli.run("fit", "--resume", "runs/r", "--trainer.max_steps", "4")
    assert code == 2
    assert "have changed since the checkpoint was written" in err


def test_validate_compares_a_checkpoint_with_its_reference(cli):
    cli.works(*FIT, "--trainer.max_steps", "4", "--val_every", "4")
    out = cli.works("validate", "--config", "r.yaml", "--ckpt_path", "runs/r/checkpoints/step-00000004.ckpt")
    shown = dict(line.split() for line in out.splitlines() if line.startswith("val/"))
    assert float(shown["val/loss"]) == pytest.approx(float(cli.column("runs/r", "val/loss")[4]), rel=1e-5)
    assert float(shown["val/kl"]) > 0


def test_predict_answers_the_prompts_of_pairs(cli):
    cli.works(*FIT)
    options = ("--data.predict", "pairs.jsonl", "--predictions.max_new_tokens", "3")
    cli.works("predict", "--config", "r.yaml", "--ckpt_path", "runs/r/checkpoints/step-00000002.ckpt", *options)
    lines = (cli.directory / "runs/r-predict/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["reference"] for line in lines] == [row["chosen"][0]["content"] for row in pairs(24)]


TURN = {"role": "user", "content": "a"}
ROWS = {
    "no rejected": ([{"prompt": "a", "chosen": "b"}], "pairs.jsonl:1: no column 'rejected'"),
    "no rejected later on": (
        [*pairs(3), {"prompt": [TURN], "chosen": "b"}],
        "pairs.jsonl:4: no column 'rejected'",
    ),
    "equal": ([{"prompt": "a ", "chosen": "b", "rejected": "b"}] * 3, "none of 3 rows is left (3 chosen equals"),
    "empty": ([{"prompt": "a ", "chosen": "", "rejected": "b"}] * 3, "none of 3 rows is left (3 empty response)"),
    "other prompts": (
        [{"chosen": [TURN, TURN], "rejected": [TURN | {"content": "x"}, TURN]}],
        "pairs.jsonl:1: the prompts of chosen and rejected differ in turn 1",
    ),
    "a margin of text": (
        [{"prompt": "a ", "chosen": "b", "rejected": "c", "margin": "big"}],
        "pairs.jsonl:1: column 'margin' holds 'big' instead of a number",
    ),
    "rows of SFT": ([{"prompt": "a ", "completion": "b"}], "pairs.jsonl:1: no column 'chosen'"),
}


@pytest.mark.parametrize(("rows", "message"), ROWS.values(), ids=ROWS)
def test_rows_without_pairs_are_refused(cli, rows, message):
    cli.write("pairs.jsonl", jsonl(*rows))
    assert message in cli.fails(*FIT, "--data.validation", "null")


OPTIONS = {
    "beta": ("--model.loss Sigmoid --model.loss.beta 0", "model.loss: beta is 0.0, but has to be above 0"),
    "key": (
        "--model.loss Sigmoid --model.loss.betta 1",
        "unknown option --model.loss.betta; did you mean '--model.loss.beta'?",
    ),
    "class": ("--model.loss Sigmod", "model.loss: unknown class 'Sigmod'; did you mean 'Sigmoid'?"),
    "class in a sum": (
        '--model.loss WeightedSum --model.loss.losses [{"class_path":"SFTTrem"}] --model.loss.weights [1]',
        "model.loss.losses: unknown class 'SFTTrem'; did you mean 'SFTTerm'?",
    ),
    "token loss": (
        "--model.loss CrossEntropy",
        "model.loss: CrossEntropy is not a subclass of PreferenceLoss; known: ",
    ),
    "no reference": ("--model.reference none", "Sigmoid compares with a reference"),
    "misspelt": ("--model.reference initail", "did you mean 'initial'?"),
    "absent": ("--model.reference ./nowhere", "model.reference: there is no folder './nowhere'"),
    "sync": ("--model.sync_every 0", "model.sync_every is 0, but has to be at least 1"),
    "mixup": ("--model.sync_every 1 --model.mixup 2", "model.mixup is 2.0"),
    "share": ("--model.share_prompt ture", "'ture' is not a valid value; did you mean 'true'?"),
    "share in vain": ("--model.share_prompt true --model.attn eager", "model.share_prompt: LlamaModel mixes responses"),
    "no reference to move": ("--model.loss SimPO --model.sync_every 2", "SimPO compares with no reference"),
    "data of SFT": ("--data SFTData --data.train rows.jsonl", "data: SFTData gives tokens, but DPO trains on pairs"),
    "recipe": ("--model.model recipe:quickstart/stf", "no recipe 'quickstart/stf'; did you mean 'quickstart/sft'?"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_invalid_options_are_refused(cli, options, message):
    assert message in cli.fails(*FIT, *options.split())


def finished(cli, recipe, name):
    cli.write(f"runs/{name}/run.json", json.dumps({"recipe": recipe, "status": "finished", "created_ns": len(name)}))
    cli.write(f"runs/{name}/model/config.json", "{}")


def test_the_model_of_a_recipe_is_that_of_its_newest_finished_run(cli):
    tree = {"model": {"init_args": {"model": "recipe:quickstart/sft"}}}
    finished(cli, "quickstart-sft", "quickstart-sft")
    finished(cli, "quickstart-sft", "quickstart-sft-2")
    finished(cli, "quickstart-sft", "a-try-with-a-name-of-its-own")
    finished(cli, "quickstart-dpo", "of-another")
    cli.write("runs/unfinished/run.json", json.dumps({"recipe": "quickstart-sft", "created_ns": 99}))
    assert recipe_files.with_model([], tree) == ["--model.init_args.model=runs/quickstart-sft-2/model"]
    assert recipe_files.with_model(["--model.model", "mine"], tree) == ["--model.model", "mine"]
    assert recipe_files.with_model(["--x"], {}) == ["--x"]


@pytest.mark.parametrize("key", ["reference", "teacher"])
def test_references_and_teachers_may_be_models_of_recipes(cli, key):
    tree = {"model": {"init_args": {"model": "org/mine", key: "recipe:quickstart/sft"}}}
    finished(cli, "quickstart-sft", "quickstart-sft")
    assert recipe_files.with_model([], tree) == [f"--model.init_args.{key}=runs/quickstart-sft/model"]
    typed = [f"--model.{key}=recipe:quickstart/sft", "--model.model=recipe:quickstart/sft"]
    replaced = {f"--model.init_args.{name}=runs/quickstart-sft/model" for name in (key, "model")}
    assert set(recipe_files.with_model(typed, {})[2:]) == replaced


def test_an_unknown_teacher_recipe_is_refused(cli):
    tree = {"model": {"init_args": {"teacher": "recipe:quickstart/stf"}}}
    with pytest.raises(UserError, match="no recipe 'quickstart/stf'; did you mean 'quickstart/sft'"):
        recipe_files.with_model([], tree)


def test_mistakes_are_found_before_another_recipe_is_trained(cli, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a recipe is trained"))
    cli.recipe({"model.init_args.model": "recipe:quickstart/sft", "data.init_args.max_lenght": 64})
    assert "did you mean 'data.max_length'" in cli.fails("fit", "--config", "r.yaml")
    cli.recipe({"model.init_args.model": "recipe:quickstart/sft"})
    assert "did you mean '--trainer.max_steps'" in cli.fails("fit", "--config", "r.yaml", "--trainer.max_step", 3)


def test_a_recipe_without_a_run_is_trained_first(cli, monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command[1:])
        finished(cli, "quickstart-sft", "quickstart-sft")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("subprocess.run", run)
    args = recipe_files.with_model(["--model.model=recipe:quickstart/sft"], {"runs_dir": "runs"})
    assert args[-1] == "--model.init_args.model=runs/quickstart-sft/model"
    assert commands == [["-m", "oumi_pl", "fit", "--config", "quickstart/sft", "--runs_dir", "runs"]]


def test_a_recipe_that_fails_ends_in_a_message(cli, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: type("Failed", (), {"returncode": 2}))
    message = cli.fails(*FIT, "--model.model", "recipe:quickstart/sft")
    assert "the run of recipe:quickstart/sft did not finish" in message
