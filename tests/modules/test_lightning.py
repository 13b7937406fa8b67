"""What Lightning's documentation teaches means the same here: each is compared with a few lines of plain PyTorch."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oumi_pl.errors import UserError
from oumi_pl.modules.sft import SFT
from oumi_pl.modules.update import OWN_WORK
from tests.modules.test_update import ROWS
from tests.tiny import LLAMA, data, distance, fit, module, sgd, trainer, weights

CUT = {"batch_size": 2, "group_by_length": False}
"""Micro-batches of two rows; with `accumulate_grad_batches=4`, an update of eight rows and one of three."""


class Steps(L.Callback):
    """The metrics of each update."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate() and "train/loss" in trainer.callback_metrics:
            self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def __getitem__(self, name):
        return [row[name] for row in self.rows]


def plain(tmp_path, rows_per_update=8, epochs=1, optimizer=sgd, n=ROWS):
    """The model before training, its optimizer, and for each update a function that gives the mean loss."""
    sft, sft_data = module(), data(tmp_path, n, batch_size=rows_per_update, group_by_length=False)
    L.seed_everything(1)
    run = trainer(max_epochs=1)
    run.strategy.connect(sft)
    sft.model = sft.build(sft_data.tokenizer)
    hf = sft.causal_lm.hf

    def mean_loss(rows):
        total, targets = 0.0, 0
        for i in rows:
            example = sft_data.examples("train")[i]
            ids = torch.tensor(example.input_ids, dtype=torch.long)[None]
            mask = torch.tensor(example.loss_mask[1:])
            logits = hf(input_ids=ids).logits[0, :-1]
            total = total + F.cross_entropy(logits[mask], ids[0, 1:][mask], reduction="sum")
            targets += int(mask.sum())
        return total / targets

    updates = []
    for epoch in range(epochs):
        plan = sft_data.plan(epoch)
        cut = [plan.micro_batches(u, sft_data.layout) for u in range(len(plan))]
        updates += [[int(i) for rows in update for row in rows for i in row] for update in cut]
    return hf, optimizer(list(hf.parameters())), [lambda rows=rows: mean_loss(rows) for rows in updates]


def stepped(hf, optimizer, updates, loss=lambda hf, mean: mean(), between=lambda hf: None):
    """The plain loop: one step per update. Returns losses, norms and weights."""
    losses, norms = [], []
    for mean in updates:
        optimizer.zero_grad()
        value = loss(hf, mean)
        value.backward()
        losses.append(float(value.detach()))
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in hf.parameters() if p.grad is not None])))
        between(hf)
        optimizer.step()
    return losses, norms, {name: p.detach().clone() for name, p in hf.named_parameters()}


def squares(model):
    return sum(p.square().sum() for p in model.parameters())


def own(base, **kwargs):
    return base(config=LLAMA, optimizer=kwargs.pop("optimizer", sgd), **kwargs)


# ---- the loss


class Penalised(SFT):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.003 * squares(self.causal_lm)


@pytest.mark.parametrize(("batch_size", "micro_batches"), [(8, 1), (2, 4)])
def test_a_penalty_has_the_weight_that_it_is_added_with(tmp_path, batch_size, micro_batches):
    _, _, expected = stepped(*plain(tmp_path), lambda hf, mean: mean() + 0.003 * squares(hf))
    cut = data(tmp_path, ROWS, batch_size=batch_size, group_by_length=False)
    steps = Steps()
    got = fit(own(Penalised), cut, max_epochs=1, accumulate_grad_batches=micro_batches, callbacks=[steps])
    assert distance(got, expected) < 1e-6
    unpenalised = stepped(*plain(tmp_path), lambda hf, mean: mean())[0]
    assert steps["train/loss"][0] == pytest.approx(unpenalised[0], rel=1e-5), "the logged loss is the one without it"


class WithoutOurStep(SFT):
    """A training step from Lightning's documentation: it calls the model, and returns a loss."""

    def training_step(self, batch, batch_idx):
        return -self.causal_lm(batch).mean()


