"""What the command line does when all is well: overrides, merging, names, running again, resuming, validation."""

import pytest
import yaml

from tests.command_line import CommandLine, jsonl
from tests.tiny import conversations

FIT = ("fit", "--config", "r.yaml")


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


def config(cli, run) -> dict:
    return yaml.safe_load((cli.directory / run / "config.yaml").read_text())


def test_run_again_from_its_own_config(cli):
    """The same recipe twice, and the config that a run leaves: the same numbers, to the last digit."""
    cli.works(*FIT)
    cli.works(*FIT)
    cli.works("fit", "--config", "runs/r-2/config.yaml")
    cli.works(*FIT, "--name", "named")
    cli.works(*FIT, "--name", "named")
    assert {p.name for p in cli.directory.glob("runs/*")} == {"r", "r-2", "r-3", "named", "named-2"}
    for run in ("r-2", "r-3", "named-2"):
        assert cli.column(f"runs/{run}", "train/loss") == cli.column("runs/r", "train/loss")
        assert cli.state(f"runs/{run}")["recipe"] == "r"
    assert set(cli.column("runs/r", "train/loss")) == {1, 2}


def test_print_config_runs_again(cli):
    printed = cli.works(*FIT, "--data.batch_size", "3", "--print_config")
    assert not (cli.directory / "runs").exists()
    cli.write("printed.yaml", printed)
    tree = yaml.safe_load(printed)
    assert tree["data"]["init_args"]["batch_size"] == 3
    cli.works("fit", "--config", "printed.yaml")
    cli.works(*FIT, "--data.batch_size", "3")
    assert cli.column("runs/printed", "train/loss") == cli.column("runs/r", "train/loss")


def test_overrides(cli):
    cli.works(
        *FIT, "--data.batch_size", "3", "--model.optimizer.lr", "3e-4", "--model.lora.r", "4", "--runs_dir", "out"
    )
    init = config(cli, "out/r")["model"]["init_args"]
    assert config(cli, "out/r")["data"]["init_args"]["batch_size"] == 3
    assert (init["optimizer"]["init_args"]["lr"], init["lora"]) == (3e-4, {"r": 4})
    assert float(cli.column("out/r", "train/lr")[2]) == pytest.approx(3e-4)


def test_settings_of_samples_are_not_dropped_without_a_word(cli):
    cli.recipe({"trainer.callbacks": [{"class_path": "Samples", "init_args": {"rows": 0}}], "trainer.max_steps": 1})
    message = cli.fails(*FIT, "--samples.rows", "2")
    assert message.startswith("error: samples: the recipe's Samples shows what the model writes; set its own arguments")
    cli.works(*FIT)  # whose own is `rows: 0`
    cli.works(*FIT, "--samples.rows", "3")  # as it is by default


def test_loss_of_ones_own(cli):
    cli.write(
        "own_loss.py",
        "from oumi_pl.losses.causal import CrossEntropy\n"
        "class Doubled(CrossEntropy):\n"
        "    def __init__(self, by: float = 2.0):\n"
        "        super().__init__()\n"
        "        self.by = by\n"
        "    def __call__(self, logits, targets):\n"
        "        return self.by * super().__call__(logits, targets)\n",
    )
    cli.works(*FIT, "--trainer.max_steps", "1")
    cli.works(*FIT, "--trainer.max_steps", "1", "--model.loss", "own_loss.Doubled", "--model.loss.by", "3")
    plain, tripled = (float(cli.column(run, "train/loss")[1]) for run in ("runs/r", "runs/r-2"))
    assert tripled == pytest.approx(3 * plain, rel=1e-6)


def test_several_recipes_merge_and_the_later_wins(cli):
    cli.write("more.yaml", "data: {init_args: {batch_size: 4}}\ntrainer: {max_steps: 1}\nname: merged\n")
    cli.works(*FIT, "--config", "more.yaml")
    merged = config(cli, "runs/merged")
    init = merged["data"]["init_args"]
    assert (init["batch_size"], init["max_length"], merged["trainer"]["max_steps"]) == (4, 128, 1)
    assert cli.state("runs/merged")["recipe"] == "r-more"


