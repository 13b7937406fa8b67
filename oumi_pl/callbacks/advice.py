"""Warnings that teach: what was seen, why it matters, and what to do about it. Each is given once.

Those about settings come before the first update, those about the course of a run when it shows them. `run.json` keeps
them under `warnings`.
"""

import math
import os
import statistics
import sys
import time
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW

from oumi_pl.callbacks.run_folder import run_directory
from oumi_pl.runs import folders
from oumi_pl.types import RunData, RunModule

CUT_SHARE = 0.01
"""Share of rows cut to length above which they are more than a few outliers."""
SEEN_VALUES = 65536
"""Values of each tensor that are looked at, to estimate how many a step would change."""
SMALL = 50_000_000
"""Parameters below which models are trained with larger steps than the published ones are."""
SMALL_FACTOR = 10.0
"""By how much: the best learning rate falls about with the width (Yang et al. 2022, arXiv:2203.03466)."""
USUAL_LR = {
    ("alone", "scratch"): (1e-5, 2e-2),
    ("alone", "full"): (1e-6, 1e-3),
    ("alone", "lora"): (1e-5, 5e-3),
    ("reference", "scratch"): (1e-6, 1e-2),
    ("reference", "full"): (5e-8, 5e-5),
    ("reference", "lora"): (5e-7, 5e-4),
}
"""Whether there is a reference model, and what is trained -> lowest and highest usual learning rate of Adam.

Nearly all published runs lie between the two. Adapters take about ten times the rate of all weights (Schulman et al.
2025, "LoRA Without Regret"); preference training a tenth to a hundredth of fine-tuning's (5e-7 in Tunstall et al. 2023,
arXiv:2310.16944)."""
KINDS = {"scratch": "a model from random weights", "full": "all weights of a pretrained model", "lora": "LoRA"}
WAIT_WINDOW = 50
"""Updates over which waiting for data is measured: single slow batches say nothing."""
WAIT_FIRST = 10
"""Updates that are left out at the start, while loader processes begin."""
WAIT_SHARE = 0.15
"""Share of the time above which more loader processes are worth their memory."""
WAIT_SECONDS = 0.005
"""Seconds of waiting per update below which more processes would not pay: handing over a batch takes as long."""
STUCK_AFTER = 100
"""Updates, from half of the learning rate on, after which a loss that moves at all has moved."""
STUCK_PART = 20
"""Of these, how many at each end are compared."""
STUCK_SHARE = 0.01
"""Relative change of the loss that counts as movement, even where it could be noise."""
RISEN_SHARE = 0.05
"""Relative rise that is more than a slow start."""
NOISE = 3.0
"""Standard errors within which two means count as equal."""
NOT_FINITE = 10
"""Updates in a row without a finite loss. A gradient scaler that still searches for its scale needs fewer."""


def warn(trainer: Any, message: str) -> None:
    """Warns on rank 0, at each call, and adds the message to `run.json`."""
    if getattr(rank_zero_only, "rank", 0):
        return
    caller = sys._getframe(1)
    # without a registry: `warnings.warn` would show a text only once per process, and not in its next run
    warnings.warn_explicit(message, UserWarning, caller.f_code.co_filename, caller.f_lineno)
    directory = run_directory(trainer)
    if directory is not None:
        earlier = folders.read_state(directory).get("warnings", [])
        if message not in earlier:
            folders.write_state(directory, warnings=[*earlier, message])


