"""`train` runs an Oumi config as it stands: the losses of the recipe that `convert` prints, Oumi's files, resume."""

import json
import os
import signal

import pytest
import transformers
import yaml

from oumi_pl.callbacks.checkpoint import Checkpoints
from tests.command_line import CommandLine, jsonl
from tests.core.oumi import tiny_model
from tests.tiny import pairs

CONFIG = {
    "model": {"model_name": "tiny", "torch_dtype_str": "float32", "model_max_length": 128},
    "data": {"train": {"datasets": [{"dataset_name": "text_sft_jsonl", "dataset_path": "rows.jsonl"}]}},
    "training": {
        "trainer_type": "TRL_SFT",
        "output_dir": "out/run",
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "enable_tensorboard": False,
    },
}
DPO = [
    "--data.train.datasets=[{dataset_name: mlabonne/orpo-dpo-mix-40k, dataset_path: pairs.jsonl}]",
    "--training.trainer_type=TRL_DPO",
]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    line = CommandLine(tmp_path, monkeypatch, capsys)
    tiny_model(tmp_path / "tiny")
    line.write("pairs.jsonl", jsonl(*pairs(16)))
    line.write("oumi.yaml", yaml.safe_dump(CONFIG))
    return line


@pytest.mark.parametrize(("options", "columns"), [([], ()), (DPO, ("rewards/margins",))], ids=["sft", "dpo"])
def test_the_recipe_that_convert_prints_gives_the_same_losses(cli, options, columns):
    cli.works("train", "-c", "oumi.yaml", *options)
    for engine in ("trl", "lightning"):
        cli.write("native.yaml", cli.works("convert", "oumi.yaml", "--engine", engine, *options))
        cli.works("fit", "--config", "native.yaml", "--name", engine, "--trainer.accelerator", "cpu")
        for column in ("loss", "grad_norm", "lr", *columns):
            theirs = cli.column("out/run", f"train/{column}")
            ours = cli.column(f"out/{engine}", f"train/{column}")
            assert ours.keys() == theirs.keys() == {1, 2, 3, 4}
            for step, value in theirs.items():
                assert float(ours[step]) == pytest.approx(float(value), rel=1e-5, abs=1e-7), (column, step)


def test_oumis_users_find_their_files_and_what_became_of_each_key(cli):
    code, out, err = cli.run("train", "-c", "oumi.yaml", "-v")
    assert code == 0, err
    assert "output -> out/run" in out
    printed = [line for line in err.splitlines() if line.startswith(("training.", "model.", "data."))]
    became = dict(line.split(maxsplit=1) for line in printed)
    set_here = {f"training.{key}" for key in CONFIG["training"]} | {f"model.{key}" for key in CONFIG["model"]}
    assert set_here <= became.keys()
    assert became["training.learning_rate"] == "model.optimizer.lr"
    found = {name.removeprefix("out/run/") for name in cli.files() if name.startswith("out/run/")}
    wanted = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    wanted |= {"trainer_state.json", "metrics_rank0000.jsonl", "telemetry/training_config.yaml", "checkpoint-2"}
    assert wanted <= found
    run = cli.directory / "out/run"
    transformers.AutoModelForCausalLM.from_pretrained(run)
    transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint-2")
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    rates = [row["learning_rate"] for row in state["log_history"] if "learning_rate" in row]
    assert rates == pytest.approx([0.0, 1e-3, 7.5e-4, 2.5e-4])
    assert json.loads((run / "telemetry/world_size.json").read_text()) == {"WORLD_SIZE": 1}
    saved = yaml.safe_load((run / "telemetry/training_config.yaml").read_text())
    assert saved["training"]["max_steps"] == 4


def test_what_differs_from_oumi_is_printed_before_the_run(cli):
    (cli.directory / "completions").mkdir()
    cli.write("completions/train.jsonl", jsonl(*({"prompt": f"Q{i}", "completion": f" {i}"} for i in range(8))))
    data = "--data.train.datasets=[{dataset_name: completions}]"
    steps = ["--training.max_steps", "1", "--training.save_steps", "0", "--training.save_epoch", "true"]
    code, _, err = cli.run("train", "-c", "oumi.yaml", data, *steps)
    assert code == 0, err
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert "note: Lightning drives it, and not trl, which can't do checkpoints by epoch here" in notes
    assert any(line.startswith("note: of rows with `prompt` and `completion` the completion") for line in notes)
    assert not any(line.startswith("training.") for line in err.splitlines())


