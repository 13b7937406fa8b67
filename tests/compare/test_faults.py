"""Planted faults, one at a time: an engine that trains differently is caught, and the difference is named."""

import pytest
import torch
import yaml

from oumi_pl.compare.run import Engine, first_difference, read_steps
from oumi_pl.compare.worker import main
from tests.command_line import RECIPE, CommandLine
from tests.tiny import LLAMA, conversations, write_jsonl

STEPS = 5
TRAINER = {
    "accumulate_grad_batches": 3,
    "gradient_clip_val": 0.05,  # below every norm
    "accelerator": "cpu",
}


def write_recipe(folder):
    tree = yaml.safe_load(yaml.safe_dump(RECIPE)) | {"trainer": dict(TRAINER)}
    tree["model"]["init_args"] |= {"config": LLAMA}
    (folder / "r.yaml").write_text(yaml.safe_dump(tree))
    write_jsonl(folder / "rows.jsonl", conversations(40, longest=20))


def train(folder, engine, role, *overrides):
    run_folder = folder / f"{engine}-{role}-{len(list(folder.iterdir()))}"
    assert main([engine, role, str(run_folder), str(folder / "weights"), str(STEPS), "r.yaml", *overrides]) == 0
    steps = read_steps(run_folder)
    assert len(steps) == STEPS
    return Engine(engine, steps, steps)


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    CommandLine(tmp_path, monkeypatch, capsys)
    write_recipe(tmp_path)
    return tmp_path


@pytest.fixture
def lead(folder):
    return train(folder, "lightning", "lead")


@pytest.mark.parametrize("engine", ["hf", "trl", "lightning"])
def test_engines_agree_at_every_step(folder, lead, engine):
    other = train(folder, engine, "held")
    assert first_difference(lead, other, 1e-5) is None
    assert lead.held[1]["grad_norm"] > TRAINER["gradient_clip_val"]
    free = train(folder, engine, "free").free
    assert 0 <= free[-1]["weights"] < 1e-5


def mean_of_means(monkeypatch):
    from oumi_pl.adapters.trainers import HFTrainer

    fetch = HFTrainer.get_batch_samples
    monkeypatch.setattr(HFTrainer, "get_batch_samples", lambda *args, **kwargs: (fetch(*args, **kwargs)[0], None))


def shifted_label(monkeypatch):
    from oumi_pl.adapters import batches

    right = batches.token_inputs

    def wrong(*args, **kwargs):
        batch = right(*args, **kwargs)
        batch.update({name: batch[name].roll(1, 1) for name in ("labels", "shift_labels")})
        return batch

    monkeypatch.setattr(batches, "token_inputs", wrong)


def dropout(monkeypatch):
    from oumi_pl.adapters.trainers import HFTrainer

    step = HFTrainer.training_step

    def noisy(self, model, inputs, *args, **kwargs):
        kept = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
        loss = step(self, model, inputs, *args, **kwargs)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
        return loss

    monkeypatch.setattr(HFTrainer, "training_step", noisy)


def other_gradient(monkeypatch):
    """As if one micro-batch counted twice in the gradient, and not in the loss that is logged."""
    from oumi_pl.adapters.trainers import HFTrainer

    step = HFTrainer.training_step

    def doubled(self, model, inputs, *args, **kwargs):
        loss = step(self, model, inputs, *args, **kwargs)
        if inputs is self.run_callback.loader.update[0]:
            for parameter in model.parameters():
                parameter.grad.mul_(2)
        return loss

    monkeypatch.setattr(HFTrainer, "training_step", doubled)


@pytest.mark.parametrize(
    ("plant", "what"),
    [(mean_of_means, "loss"), (shifted_label, "batch"), (dropout, "loss"), (other_gradient, "grad_norm")],
)
def test_a_planted_fault_is_named(folder, lead, monkeypatch, plant, what):
    plant(monkeypatch)
    difference = first_difference(lead, train(folder, "hf", "held"), 1e-5)
    assert (difference.what, difference.step) == (what, 1)


@pytest.mark.parametrize(
    ("override", "what", "step"),
    [
        ("--model.optimizer.lr=2e-3", "lr", 2),  # the first step of the warm-up has a rate of 0
        ("--trainer.gradient_clip_val=0.5", "update", 2),
        ("--model.optimizer.weight_decay=0.5", "update", 2),
        ("--seed_everything=2", "batch", 1),
        ("--data.train_on=all", "batch", 1),
    ],
)
def test_another_setting_is_named(folder, lead, override, what, step):
    difference = first_difference(lead, train(folder, "hf", "held", override), 1e-5)
    assert (difference.what, difference.step) == (what, step)
