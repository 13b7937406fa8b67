"""Optimizers and schedules of one's own: resumed with all they keep, configured in every form that Lightning has."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateFinder, LearningRateMonitor, ModelPruning
from lightning.pytorch.tuner import Tuner
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from oumi_pl.errors import UserError
from oumi_pl.modules.sft import SFT
from oumi_pl.optim import Linear
from tests.modules.test_lightning import Steps, plain, stepped
from tests.tiny import LLAMA, data, distance, module, trainer, weights

CUT = {"batch_size": 4, "group_by_length": False}


def run(tmp_path, sft, steps, ckpt_path=None, **kwargs):
    """Trains up to a step; returns the trainer."""
    L.seed_everything(1)
    rows = {"validation": 0.3} if kwargs.pop("validation", False) else {}
    train = trainer(max_steps=steps, **kwargs)
    train.fit(sft, data(tmp_path, 16, **CUT, **rows), ckpt_path=ckpt_path)
    return train


# ---- what optimizers keep in their groups


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD in short (Defazio et al. 2024): its averages and counters are in the groups."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "weight_sum": 0.0, "lr_max": -1.0})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            group["lr_max"] = max(group["lr"], group["lr_max"], 1e-6)
            group["weight_sum"] += group["lr_max"] ** 2 * (1 + group["k"])
            share = group["lr_max"] ** 2 * (1 + group["k"]) / group["weight_sum"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share).add_(p.grad, alpha=-group["lr"] * group["beta"] * (1 - share))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1
        return loss


class Prodigy(torch.optim.Optimizer):
    """The idea of Prodigy (Mishchenko & Defazio 2024): an estimate of the distance to the solution scales the rate."""

    def __init__(self, params, lr=1.0, d0=1e-3):
        super().__init__(params, {"lr": lr, "d": d0, "d0": d0, "d_numerator": 0.0})
        for group in self.param_groups:
            group["history"] = []

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            norm = sum(float(p.grad.square().sum()) for p in group["params"])
            group["d_numerator"] += group["d"] * norm
            group["d"] = max(group["d"], 1.2 * group["d"] * (1 + group["d_numerator"]))
            group["history"].append(group["d"])
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * group["d"])
        return loss


class CountedTensor(SGD):
    """A counter that is a tensor, and decays the rate."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["count"] = torch.zeros(())

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group["count"] + 1
            group["weight_decay"] = 0.1 * float(group["count"])
        return super().step(closure)


@pytest.mark.parametrize("optimizer", [ScheduleFree, Prodigy, CountedTensor])
def test_everything_in_the_parameter_groups_is_resumed(tmp_path, optimizer):
    whole, part, resumed = (module(optimizer, schedule=Linear(0.2)) for _ in range(3))
    run(tmp_path, whole, 8)
    run(tmp_path, part, 8, callbacks=[StopAt(3, tmp_path / "part.ckpt")])
    last = run(tmp_path, resumed, 8, tmp_path / "part.ckpt")
    assert distance(weights(resumed), weights(whole)) == 0
    (group,) = {len(g["history"]) for g in last.optimizers[0].param_groups} if optimizer is Prodigy else {8}
    assert group == 8