def test_a_training_step_without_ours_trains_and_logs_what_it_returns(tmp_path):
    losses, norms, expected = stepped(*plain(tmp_path))
    steps = Steps()
    sft = own(WithoutOurStep)
    got = fit(sft, data(tmp_path, ROWS, batch_size=8, group_by_length=False), max_epochs=1, callbacks=[steps])
    assert distance(got, expected) < 1e-6
    assert steps["train/loss"] == pytest.approx(losses, rel=1e-6)
    assert steps["train/grad_norm"] == pytest.approx(norms, rel=1e-5)
    assert sft.tokens_seen == fitted_tokens(tmp_path)


def fitted_tokens(tmp_path):
    sft = module()
    fit(sft, data(tmp_path, ROWS, batch_size=8, group_by_length=False), max_epochs=1)
    return sft.tokens_seen


def test_a_training_step_without_ours_is_averaged_over_micro_batches_as_in_lightning(tmp_path):
    _, _, updates = plain(tmp_path, rows_per_update=2)
    hf, optimizer, _ = plain(tmp_path)
    steps = Steps()
    cut = data(tmp_path, 8, batch_size=2, group_by_length=False)
    fit(own(WithoutOurStep), cut, max_epochs=1, accumulate_grad_batches=4, callbacks=[steps])
    hf, optimizer, updates = plain(tmp_path, rows_per_update=2, n=8)
    losses, _, _ = stepped(hf, optimizer, [lambda: sum(mean() for mean in updates) / 4])
    assert steps["train/loss"] == pytest.approx(losses, rel=1e-6)


class FromOwnLoader(SFT):
    """Rows of another loader: a dictionary of padded ids."""

    def training_step(self, batch, batch_idx):
        return self.causal_lm.hf(input_ids=batch["ids"], labels=batch["ids"]).loss


def test_a_loader_of_ones_own(tmp_path):
    ids = torch.randint(3, 99, (4, 7), generator=torch.Generator().manual_seed(0))
    sft = FromOwnLoader(config=LLAMA | {"vocab_size": 99}, optimizer=sgd)
    steps = Steps()
    L.seed_everything(1)
    loader = torch.utils.data.DataLoader([{"ids": row} for row in ids], batch_size=2)
    trainer(max_epochs=1, callbacks=[steps]).fit(sft, loader)
    assert len(steps["train/loss"]) == 2 and sft.tokens_seen["tokens"] == 0


def test_our_step_on_the_batches_of_another_loader_says_what_is_missing(tmp_path):
    loader = data(tmp_path, ROWS)
    batches = [{k: v for k, v in loader.batch("train", [i]).items() if k != "update"} for i in range(4)]
    sft = module()
    with pytest.raises(UserError, match=r"the batches lack the totals of their update \(`update`\)"):
        L.seed_everything(1)
        trainer(max_epochs=1, accumulate_grad_batches=2).fit(
            sft.__class__(config=LLAMA | {"vocab_size": 300}, optimizer=sgd),
            torch.utils.data.DataLoader(batches, batch_size=None),
        )


# ---- manual optimisation, clipping, noise


class Manual(SFT):
    def __init__(self, *args, every=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / self.every)
        if (batch_idx + 1) % self.every == 0:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


def test_manual_optimisation(tmp_path):
    def clip(hf):
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.5)

    losses, norms, expected = stepped(*plain(tmp_path, epochs=2), between=clip)
    sft, steps = own(Manual), Steps()
    got = fit(sft, data(tmp_path, ROWS, batch_size=8, group_by_length=False), max_epochs=2, callbacks=[steps])
    assert distance(got, expected) < 1e-5
    assert steps["train/loss"] == pytest.approx(losses, rel=1e-5)
    clipped = [min(norm, 0.5) for norm in norms]  # at the step: what a step of one's own clipped before is clipped
    assert steps["train/grad_norm"] == pytest.approx(clipped, rel=1e-4)
    assert sft.tokens_seen == {name: 2 * n for name, n in fitted_tokens(tmp_path).items()}


def test_manual_accumulation(tmp_path):
    """Every second batch steps: the mean over the batches of their means, as the code says."""
    hf, optimizer, updates = plain(tmp_path, rows_per_update=2, n=8)
    pairs = [lambda a=a, b=b: (a() + b()) / 2 for a, b in zip(updates[::2], updates[1::2], strict=True)]
    clip = lambda hf: nn.utils.clip_grad_norm_(hf.parameters(), 0.5)  # noqa: E731
    _, norms, expected = stepped(hf, optimizer, pairs, between=clip)
    steps = Steps()
    got = fit(own(Manual, every=2), data(tmp_path, 8, **CUT), max_epochs=1, callbacks=[steps])
    assert distance(got, expected) < 1e-5
    assert steps["train/grad_norm"][::2] == pytest.approx([min(norm, 0.5) for norm in norms], rel=1e-4)


