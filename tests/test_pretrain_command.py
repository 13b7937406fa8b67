"""Pretraining from the command line: how long by tokens, a decay branch from a checkpoint, averages, what was read."""

import json

import pytest
import torch
import transformers

from tests.command_line import GONE, CommandLine
from tests.tiny import LLAMA, write_jsonl

CHANGES = {
    "model.class_path": "Pretrain",
    "model.init_args.config": LLAMA | {"attention_dropout": 0.1},
    "model.init_args.schedule": {"class_path": "WarmupStableDecay", "init_args": {"warmup": 2, "decay": 4}},
    "data.class_path": "PretrainData",
    "data.init_args.train": "texts.jsonl",
    "data.init_args.tokenizer": {"class_path": "ByteTokenizer", "init_args": {"chat_template": False}},
    "data.init_args.max_length": 16,
    "data.init_args.exhausted": "restart",
    "trainer.max_steps": 20,
}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    built = CommandLine(tmp_path, monkeypatch, capsys)
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"document {i} says {i * i} times nothing"} for i in range(30)])
    built.recipe(CHANGES)
    return built


def saved(cli, run, step):
    state = torch.load(cli.directory / f"runs/{run}/checkpoints/step-{step:08}.ckpt", weights_only=True)
    return state["state_dict"]


def test_max_tokens_says_how_long_in_whole_updates(cli):
    cli.recipe(CHANGES | {"trainer.max_steps": GONE, "max_tokens": 200, "trainer.accumulate_grad_batches": 2})
    cli.works("fit", "--config", "r.yaml")
    assert cli.state("runs/r")["step"] == 4  # updates of 2 x 2 rows x 16 tokens
    assert float(cli.column("runs/r", "train/num_tokens")[4]) == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 100}, "max_tokens and trainer.max_steps both say how long to train"),
        ({"max_tokens": 10, "trainer.max_steps": GONE}, "a single update has 32 tokens"),
    ],
)
def test_max_tokens_that_can_not_be(cli, changes, message):
    cli.recipe(CHANGES | changes)
    assert message in cli.fails("fit", "--config", "r.yaml")