class StopAt(L.Callback):
    """Saves a checkpoint after a step, and stops."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_changed_settings_apply_and_the_optimizers_own_state_is_kept(tmp_path):
    first = run(
        tmp_path, module(lambda params: Prodigy(params, lr=1.0)), 8, callbacks=[StopAt(3, tmp_path / "part.ckpt")]
    )
    kept = [group["d"] for group in first.optimizers[0].param_groups]

    class Start(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            self.groups = getattr(self, "groups", [dict(g) for g in trainer.optimizers[0].param_groups])

    start = Start()
    run(tmp_path, module(lambda params: Prodigy(params, lr=0.5)), 5, tmp_path / "part.ckpt", callbacks=[start])
    assert [group["lr"] for group in start.groups] == [0.5] * len(kept)
    assert [group["d"] for group in start.groups] == kept
    assert all(d > 1e-3 for d in kept)


# ---- configure_optimizers

FORMS = {
    "an optimizer": lambda o, s: o,
    "a list": lambda o, s: [o],
    "a tuple of lists": lambda o, s: ([o], [s]),
    "a tuple of lists, with a config": lambda o, s: ([o], [{"scheduler": s, "interval": "step"}]),
    "a dictionary": lambda o, s: {"optimizer": o, "lr_scheduler": s},
    "a dictionary without a schedule": lambda o, s: {"optimizer": o},
    "a dictionary with a config": lambda o, s: {
        "optimizer": o,
        "lr_scheduler": {"scheduler": s, "interval": "step", "frequency": 2, "name": "mine"},
    },
    "nothing": lambda o, s: None,
}
INTERVAL = {"a tuple of lists": 4, "a dictionary": 4, "a tuple of lists, with a config": 1}
INTERVAL["a dictionary with a config"] = 2


def configured(form, schedule=lambda o: ExponentialLR(o, 0.7), optimizer=lambda ps: SGD(ps, lr=0.1, momentum=0.9)):
    class Configured(SFT):
        def configure_optimizers(self):
            built = optimizer(self.parameters())
            return form(built, schedule(built))

    return Configured(config=LLAMA)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_configure_optimizers(tmp_path, form):
    hf, optimizer, updates = plain(tmp_path, 4, epochs=2, n=16, optimizer=lambda ps: SGD(ps, lr=0.1, momentum=0.9))
    schedule = ExponentialLR(optimizer, 0.7)
    expected, rates = None, []
    for i, mean in enumerate(updates[:8]):
        if form == "nothing":
            rates.append(0.1)
            continue
        rates.append(optimizer.param_groups[0]["lr"])
        _, _, expected = stepped(hf, optimizer, [mean])
        if form in INTERVAL and (i + 1) % INTERVAL[form] == 0:
            schedule.step()
    steps, sft = Steps(), configured(FORMS[form])
    stopped = run(tmp_path, sft, 8, callbacks=[steps])
    if form == "nothing":
        assert stopped.global_step == 8
        return
    assert distance(weights(sft), expected) < 1e-5
    assert steps["train/lr"] == pytest.approx(rates)
    run(tmp_path, configured(FORMS[form]), 8, callbacks=[StopAt(5, tmp_path / "part.ckpt")])
    resumed = configured(FORMS[form])
    run(tmp_path, resumed, 8, tmp_path / "part.ckpt")
    assert distance(weights(resumed), weights(sft)) == 0


SCHEDULES = {
    "per epoch": lambda o: {"scheduler": StepLR(o, 1, 0.5), "interval": "epoch"},
    "cosine": lambda o: {"scheduler": CosineAnnealingLR(o, 8), "interval": "step"},
    "one cycle": lambda o: {"scheduler": OneCycleLR(o, 0.2, total_steps=9), "interval": "step"},
    "warm-up from 0": lambda o: {"scheduler": LambdaLR(o, lambda step: min(1, step / 4)), "interval": "step"},
    "plateau": lambda o: {"scheduler": ReduceLROnPlateau(o, patience=0, threshold=9.0), "monitor": "val/loss"},
    "plateau of the training loss": lambda o: {
        "scheduler": ReduceLROnPlateau(o, patience=0, threshold=9.0),
        "monitor": "train/loss",
        "interval": "step",
    },
}
RATES = {
    "per epoch": [0.1] * 4 + [0.05] * 4,
    "warm-up from 0": [0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1],
    "plateau of the training loss": [0.1**i for i in range(1, 9)],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_step_and_resume_as_in_lightning(tmp_path, name):
    def sft():
        return configured(lambda o, s: {"optimizer": o, "lr_scheduler": s}, SCHEDULES[name])

    steps, whole, validated = Steps(), sft(), name == "plateau"
    run(tmp_path, whole, 8, callbacks=[steps, LearningRateMonitor()], validation=validated, logger=Logged())
    if name in RATES:
        assert steps["train/lr"] == pytest.approx(RATES[name])
    run(tmp_path, sft(), 8, callbacks=[StopAt(5, tmp_path / "part.ckpt")], validation=validated)
    resumed = sft()
    run(tmp_path, resumed, 8, tmp_path / "part.ckpt", validation=validated)
    assert distance(weights(resumed), weights(whole)) == 0


@pytest.mark.parametrize(
    ("monitor", "interval", "frequency"), [("train/loss", "step", 1), ("val/loss", "step", 4), ("val/loss", "epoch", 1)]
)
@pytest.mark.parametrize("stop", [3, 4])
def test_a_plateau_is_resumed_exactly(tmp_path, monitor, interval, frequency, stop):
    """Saved after a batch or after the validation that follows it, within an epoch or at its end."""

    def schedule(optimizer):
        plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=9.0)
        return {"scheduler": plateau, "monitor": monitor, "interval": interval, "frequency": frequency}

    def trained(steps, ckpt_path=None, callback=None):
        seen, sft = Steps(), configured(lambda o, s: {"optimizer": o, "lr_scheduler": s}, schedule)
        settings = {"val_check_interval": 1, "accumulate_grad_batches": 2, "validation": True}
        run(tmp_path, sft, steps, ckpt_path, callbacks=[seen, *([callback] if callback else [])], **settings)
        return weights(sft), seen["train/lr"]

    whole, rates = trained(8)
    assert len({*rates}) == (8 if monitor == "train/loss" else 4)  # counted in batches, of which an epoch has 4
    for saved in (StopAt(stop, tmp_path / "part.ckpt"), StopAfterValidation(stop, tmp_path / "part.ckpt")):
        trained(8, callback=saved)
        resumed, later = trained(8, tmp_path / "part.ckpt")
        assert later == rates[stop:]
        assert distance(resumed, whole) == 0


class StopAfterValidation(StopAt):
    """Saves a checkpoint after a step and the validation that follows it, and stops."""

    def on_train_batch_end(self, trainer, *_):
        pass

    def on_validation_end(self, trainer, *_):
        super().on_train_batch_end(trainer)


class Logged(L.pytorch.loggers.logger.DummyLogger):
    """A logger that keeps nothing."""


def test_several_optimizers_are_refused_in_automatic_optimisation(tmp_path):
    class Two(SFT):
        def configure_optimizers(self):
            return [SGD(self.parameters(), lr=0.1), Adam(self.parameters())]

    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        run(tmp_path, Two(config=LLAMA), 1)


def test_several_optimizers_in_manual_optimisation(tmp_path):
    class Two(SFT):
        automatic_optimization = False

        def configure_optimizers(self):
            head = [p for n, p in self.named_parameters() if "lm_head" in n]
            others = [p for n, p in self.named_parameters() if "lm_head" not in n]
            return [SGD(head, lr=0.5), SGD(others, lr=0.05)]

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    hf, _, updates = plain(tmp_path, 4, n=16)
    head = list(hf.lm_head.parameters())
    others = [p for n, p in hf.named_parameters() if "lm_head" not in n]
    optimizer = SGD([{"params": head, "lr": 0.5}, {"params": others, "lr": 0.05}])
    losses, _, expected = stepped(hf, optimizer, updates[:4])
    steps, sft = Steps(), Two(config=LLAMA)
    run(tmp_path, sft, 8, callbacks=[steps])  # Lightning counts the steps of both
    assert distance(weights(sft), expected) < 1e-5
    assert steps["train/loss"] == pytest.approx(losses, rel=1e-5)


def test_a_subclass_may_change_the_result_of_configure_optimizers(tmp_path):
    class Changed(SFT):
        def configure_optimizers(self):
            ours = super().configure_optimizers()
            ours["lr_scheduler"] = {"scheduler": StepLR(ours["optimizer"], 2, 0.1), "interval": "step"}
            return ours

    steps = Steps()
    run(tmp_path, Changed(config=LLAMA, optimizer=lambda ps: SGD(ps, lr=0.1)), 4, callbacks=[steps])
    assert steps["train/lr"] == pytest.approx([0.1, 0.1, 0.01, 0.01])


# ---- the range test


def test_lr_find_sets_the_rate(tmp_path):
    sft = module(schedule=Linear(2))
    train = trainer(max_steps=4, default_root_dir=tmp_path)
    rows = data(tmp_path, 16, **CUT)
    actual = Tuner(train).lr_find(sft, datamodule=rows, min_lr=1e-4, max_lr=1.0, num_training=40)
    assert sft.learning_rate == actual.suggestion() and len(actual.results["loss"]) >= 10
    assert sft.tokens_seen["tokens"] == 0
    steps = Steps()
    train.callbacks.append(steps)
    train.fit(sft, rows)
    assert steps["train/lr"] == pytest.approx([factor * actual.suggestion() for factor in (0, 0.5, 1, 0.5)])


def test_the_learning_rate_finder_trains_with_the_rate_it_finds(tmp_path):
    finder, steps, sft = LearningRateFinder(1e-4, 1.0, num_training_steps=40), Steps(), module(schedule=Linear(2))
    train = trainer(max_steps=4, callbacks=[finder, steps], default_root_dir=tmp_path)
    L.seed_everything(1)
    train.fit(sft, data(tmp_path, 16, **CUT))
    rate = finder.optimal_lr.suggestion()
    assert steps["train/lr"] == pytest.approx([factor * rate for factor in (0, 0.5, 1, 0.5)])
    expected = module(lambda params: SGD(params, lr=rate), schedule=Linear(2))
    run(tmp_path, expected, 4)
    assert distance(weights(sft), weights(expected)) == 0, "the range test left something behind"


# ---- groups


def groups_of(tmp_path, optimizer=lambda ps: AdamW(ps, lr=0.1, weight_decay=0.2), **kwargs):
    sft = module(optimizer, **kwargs)
    built = run(tmp_path, sft, 1).optimizers[0]
    names = {id(p): name.removeprefix("model.hf.") for name, p in sft.named_parameters()}
    return {names[id(p)]: group for group in built.param_groups for p in group["params"]}


def test_groups_by_name(tmp_path):
    groups = groups_of(tmp_path, groups={"lm_head": {"lr": 0.5}, "*.mlp": {"weight_decay": 0.0, "lr_factor": 0.1}})
    assert groups["lm_head.weight"]["lr"] == 0.5
    mlp = groups["model.layers.1.mlp.up_proj.weight"]
    assert (mlp["lr"], mlp["weight_decay"]) == (pytest.approx(0.01), 0.0)
    attention = groups["model.layers.1.self_attn.q_proj.weight"]
    assert (attention["lr"], attention["weight_decay"]) == (0.1, 0.2)
    names = [group["name"] for group in {id(g): g for g in groups.values()}.values()]
    assert len(set(names)) == len(names) == 5


def test_layer_decay(tmp_path):
    groups = groups_of(tmp_path, layer_decay=0.5)
    rates = {"lm_head.weight": 0.1, "model.norm.weight": 0.1, "model.embed_tokens.weight": 0.1 * 0.5**3}
    rates |= {"model.layers.1.mlp.up_proj.weight": 0.05, "model.layers.0.input_layernorm.weight": 0.025}
    assert {name: groups[name]["lr"] for name in rates} == pytest.approx(rates)
    assert groups["model.norm.weight"]["weight_decay"] == 0.0


def test_groups_are_trained_as_by_plain_torch(tmp_path):
    def by_hand(_):
        rates = {"lm_head": 0.3, "layers.1": 0.05, "layers.0": 0.025, "embed_tokens": 0.0125}
        rate = lambda name: next((r for part, r in rates.items() if part in name), 0.1)  # noqa: E731
        return SGD([{"params": [p], "lr": rate(name)} for name, p in hf.named_parameters()])

    hf, _, updates = plain(tmp_path, 4, n=16)
    _, _, expected = stepped(hf, by_hand(hf), updates[:4])
    sft = module(lambda ps: SGD(ps, lr=0.1), groups={"lm_head": {"lr": 0.3}}, layer_decay=0.5)
    run(tmp_path, sft, 4)
    assert distance(weights(sft), expected) < 1e-5


def test_unknown_names_of_groups_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.groups: the model has no module or parameter 'lm_haed'.*lm_head"):
        run(tmp_path, module(groups={"lm_haed": {"lr": 0.5}}), 1)
    with pytest.raises(UserError, match=r"model\.layer_decay is 1\.5"):
        module(layer_decay=1.5)


# ---- freezing and thawing


class Thaw(L.Callback):
    """Trains the first layer from step 2 on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            pl_module.causal_lm.base.model.layers[0].requires_grad_(True)


