"""Online training from the command line: preview, dry run, and all that can be done with a run."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from oumi_pl.report.page import make as draw_report  # tests replace it in its module
from oumi_pl.runs import folders
from tests.command_line import GONE, CommandLine, jsonl
from tests.data.test_reward_model import reward_model

FIT = ("fit", "--config", "r.yaml")
REWARDS = """
def vowels(completion, row):
    return sum(ord(letter) % 7 for letter in completion) / 10 + len(row["prompt"]) % 3


def short(completion, row):
    return float(len(completion) < 4)
"""
GRPO = {
    "model.class_path": "GRPO",
    "model.init_args.schedule": GONE,
    "data.class_path": "RolloutData",
    "data.init_args.train": "prompts.jsonl",
    "data.init_args.validation": "prompts.jsonl",
    "data.init_args.reward": {"my_online_rewards.vowels": 1.0, "my_online_rewards.short": 0.5},
    "data.init_args.completions": 3,
    "data.init_args.sampling": {"max_new_tokens": 6},
    "data.init_args.success": 2.0,
}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    line = CommandLine(tmp_path, monkeypatch, capsys)
    monkeypatch.syspath_prepend(str(tmp_path))
    line.write("my_online_rewards.py", REWARDS)
    line.write("prompts.jsonl", jsonl(*({"prompt": "say " + "ab" * i} for i in range(7))))
    line.recipe(GRPO)
    return line


def rollouts(cli, run):
    text = (cli.directory / run / "rollouts.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def test_a_preview_shows_prompts_of_which_nothing_carries_loss(cli):
    before = cli.files()
    out = cli.works("preview", "--config", "r.yaml", "-n", 2)
    assert "train prompt 2" in out
    assert "train prompt 3" not in out
    assert "prompts.jsonl:1 · 23 tokens · rewards read its columns prompt" in out
    assert out.count("⟦") == 1  # in the legend
    assert "<|im_start|>assistant⏎" in out
    assert "lengths of train, prompts: 23 " in out
    assert cli.files() == before
    out = cli.works("preview", "--config", "r.yaml", "--row", 7)
    assert "say abababababab<|im_end|>" in out
    assert "train prompt 7" in cli.works("preview", "--config", "r.yaml", "--longest", "-n", 1)
    assert "prompts 1 to 7" in cli.fails("preview", "--config", "r.yaml", "--row", 8)
    assert "prompts are never cut" in cli.fails("preview", "--config", "r.yaml", "--cut")


def test_previewed_groups_are_those_of_the_first_update(cli):
    before = cli.files()
    out = cli.works("preview", "--config", "r.yaml", "--rollouts", 2, "--html", "groups.html")
    assert "2 examples" in out
    assert cli.files() == before | {"groups.html"}
    out = cli.works("preview", "--config", "r.yaml", "--rollouts", 2)
    cli.works(*FIT, "--trainer.max_steps", 1, "--export.enabled", "false")
    first = rollouts(cli, "runs/r")
    assert len(first) == 6
    for i, line in enumerate(first):
        rewards = ", ".join(f"{name} {value:.4g}" for name, value in line["rewards"].items())
        title = f"completion {i % 3 + 1}: {rewards}, total {line['total']:.4g}, advantage {line['advantage']:+.4g}"
        assert f"{title}, {line['length']} tokens" in out
        assert line["origin"] in out
    assert out.count("⟦") == 1 + len(first)  # in the legend, and around each completion
    assert "2 groups of 3: mean reward" in out


@pytest.mark.parametrize("engine", ["lightning", "trl"])
def test_a_reward_models_folder_is_a_reward(cli, engine):
    reward_model(cli.directory / "runs/judge/model")
    cli.recipe(GRPO | {"data.init_args.reward": {"runs/judge/model": 0.5, "my_online_rewards.short": 1.0}})
    out = cli.works("preview", "--config", "r.yaml", "--rollouts", 2)
    cli.works(*FIT, "--trainer.max_steps", 2, "--export.enabled", "false", "--engine", engine)
    for line in rollouts(cli, "runs/r")[:6]:
        assert line["total"] == pytest.approx(0.5 * line["rewards"]["judge"] + line["rewards"]["short"], abs=1e-6)
        assert f"judge {line['rewards']['judge']:.4g}, short" in out
    assert list(cli.column("runs/r", "train/rewards/judge")) == [1, 2]
    assert "data.reward: there is no folder 'runs/jugde/model'" in cli.fails(*FIT, "--data.reward", "runs/jugde/model")


def test_unsupported_previews_are_refused(cli):
    assert "has to be at least 1" in cli.fails("preview", "--config", "r.yaml", "--rollouts", 0)
    assert "leave out --split" in cli.fails("preview", "--config", "r.yaml", "--rollouts", 1, "--split", "validation")
    cli.recipe()
    assert "SFTData samples no completions" in cli.fails("preview", "--config", "r.yaml", "--rollouts", 1)


def test_a_dry_run_measures_updates_with_the_longest_completions(cli):
    before = cli.files()
    out = cli.works(*FIT, "--dry_run", "--trainer.accumulate_grad_batches", 2)
    assert cli.files() == before
    measured = next(line for line in out.splitlines() if "measured on" in line)
    # two of the prompts of 23 to 35 tokens, and 6 tokens in each of 6 completions
    rows, tokens = re.search(r"micro-batches of (\d+) rows, (\d+) tokens, the largest of the first", measured).groups()
    assert int(rows) == 6
    assert int(tokens) - 36 >= 35 + 23
    assert "with completions of 6 tokens, the most" in measured
    assert "generating " in out
    assert "prompts per update 4: 2 x 2 x 1" in out


def test_a_run_is_resumed_validated_tested_predicted_from_and_exported(cli):
    whole = ("--checkpoint.every", 1, "--checkpoint.keep", 9, "--val_every", 2, "--data.pass_at", "[1]")
    out = cli.works(*FIT, *whole, "--trainer.max_steps", 4, "--report", "true")
    assert "model -> runs/r/model" in out
    assert "val/weight" not in out
    for name in ("generating", "rewarding", "training"):
        assert list(cli.column("runs/r", f"train/seconds/{name}")) == [1, 2, 3, 4]
    assert list(cli.column("runs/r", "val/pass@1")) == [2, 4]
    lines = (cli.directory / "runs/r/rollouts.jsonl").read_bytes()
    assert [line["update"] for line in rollouts(cli, "runs/r")] == [1] * 6 + [2] * 6 + [3] * 6 + [4] * 3
    draw_report(cli.directory / "runs/r")
    assert "The best and the worst completion of a prompt" in (cli.directory / "runs/r/report.html").read_text()

    for step in (3, 4):
        (cli.directory / f"runs/r/checkpoints/step-0000000{step}.ckpt").unlink()
    folders.write_state(cli.directory / "runs/r", status="stopped")
    saved = AutoModelForCausalLM.from_pretrained(cli.directory / "runs/r/model").state_dict()
    cli.works("fit", "--resume", "runs/r")
    assert (cli.directory / "runs/r/rollouts.jsonl").read_bytes() == lines
    cli.works("export", "--checkpoint", "runs/r", "--output", "exported")
    again = AutoModelForCausalLM.from_pretrained(cli.directory / "exported").state_dict()
    assert all(torch.equal(saved[name], again[name]) for name in saved)

    config = ("--config", "runs/r/config.yaml", "--ckpt_path", "runs/r/checkpoints/step-00000004.ckpt")
    out = cli.works("validate", *config)
    values = dict(line.split() for line in out.splitlines() if line.startswith("val/"))
    assert float(values["val/reward"]) == pytest.approx(float(cli.column("runs/r", "val/reward")[4]), rel=1e-4)
    assert float(values["val/loss"]) == -float(values["val/reward"])
    assert "val/groups_without_variance" not in values
    assert "test/reward" in cli.works("test", *config, "--data.test", "prompts.jsonl")
    assert "7 completions -> runs/r-predict/predictions.jsonl" in cli.works("predict", *config)


def test_settings_of_the_file_and_monitors_are_checked(cli):
    assert "rollouts.max_megabytes is -1" in cli.fails(*FIT, "--rollouts.max_megabytes", -1)
    metrics = ("--data.metrics", "[my_online_rewards.short]")
    message = cli.fails(*FIT, *metrics, "--checkpoint.monitor", "val/shirt")
    assert "did you mean 'val/short'" in message
    cli.recipe()
    assert "rollouts: SFTData samples no completions" in cli.fails(*FIT, "--rollouts.max_megabytes", 3)


# ---- the README's objective and reward, and an environment, from outside of the package

ENVIRONMENT = """
from oumi_pl.rollouts.environment import Environment