@pytest.mark.parametrize("engine", ["lightning", "trl"])
def test_a_run_that_stopped_goes_on(cli, engine):
    options = ["--engine", engine, "--training.save_steps", "1", "--training.lr_scheduler_type", "constant"]
    cli.works("train", "-c", "oumi.yaml", *options, "--training.output_dir", "out/whole")
    cli.works("train", "-c", "oumi.yaml", *options, "--training.max_steps", "2")
    more = ["--training.resume_from_checkpoint", "out/run/checkpoint-2"]
    more = more if engine == "trl" else ["--training.resume_from_checkpoint", "out/run"]
    cli.works("train", "-c", "oumi.yaml", *options, *more)
    assert cli.column("out/run", "train/loss") == cli.column("out/whole", "train/loss")
    assert (cli.directory / "out/run/checkpoints").exists()


def test_with_nothing_to_go_on_with_it_starts_anew_and_else_it_goes_on(cli):
    again = ["--training.try_resume_from_last_checkpoint", "true"]
    cli.works("train", "-c", "oumi.yaml", *again, "--training.max_steps", "2")
    assert cli.state("out/run")["step"] == 2
    cli.works("train", "-c", "oumi.yaml", *again)
    assert cli.state("out/run")["step"] == 4
    assert not (cli.directory / "out/run-2").exists()


@pytest.mark.parametrize("engine", ["lightning", "trl"])
def test_no_steps_between_checkpoints_write_none(cli, engine):
    again = ["--training.try_resume_from_last_checkpoint", "true", "--engine", engine]
    options = ["--training.save_steps", "0", "--training.max_steps", "1", *again]
    cli.works("train", "-c", "oumi.yaml", *options, "--training.save_final_model", "false")
    run = cli.directory / "out/run"
    assert (run / "metrics_rank0000.jsonl").is_file()
    assert not list(run.rglob("*.safetensors")) + list(run.rglob("*.ckpt")) + list(run.rglob("*.pt"))
    options += ["--training.max_steps", "2", "--model.tokenizer_pad_token", "<|endoftext|>"]
    cli.works("train", "-c", "oumi.yaml", *options)  # nothing to go on from: anew
    assert transformers.AutoTokenizer.from_pretrained(cli.directory / "out/run-2").pad_token == "<|endoftext|>"
    assert {path.name for path in (cli.directory / "out/run-2").rglob("*.safetensors")} == {"model.safetensors"}
    assert not list((cli.directory / "out/run-2").rglob("*.pt")) + list((cli.directory / "out/run-2").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.max_step", "3"], "max_steps"),
        (["--engine", "tlr"], "invalid choice: 'tlr'"),
        (["--training.trainer_type", "TRL_GOLD"], "TRL_GOLD"),
        (["--data.train.datasets=[{dataset_name: text_sft, dataset_path: gone.jsonl}]"], "gone.jsonl"),
    ],
)
def test_mistakes_are_one_message(cli, options, message):
    assert message in cli.fails("train", "-c", "oumi.yaml", *options)


def test_what_a_stopped_run_has_left_is_where_it_always_is(cli, monkeypatch):
    saves, signals = Checkpoints.save, [signal.SIGINT]

    def interrupted(self, trainer):
        saves(self, trainer)
        if signals:
            os.kill(os.getpid(), signals.pop())

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    code, _, err = cli.run("train", "-c", "oumi.yaml", "--engine", "lightning")
    assert code == 130
    assert "stopped by SIGINT after step" in err
    assert {"out/run/trainer_state.json", "out/run/metrics_rank0000.jsonl"} <= cli.files()


@pytest.mark.parametrize("command", [("train", "-c"), ("convert",)])
def test_an_address_is_read_where_oumi_keeps_fetched_configs(cli, monkeypatch, command):
    address = "oumi://configs/mine.yaml"
    monkeypatch.setenv("OUMI_DIR", str(cli.directory / "fetched"))
    assert "is an address; download the file" in cli.fails(*command, address)
    assert "short names of configs are not known here" in cli.fails(*command, "llama3.1-8b")
    (cli.directory / "fetched/configs").mkdir(parents=True)
    cli.write("fetched/configs/mine.yaml", (cli.directory / "oumi.yaml").read_text())
    monkeypatch.setattr("oumi_pl.train.train", lambda config, *_: print(f"length {config.model.model_max_length}"))
    assert "128" in cli.works(*command, address)