class Advice(L.Callback):
    """Looks at the settings of a run, and at how it goes."""

    def __init__(self) -> None:
        self.wait = Wait()
        self.loss = LossWatch()

    def on_train_start(self, trainer: Any, pl_module: RunModule) -> None:
        """Looks at the settings."""
        for check in (rounded_away, unusual_lr, cut_rows, other_template, no_pad_token, no_validation):
            if message := check(trainer, pl_module):
                warn(trainer, message)
        self.loss.is_watching = trainer.global_step == 0
        self.loss.in_float16 = str(trainer.precision).startswith("16")
        self.wait.follow(trainer.fit_loop.epoch_loop)

    def on_train_batch_start(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Starts timing the micro-batch."""
        self.wait.batch_begins()

    def on_train_batch_end(self, trainer: Any, pl_module: RunModule, *_: Any) -> None:
        """Looks at the update that has just ended."""
        self.wait.batch_ends()
        if trainer.fit_loop._should_accumulate():
            return
        if times := self.wait.update_ends():
            warn(trainer, _starved(*times, trainer.datamodule))
        sums, group = pl_module.last_update, trainer.optimizers[0].param_groups[0]
        loss = sums["loss"] / max(1.0, sums[pl_module.unit])
        if message := self.loss.update(loss, group["lr"], group.get("initial_lr", group["lr"])):
            warn(trainer, message)


# ---- settings: each returns a message, or None


def rounded_away(trainer: Any, module: RunModule) -> str | None:
    """Weights in half precision that Adam steps on directly."""
    optimizer = trainer.optimizers[0]
    trained = [p for p in module.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not trained or not isinstance(optimizer, Adam | AdamW):
        return None
    dtype = trained[0].dtype
    lr = max(group["initial_lr"] for group in optimizer.param_groups)
    # adding less than half of the distance to the next number changes nothing
    local = [p.to_local() if isinstance(p, DTensor) else p for p in trained]  # sharded: this rank's part
    values = [p.detach().flatten()[:SEEN_VALUES].abs().float() for p in local]
    lost = sum(int((v * (torch.finfo(dtype).eps / 4) > lr).sum()) for v in values)
    share = lost / max(1, sum(len(v) for v in values))
    name = str(dtype).removeprefix("torch.")
    mixed = "bf16-mixed" if dtype == torch.bfloat16 else "16-mixed"
    return (
        f"the trained weights are {name}, and {type(optimizer).__name__} adds to them in {name}, which keeps "
        f"{8 if dtype == torch.bfloat16 else 11} bits: smaller steps are rounded away. At a learning rate of {lr:.2g}, "
        f"{share:.0%} of the weights are too large to be changed by a step. trainer.precision: {mixed} with "
        "model.dtype: float32 computes in half precision and keeps the weights in full; or train adapters (model.lora)"
    )


def unusual_lr(trainer: Any, module: RunModule) -> str | None:
    """A learning rate that is more likely a slip than a choice."""
    optimizer = trainer.optimizers[0]
    if "adam" not in type(optimizer).__name__.lower():
        return None  # other optimizers have other scales
    kind = "lora" if module.lora is not None else "full" if module.model_name else "scratch"
    compared = module.reference is not None
    if module.unit != "targets" and not compared:
        return None  # neither a loss per token nor one against a reference: nothing is known
    lr = max(group["initial_lr"] for group in optimizer.param_groups)
    low, high = usual_lr(compared, kind, sum(p.numel() for p in module.parameters()))
    if low <= lr <= high:
        return None
    what = f"{KINDS[kind]}{' with a reference model' if compared else ''}, {low:.0e} to {high:.0e}"
    if lr > high:
        return (
            f"the learning rate {lr:.2g} is above what is usual for {what}: steps of that size tend to destroy more "
            f"than they teach; unless you know it works, set model.optimizer.lr to {high:.0e} or less"
        )
    return (
        f"the learning rate {lr:.2g} is below what is usual for {what}: hardly anything will be learned; unless you "
        f"know it works, set model.optimizer.lr to {low:.0e} or more"
    )


def usual_lr(compared: bool, kind: str, parameters: int) -> tuple[float, float]:
    """The lowest and the highest usual learning rate of Adam.

    Args:
        compared: Whether the policy is compared with a reference.
        kind: What is trained, of `KINDS`.
        parameters: Of the model.
    """
    low, high = USUAL_LR["reference" if compared else "alone", kind]
    return low, high * (SMALL_FACTOR if kind == "full" and parameters < SMALL else 1.0)


def cut_rows(trainer: Any, module: RunModule) -> str | None:
    """Many rows that are longer than the model reads."""
    data: RunData = trainer.datamodule
    for split, report in data.report().items():
        if report["kept"] and report["cut"] / report["kept"] > CUT_SHARE:
            return (
                f"{report['cut'] / report['kept']:.1%} of the {split} rows are cut to data.max_length "
                f"{data.max_length} ({report['cut']:,} of {report['kept']:,}): what was cut is never "
                "learned (preview --cut shows where); raise data.max_length, or drop such rows with data.overflow: drop"
            )
    return None


def other_template(trainer: Any, module: RunModule) -> str | None:
    """Another chat template than the one that a pretrained model knows."""
    data: RunData = trainer.datamodule
    own, used = data.own_template, data.template
    if not own or used is None or module.model_name is None or used.text.strip() == str(own).strip():
        return None
    return (
        f"the chat template is {used.source}, and the tokenizer has one of its own: {module.model_name} learned to "
        "write turns in that one, and has to learn the new one. The new one is exported with the model; to train on "
        "the model's own, leave data.template out"
    )


def no_pad_token(trainer: Any, module: RunModule) -> str | None:
    """A tokenizer without a pad token, where another token takes its place."""
    data: RunData = trainer.datamodule
    if data.own_pad is not None or data.tokenizer.pad_token is None:
        return None
    return (
        f"the tokenizer has no pad token, and {data.tokenizer.pad_token} stands in. Training is not affected: padding "
        "is known by its place, so the end of an answer still carries loss. But the exported tokenizer names it as pad "
        "token, and a program that finds padding by its id will take the ends of texts for padding"
    )


def no_validation(trainer: Any, module: RunModule) -> str | None:
    """No rows are held out."""
    data: RunData = trainer.datamodule
    if data.sources["validation"] is not None:
        return None
    return (
        "no rows are held out: without them you cannot tell learning from memorisation; set data.validation, to a "
        "source or to a share such as 0.05"
    )


def _starved(share: float, wait: float, step: float, data: RunData) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    more = max(data.workers + 1, min(2 * max(1, data.workers), cores))
    prepare = ", or tokenize once beforehand (data.streaming: false)" if data.streaming else ""
    return (
        f"in {WAIT_WINDOW} updates, {share:.0%} of the time was spent waiting for data ({1000 * wait:.0f} ms of "
        f"{1000 * step:.0f} ms per update): the device is idle meanwhile. Set data.workers to {more} or more (it is "
        f"{data.workers}, and there are {cores} cores){prepare}"
    )


# ---- the course of a run


class Wait:
    """Measures how long updates wait for their micro-batches; validation, saving and callbacks don't count."""

    def __init__(self) -> None:
        self._since = self._waited = self._worked = 0.0
        self._updates = -WAIT_FIRST
        self._reported = False

    def follow(self, loop: Any) -> None:
        """Hooks into what Lightning's loop calls around each fetch, for its profiler: there is no callback for it."""

        def before() -> None:
            type(loop)._on_before_fetch(loop)
            self.begins()

        def after() -> None:
            self.ends()
            type(loop)._on_after_fetch(loop)

        loop._on_before_fetch, loop._on_after_fetch = before, after

    def begins(self) -> None:
        """A batch is asked for."""
        self._since = time.perf_counter()

    def ends(self) -> None:
        """It has arrived."""
        self._waited += time.perf_counter() - self._since

    def batch_begins(self) -> None:
        """The model starts on it."""
        self._since = time.perf_counter()

    def batch_ends(self) -> None:
        """The model is done with it."""
        self._worked += time.perf_counter() - self._since

    def update_ends(self) -> tuple[float, float, float] | None:
        """At the end of a window, if too much of it was spent waiting and that was not reported before.

        Returns:
            The share of the time, seconds of waiting per update, and seconds per update.
        """
        self._updates += 1
        if self._updates < WAIT_WINDOW and self._updates != 0:
            return None
        waited, total, updates = self._waited, self._waited + self._worked, self._updates
        self._waited, self._worked, self._updates = 0.0, 0.0, 0
        if self._reported or not updates or waited <= max(WAIT_SHARE * total, WAIT_SECONDS * updates):
            return None
        self._reported = True
        return waited / total, waited / updates, total / updates


class LossWatch:
    """Watches whether the loss moves at the start of a run, and whether it stays finite."""

    def __init__(self) -> None:
        self.is_watching = True
        self.in_float16 = False
        self._losses: list[float] = []
        self._not_finite = 0

    def update(self, loss: float, lr: float, peak: float) -> str | None:
        """Takes an update's loss and learning rate, and the highest rate of the run; returns a message, or None."""
        if not math.isfinite(loss):
            self._not_finite += 1
            return _no_number(loss, self.in_float16) if self._not_finite == NOT_FINITE else None
        if self._not_finite < NOT_FINITE:  # else it was reported, and is not reported again
            self._not_finite = 0
        if not self.is_watching or lr < 0.5 * peak:
            return None
        self._losses.append(loss)
        if len(self._losses) < STUCK_AFTER:
            return None
        self.is_watching = False
        return _stuck(self._losses, peak)


def _no_number(loss: float, in_float16: bool) -> str:
    why = "a lower learning rate, a warm-up or trainer.gradient_clip_val: 1.0 usually helps"
    if in_float16:
        why = "in float16, large activations overflow; trainer.precision: bf16-mixed has room for them, or 32-true"
    return f"the loss has been {loss} for {NOT_FINITE} updates in a row: {why}"


def _stuck(losses: list[float], lr: float) -> str | None:
    first, last = losses[:STUCK_PART], losses[-STUCK_PART:]
    before, after = statistics.fmean(first), statistics.fmean(last)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / STUCK_PART)
    means = f"{before:.4g} in the first {STUCK_PART} updates, {after:.4g} in the last {STUCK_PART} of {len(losses)}"
    if after - before > max(NOISE * error, RISEN_SHARE * abs(before)):
        return (
            f"the loss rises: {means}. The steps are too large: lower model.optimizer.lr ({lr:.2g} now), warm up "
            "longer (model.schedule.warmup), and clip the gradient (trainer.gradient_clip_val: 1.0)"
        )
    if abs(after - before) <= min(NOISE * error, STUCK_SHARE * abs(before)) or after == before:
        return (
            f"the loss does not move: {means}. Either there is nothing left to learn from these rows, or the learning "
            f"rate ({lr:.2g}) is too small, what should learn is frozen, or the targets are not what you think: "
            "oumi_pl preview shows which tokens carry loss"
        )
    return None