def test_a_mistake_in_one_of_several_recipes_names_its_file(cli):
    cli.recipe()
    cli.write("second.yaml", "trainer: {max_stepz: 1}\n")
    message = cli.fails("fit", "--config", "r.yaml", "--config", "second.yaml")
    assert message.startswith("error: second.yaml: trainer.max_stepz: unknown key")
    assert cli.fails("fit", "--config", "second.yaml").startswith("error: trainer.max_stepz: unknown key")


def test_resume_looks_where_the_recipe_puts_its_runs(cli):
    cli.recipe({"runs_dir": "elsewhere"})
    cli.works(*FIT)
    finished = cli.fails(*FIT, "--resume")
    assert "elsewhere/r is finished; to train it further: --resume elsewhere/r --trainer.max_steps MORE" in finished
    assert "elsewhere/r is finished, at step 2" in cli.fails("fit", "--resume", "elsewhere/r")
    out = cli.works("fit", "--resume", "elsewhere/r", "--trainer.max_steps", "3")
    assert "resuming elsewhere/r from step-00000002.ckpt" in out
    assert set(cli.column("elsewhere/r", "train/loss")) == {1, 2, 3}
    assert cli.state("elsewhere/r")["step"] == 3


def test_checkpoint_where_the_run_ends(cli):
    """Lightning would train nothing and say nothing."""
    cli.works(*FIT)
    said = cli.fails(*FIT, "--ckpt_path", "runs/r/checkpoints/step-00000002.ckpt")
    assert "nothing is left to train: the run ends at step 2, which the checkpoint has reached" in said


@pytest.mark.parametrize("rows", [16, 10])
def test_validation_at_optimizer_steps(cli, rows):
    """Also where an epoch ends in the middle of what is accumulated: 10 rows are two updates and a half."""
    cli.write("train.jsonl", jsonl(*conversations(rows)))
    changes = {
        "data.init_args.train": "train.jsonl",
        "data.init_args.validation": {"path": "rows.jsonl", "split": "train[:3]"},
        "data.init_args.batch_size": 1,
        "trainer.accumulate_grad_batches": 4,
        "trainer.max_steps": 8,
        "val_every": 3,
    }
    cli.recipe(changes)
    cli.works(*FIT)
    assert set(cli.column("runs/r", "val/loss")) == {3, 6, 8}  # and the last
    assert set(cli.column("runs/r", "train/loss")) == set(range(1, 9))


def test_other_commands(cli):
    changes = {"data.init_args.validation": 0.3, "data.init_args.test": "rows.jsonl", "predictions.max_new_tokens": 2}
    cli.recipe(changes)
    cli.works(*FIT)
    weights = ("--ckpt_path", "runs/r/checkpoints/step-00000002.ckpt")
    before = cli.files()
    assert "val/loss" in cli.works("validate", "--config", "r.yaml", *weights)
    assert "test/loss" in cli.works("test", "--config", "r.yaml", *weights)
    assert cli.files() == before
    assert "16 completions -> runs/r-predict/predictions.jsonl" in cli.works("predict", "--config", "r.yaml", *weights)


@pytest.mark.parametrize(
    "args", [("fit", "--help"), ("fit", "--model.help", "SFT"), ("validate", "--data.help=SFTData")]
)
def test_help(cli, args):
    assert "--" in cli.works(*args)
    assert not (cli.directory / "runs").exists()


def test_a_short_name_is_torchs_though_a_library_has_one_like_it(cli, monkeypatch):
    """Bitsandbytes has optimizers of torch's names, transformers one; they are imported by other libraries."""
    from transformers.optimization import Adafactor

    assert Adafactor.__module__ == "transformers.optimization"
    adafactor = {"class_path": "Adafactor", "init_args": {"lr": 0.01}}
    cli.recipe({"model.init_args.optimizer": adafactor, "trainer.max_steps": 1})
    cli.works(*FIT)
    assert config(cli, "runs/r")["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.Adafactor"