@pytest.mark.parametrize("optimizer", [lambda ps: SGD(ps, lr=0.1, momentum=0.9), lambda ps: AdamW(ps, lr=1e-3)])
def test_unfrozen_modules_are_trained_from_then_on(tmp_path, optimizer):
    hf, built, updates = plain(tmp_path, 4, epochs=2, n=16, optimizer=optimizer)
    hf.model.layers[0].requires_grad_(False)
    stepped(hf, built, updates[:2])
    hf.model.layers[0].requires_grad_(True)
    _, _, expected = stepped(hf, built, updates[2:6])
    sft = module(optimizer, freeze=["model.layers.0"])
    run(tmp_path, sft, 6, callbacks=[Thaw()])
    assert distance(weights(sft), expected) < 1e-4
    run(
        tmp_path, module(optimizer, freeze=["model.layers.0"]), 6, callbacks=[Thaw(), StopAt(4, tmp_path / "part.ckpt")]
    )
    resumed = module(optimizer, freeze=["model.layers.0"])
    run(tmp_path, resumed, 6, tmp_path / "part.ckpt", callbacks=[Thaw()])
    assert distance(weights(resumed), weights(sft)) == 0


class Unfreeze(BaseFinetuning):
    """As in Lightning's documentation: all but the head is frozen, and joins the optimizer in the second epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model.hf.model)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.hf.model.layers[1].mlp, optimizer, lr=0.05)


def test_base_finetuning(tmp_path):
    hf, _, updates = plain(tmp_path, 4, epochs=2, n=16)
    hf.model.requires_grad_(False)
    optimizer = SGD(hf.lm_head.parameters(), lr=0.1)
    stepped(hf, optimizer, updates[:4])
    hf.model.layers[1].mlp.requires_grad_(True)
    optimizer.add_param_group({"params": list(hf.model.layers[1].mlp.parameters()), "lr": 0.05})
    _, _, expected = stepped(hf, optimizer, updates[4:])
    sft = module()
    run(tmp_path, sft, 8, callbacks=[Unfreeze()])
    assert distance(weights(sft), expected) < 1e-5
    run(tmp_path, module(), 8, callbacks=[Unfreeze(), StopAt(6, tmp_path / "part.ckpt")])
    resumed = module()
    run(tmp_path, resumed, 8, tmp_path / "part.ckpt", callbacks=[Unfreeze()])
    assert distance(weights(resumed), weights(sft)) == 0


def test_model_pruning_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="ModelPruning looks for weights before they are built"):
        run(tmp_path, module(), 1, callbacks=[ModelPruning("l1_unstructured", amount=0.5)])