class Lines(Environment):
    def start(self, row, tokenizer, rng):
        replies = iter([tokenizer.encode("go on: ", add_special_tokens=False), None])
        return lambda ids: next(replies)
"""


def code_of_the_readme(name):
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    return re.search(rf"```python\n# {name}\n(.*?)```", text, re.DOTALL)[1]


def lines_of_code(code):
    """Without imports, blank lines, docstrings and comments."""
    lines = [line.strip() for line in code.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", '"""', "import ", "from "))]


def test_the_readmes_objective_and_reward_train_from_outside_of_the_package(cli):
    reward, objective = code_of_the_readme("my_rewards.py"), code_of_the_readme("my_objective.py")
    assert len(lines_of_code(reward)) <= 5
    assert len(lines_of_code(objective)) <= 15
    for name, code in (("my_rewards", reward), ("my_objective", objective), ("my_environment", ENVIRONMENT)):
        cli.write(f"{name}.py", code)
    cli.write("prompts.jsonl", jsonl(*({"prompt": "say " + "ab" * i, "answer": "b"} for i in range(7))))
    changes = {"reward": "my_rewards.right_number", "environment": {"class_path": "my_environment.Lines"}}
    changes |= {"sampling": {"max_new_tokens": 16, "stop": list("aeiouAEIOU 123")}, "success": 1.0, "batch_size": 4}
    cli.recipe(GRPO | {f"data.init_args.{name}": value for name, value in changes.items()} | {
        "model.init_args.loss": {"class_path": "my_objective.PositiveOnly"}, "trainer.max_steps": 2,
    })  # fmt: skip
    cli.works(*FIT)
    assert {turn["by"] for line in rollouts(cli, "runs/r") for turn in line["turns"]} == {"policy", "environment"}
    assert "of them by the environment" in cli.works("preview", "--config", "r.yaml", "--rollouts", 2)
    assert set(cli.column("runs/r", "train/loss")) == {1, 2}