def test_a_decay_branch_is_the_run_that_was_meant_to_end_there(cli):
    """A plateau, left at step 6 for four steps of decay, is the run of ten steps that ends in those."""
    cli.works("fit", "--config", "r.yaml", "--name", "short", "--trainer.max_steps", "10")
    cli.works("fit", "--config", "r.yaml", "--name", "plateau", "--checkpoint.every", "3", "--checkpoint.keep", "9")
    start = "runs/plateau/checkpoints/step-00000006.ckpt"
    branch = ["--ckpt_path", start, "--name", "branch", "--trainer.max_steps", "10"]
    cli.works("fit", "--config", "r.yaml", *branch)
    ours, planned = saved(cli, "branch", 10), saved(cli, "short", 10)
    assert all(torch.equal(ours[name], planned[name]) for name in planned)
    rates = cli.column("runs/branch", "train/lr")
    assert [float(rates[step]) for step in (7, 8, 9, 10)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert saved(cli, "plateau", 20).keys() == planned.keys()  # the plateau itself is untouched


def test_a_branch_may_decay_longer_or_not_at_all(cli):
    cli.works("fit", "--config", "r.yaml", "--checkpoint.every", "3", "--checkpoint.keep", "9")
    start = ["--ckpt_path", "runs/r/checkpoints/step-00000006.ckpt", "--name", "b", "--trainer.max_steps", "14"]
    cli.works("fit", "--config", "r.yaml", *start, "--model.schedule.decay", "8", "--model.schedule.floor", "0.5")
    rates = cli.column("runs/b", "train/lr")
    assert [float(rates[step]) for step in (7, 11, 14)] == pytest.approx([1e-3, 7.5e-4, 5.625e-4])


def test_what_is_exported_with_an_average_is_the_average(cli):
    cli.recipe(CHANGES | {"trainer.max_steps": 6, "trainer.callbacks": [{"class_path": "EMA", "init_args": {}}]})
    cli.works("fit", "--config", "r.yaml", "--trainer.callbacks.decay", "0.5")
    exported = transformers.AutoModelForCausalLM.from_pretrained(cli.directory / "runs/r/model").state_dict()
    state = torch.load(cli.directory / "runs/r/checkpoints/step-00000006.ckpt", weights_only=True)
    for name, value in exported.items():
        assert torch.equal(value, state["state_dict"][f"model.hf.{name}"])
    assert any(not torch.equal(v, state["current_model_state"][f"model.hf.{n}"]) for n, v in exported.items())
    cli.works("export", "--checkpoint", "runs/r/checkpoints/step-00000006.ckpt", "--output", "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(cli.directory / "out").state_dict()
    assert all(torch.equal(again[name], value) for name, value in exported.items())


def test_the_end_reports_what_was_read_of_each_source_and_the_start_what_is_streamed(cli):
    write_jsonl(cli.directory / "more.jsonl", [{"text": f"another {i}"} for i in range(50)])
    sources = [{"path": "texts.jsonl", "weight": 3}, {"path": "more.jsonl", "weight": 1}]
    cli.recipe(CHANGES | {"data.init_args.train": sources, "data.init_args.streaming": True})
    code, out, err = cli.run("fit", "--config", "r.yaml")
    assert code == 0
    assert "train: texts, tokenized while it is streamed" in err
    assert "(75.00% wanted)" in out
    consumed = json.loads((cli.directory / "runs/r/data.json").read_text())["consumed"]
    assert [source["source"] for source in consumed] == ["texts", "more"]
    assert consumed[0]["share"] == pytest.approx(0.75, abs=0.05)


def test_a_branch_without_the_average_goes_on_from_the_trained_weights_and_says_so(cli, recwarn):
    average = {"trainer.callbacks": [{"class_path": "EMA", "init_args": {"decay": 0.5}}]}
    cli.recipe(CHANGES | average)
    cli.works("fit", "--config", "r.yaml", "--checkpoint.every", "6", "--checkpoint.keep", "9")
    cli.recipe(CHANGES, "plain.yaml")
    cli.works("fit", "--config", "plain.yaml")
    start = "runs/r/checkpoints/step-00000006.ckpt"
    cli.works("fit", "--config", "plain.yaml", "--ckpt_path", start, "--name", "on")
    assert any("averaged its weights" in str(warning.message) for warning in recwarn)
    ours, theirs = saved(cli, "on", 20), saved(cli, "plain", 20)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_rate_that_jumps_at_a_checkpoint_is_reported(cli, recwarn):
    cli.works("fit", "--config", "r.yaml", "--trainer.max_steps", "6")
    decayed = "runs/r/checkpoints/step-00000006.ckpt"
    cli.works("fit", "--config", "r.yaml", "--ckpt_path", decayed, "--name", "on", "--trainer.max_steps", "12")
    output = [str(warning.message) for warning in recwarn if "learning rate" in str(warning.message)]
    assert output == ["the checkpoint's next learning rate was 0, and this run continues with 0.001"]


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_that_changed_are_not_gone_on_with(cli, streaming):
    cli.works("fit", "--config", "r.yaml", f"--data.streaming={streaming}")
    write_jsonl(cli.directory / "texts.jsonl", [{"text": f"document {i} says something else"} for i in range(30)])
    options = ["--resume", "runs/r", "--trainer.max_steps", "30"]
    assert "texts.jsonl has changed since the checkpoint was written" in cli.fails("fit", *options)


def test_the_card_of_a_mixture_names_its_sources(cli):
    write_jsonl(cli.directory / "more.jsonl", [{"text": f"another {i}"} for i in range(50)])
    sources = [{"path": "texts.jsonl", "weight": 3}, {"path": "more.jsonl", "weight": 1}]
    cli.recipe(CHANGES | {"data.init_args.train": sources, "trainer.max_steps": 2})
    cli.works("fit", "--config", "r.yaml")
    assert "random weights on `texts.jsonl`, `more.jsonl`." in (cli.directory / "runs/r/model/README.md").read_text()
    cli.works("fit", "--config", "runs/r/config.yaml", "--name", "again")
    assert cli.column("runs/again", "train/loss") == cli.column("runs/r", "train/loss")
    cli.works("export", "--checkpoint", "runs/r/checkpoints/step-00000002.ckpt", "--output", "out")
    assert "random weights on `texts.jsonl`, `more.jsonl`." in (cli.directory / "out/README.md").read_text()