class OwnClipping(SFT):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        nn.utils.clip_grad_value_(self.parameters(), 0.003)


def test_clipping_of_ones_own(tmp_path):
    _, _, expected = stepped(*plain(tmp_path), between=lambda hf: nn.utils.clip_grad_value_(hf.parameters(), 0.003))
    got = fit(own(OwnClipping), data(tmp_path, ROWS, **CUT), max_epochs=1, accumulate_grad_batches=4)
    assert distance(got, expected) < 1e-5


def with_noise(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad += 0.01 * torch.randn(p.shape, generator=generator)


class Noisy(SFT):
    """Noise on the gradient, in a hook that does not call `super()`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norms, self.after_backward = [], []

    def on_after_backward(self):
        self.after_backward.append(self.norm())

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(self.norm())
        with_noise(self.causal_lm.hf.parameters(), len(self.norms))

    def norm(self):
        return float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))


def test_hooks_see_the_logged_norm_and_noise_has_its_size(tmp_path):
    seeds = iter(range(1, 9))
    _, norms, expected = stepped(*plain(tmp_path), between=lambda hf: with_noise(hf.parameters(), next(seeds)))
    sft, steps = own(Noisy), Steps()
    got = fit(sft, data(tmp_path, ROWS, **CUT), max_epochs=1, accumulate_grad_batches=4, callbacks=[steps])
    assert distance(got, expected) < 1e-5
    assert sft.norms == pytest.approx(norms, rel=1e-5)
    assert steps["train/grad_norm"] == pytest.approx(norms, rel=1e-5)
    assert [sft.after_backward[3], sft.after_backward[-1]] == pytest.approx(norms, rel=1e-5)


# ---- optimizers with closures


class SAM(torch.optim.SGD):
    """Sharpness-aware minimisation (Foret et al. 2020), which calls its closure twice."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        pairs = [(p, p.grad.clone()) for group in self.param_groups for p in group["params"]]
        norm = torch.sqrt(sum(g.square().sum() for _, g in pairs))
        for p, g in pairs:
            p.add_(0.05 * g / norm)
        with torch.enable_grad():
            closure()
        for p, g in pairs:
            p.sub_(0.05 * g / norm)
        super().step()
        return loss


def sam(params):
    return SAM(params, lr=0.1)


def lbfgs(params):
    return torch.optim.LBFGS(params, lr=0.1, max_iter=3, history_size=4)


def closed(hf, optimizer, updates):
    losses = []
    for mean in updates:
        values = []

        def closure(mean=mean, values=values):
            with torch.enable_grad():
                optimizer.zero_grad()
                value = mean()
                value.backward()
                values.append(float(value.detach()))
            return value

        optimizer.step(closure)
        losses.append(values[0])
    return losses, {name: p.detach().clone() for name, p in hf.named_parameters()}


@pytest.mark.parametrize("optimizer", [sam, lbfgs])
def test_closures_count_tokens_once_and_log_the_first_point(tmp_path, optimizer):
    losses, expected = closed(*plain(tmp_path, optimizer=optimizer))
    sft, steps = own(SFT, optimizer=optimizer), Steps()
    got = fit(sft, data(tmp_path, ROWS, batch_size=8, group_by_length=False), max_epochs=1, callbacks=[steps])
    assert distance(got, expected) < 1e-5
    assert steps["train/loss"] == pytest.approx(losses, rel=1e-5)
    assert sft.tokens_seen == fitted_tokens(tmp_path)


def test_closures_called_twice_are_refused_with_several_micro_batches(tmp_path):
    with pytest.raises(UserError, match=r"SAM computes the gradient several times .*accumulate_grad_batches to 1"):
        fit(own(SFT, optimizer=sam), data(tmp_path, ROWS, **CUT), max_epochs=1, accumulate_grad_batches=4)


class ManualSAM(SFT):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = super(ManualSAM, self).training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


def test_manual_optimisation_with_a_closure(tmp_path):
    losses, expected = closed(*plain(tmp_path, optimizer=sam))
    sft, steps = own(ManualSAM, optimizer=sam), Steps()
    got = fit(sft, data(tmp_path, ROWS, batch_size=8, group_by_length=False), max_epochs=1, callbacks=[steps])
    assert distance(got, expected) < 1e-5
    assert steps["train/loss"] == pytest.approx(losses, rel=1e-5)
    assert sft.tokens_seen == fitted_tokens(tmp_path)


# ---- hooks that belong to users


def silent(hooks):
    """A class that overrides hooks without `super()`, and counts their calls."""
    calls = dict.fromkeys(hooks, 0)

    def hook(name):
        def run(self, *args, **kwargs):
            calls[name] += 1

        return run

    return type("Silent", (SFT,), {name: hook(name) for name in hooks}), calls


HOOKS = [*OWN_WORK, "setup", "on_fit_end", "on_train_end", "on_train_epoch_start", "on_train_batch_end", "teardown"]


def run_and_resume(tmp_path, base, name):
    """Weights, metrics and tokens of a run that is stopped after two updates, and resumed."""
    ckpt = tmp_path / f"{name}.ckpt"
    settings = {"validation": 0.3, "batch_size": 2, "group_by_length": False}
    first = trainer(max_steps=2, enable_checkpointing=False, accumulate_grad_batches=2)
    L.seed_everything(1)
    first.fit(base(config=LLAMA | {"attention_dropout": 0.1}, optimizer=adam), data(tmp_path, ROWS, **settings))
    first.save_checkpoint(ckpt)
    steps, sft = Steps(), base(config=LLAMA | {"attention_dropout": 0.1}, optimizer=adam)
    L.seed_everything(5)
    second = trainer(max_steps=4, accumulate_grad_batches=2, callbacks=[steps], val_check_interval=1)
    second.fit(sft, data(tmp_path, ROWS, **settings), ckpt_path=ckpt)
    return weights(sft), steps.rows, sft.tokens_seen, {k: float(v) for k, v in second.callback_metrics.items()}


def adam(params):
    return torch.optim.AdamW(params, lr=1e-3)


def test_hooks_of_ones_own_without_super_change_nothing(tmp_path):
    silenced, calls = silent([hook for hook in HOOKS if "test" not in hook])
    expected, got = run_and_resume(tmp_path, SFT, "plain"), run_and_resume(tmp_path, silenced, "silent")
    assert distance(got[0], expected[0]) == 0
    assert got[1:] == expected[1:]
    assert all(calls.values()), calls


def test_a_mixin_and_its_super_call_each_hook_once():
    order = []

    class Mixin:
        def on_train_start(self):
            order.append("mixin")
            super().on_train_start()

    class Middle(SFT):
        def begin_training(self):
            order.append("ours")

        def on_train_start(self):
            order.append("middle")

    class Outer(Mixin, Middle):
        def on_train_start(self):
            order.append("outer")
            super().on_train_start()

    Outer(config=LLAMA).on_train_start()
    assert order == ["ours", "outer", "mixin", "middle"]


def test_test_hooks_without_super_change_nothing(tmp_path):
    silenced, calls = silent(["on_test_start", "on_test_epoch_end"])
    results = []
    for base in (SFT, silenced):
        L.seed_everything(1)
        results.append(
            trainer().test(own(base), data(tmp_path, ROWS, test=data(tmp_path, ROWS).sources["train"]), verbose=False)
        )
    assert results[0] == results[1] and "test/loss" in results[0][0]
    assert calls == {"on_test_start": 1, "on_test_epoch_end": 1}


class NoModel(SFT):
    def configure_model(self):
        pass


def test_a_configure_model_without_super_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"NoModel has no model yet: NoModel.configure_model has to call super"):
        fit(own(NoModel), data(tmp_path, ROWS), max_steps=1)


class OwnOptimizerStep(SFT):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)


def test_an_optimizer_step_without_super_trains_the_same(tmp_path):
    expected = fit(module(), data(tmp_path, ROWS, **CUT), max_epochs=1, accumulate_grad_batches=4)
    got = fit(own(OwnOptimizerStep), data(tmp_path, ROWS, **CUT), max_epochs=1, accumulate_grad_batches=4)
    assert distance(got, expected) == 0
