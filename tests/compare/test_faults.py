"""An engine that trains otherwise is caught, and what is wrong with it is named. Planted faults, one at a time."""

import pytest
import torch
import yaml

from oumi_pl.compare.run import Engine, _lines, first_difference
from oumi_pl.compare.worker import main
from tests.command_line import RECIPE, CommandLine
from tests.tiny import LLAMA, conversations, write_jsonl

STEPS = 5
CHANGED = {
    "accumulate_grad_batches": 3,
    "gradient_clip_val": 0.05,  # below every norm
    "accelerator": "cpu",
}


def prepared(folder, **model):
    tree = yaml.safe_load(yaml.safe_dump(RECIPE)) | {"trainer": dict(CHANGED)}
    tree["model"]["init_args"] |= {"config": LLAMA} | model
    (folder / "r.yaml").write_text(yaml.safe_dump(tree))
    write_jsonl(folder / "rows.jsonl", conversations(40, longest=20))


def ran(folder, engine, role, *overrides):
    place = folder / f"{engine}-{role}-{len(list(folder.iterdir()))}"
    assert main([engine, role, str(place), str(folder / "weights"), str(STEPS), "r.yaml", *overrides]) == 0
    lines = _lines(place)
    assert len(lines) == STEPS
    return Engine(engine, lines, lines)


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    CommandLine(tmp_path, monkeypatch, capsys)
    prepared(tmp_path)
    return tmp_path


@pytest.fixture
def lead(folder):
    return ran(folder, "lightning", "lead")


@pytest.mark.parametrize("engine", ["hf", "trl", "lightning"])
def test_engines_agree_at_every_step(folder, lead, engine):
    other = ran(folder, engine, "held")
    assert first_difference(lead, other, 1e-5) is None
    assert lead.held[1]["grad_norm"] > CHANGED["gradient_clip_val"]
    free = ran(folder, engine, "free").free
    assert 0 <= free[-1]["weights"] < 1e-5


def mean_of_means(monkeypatch):
    from oumi_pl.adapters.driven import Driven

    fetch = Driven.get_batch_samples
    monkeypatch.setattr(Driven, "get_batch_samples", lambda *args, **kwargs: (fetch(*args, **kwargs)[0], None))


def shifted_label(monkeypatch):
    from oumi_pl.adapters import batches

    right = batches.tokens

    def wrong(*args, **kwargs):
        batch = right(*args, **kwargs)
        return batch | {name: batch[name].roll(1, 1) for name in ("labels", "shift_labels")}

    monkeypatch.setattr(batches, "tokens", wrong)


def dropout(monkeypatch):
    from oumi_pl.adapters.driven import Driven

    step = Driven.training_step

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

    monkeypatch.setattr(Driven, "training_step", noisy)


def other_gradient(monkeypatch):
    """As if one micro-batch counted twice in the gradient, and not in the loss that is logged."""
    from oumi_pl.adapters.driven import Driven

    step = Driven.training_step

    def doubled(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self._done == 1:
            for parameter in model.parameters():
                parameter.grad.mul_(2)
        return loss

    monkeypatch.setattr(Driven, "training_step", doubled)


@pytest.mark.parametrize(
    ("plant", "what"),
    [(mean_of_means, "loss"), (shifted_label, "batch"), (dropout, "loss"), (other_gradient, "grad_norm")],
)
def test_a_planted_fault_is_named(folder, lead, monkeypatch, plant, what):
    plant(monkeypatch)
    found = first_difference(lead, ran(folder, "hf", "held"), 1e-5)
    assert (found.what, found.step) == (what, 1)


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
    found = first_difference(lead, ran(folder, "hf", "held", override), 1e-5)
    assert (found.what, found.step) == (what, step)
