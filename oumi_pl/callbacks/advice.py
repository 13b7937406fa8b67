"""Warnings that teach: what was seen, why it matters, and what to do about it. Each is given once.

Those about settings come before the first update, those about the course of a run when they are seen. `run.json` keeps
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
from torch.optim import Adam, AdamW

from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.runs import folders

CUT_SHARE = 0.01
"""Share of rows cut to length above which it is no longer a few odd rows that lose their ends."""
SEEN_VALUES = 65536
"""Values of each tensor that are looked at, to tell how many a step would change."""
SMALL = 50_000_000
"""Parameters below which models are trained with larger steps than the published ones are."""
SMALL_FACTOR = 10.0
"""By how much: the best learning rate falls about with the width (Yang et al. 2022, arXiv:2203.03466)."""
USUAL_LR = {
    ("tokens", "scratch"): (1e-5, 2e-2),
    ("tokens", "full"): (1e-6, 1e-3),
    ("tokens", "lora"): (1e-5, 5e-3),
    ("pairs", "scratch"): (1e-6, 1e-2),
    ("pairs", "full"): (5e-8, 5e-5),
    ("pairs", "lora"): (5e-7, 5e-4),
}
"""What is trained on, and what is trained -> the learning rates of Adam between which nearly all published runs lie.

Adapters take about ten times the rate of all weights (Schulman et al. 2025, "LoRA Without Regret"); preference training
a tenth to a hundredth of fine-tuning's (5e-7 in Tunstall et al. 2023, arXiv:2310.16944)."""
KINDS = {"scratch": "a model from random weights", "full": "all weights of a pretrained model", "lora": "LoRA"}
WAIT_WINDOW = 50
"""Updates over which waiting for data is measured: single slow batches say nothing."""
WAIT_FIRST = 10
"""Updates that are left out at the start, while loader processes begin."""
WAIT_SHARE = 0.15
"""Share of the time above which more loader processes are worth their memory."""
WAIT_SECONDS = 0.005
"""Seconds of waiting per update below which starting processes would not pay: handing over a batch takes as long."""
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
"""Updates in a row without a number for a loss: a scaler that looks for its scale needs fewer."""


def tell(trainer: Any, message: str) -> None:
    """Warns on rank 0, at each call, and notes it in `run.json`."""
    if getattr(rank_zero_only, "rank", 0):
        return
    caller = sys._getframe(1)  # no registry is given: in one, Python notes for the whole process what it has said
    warnings.warn_explicit(message, UserWarning, caller.f_code.co_filename, caller.f_lineno)
    folder = next((c.directory for c in getattr(trainer, "callbacks", ()) if isinstance(c, RunFolder)), None)
    if folder is not None:
        told = folders.read_state(folder).get("warnings", [])
        if message not in told:
            folders.write_state(folder, warnings=[*told, message])


class Advice(L.Callback):
    """Looks at the settings of a run, and at how it goes."""

    def __init__(self) -> None:
        self.wait = Wait()
        self.loss = LossWatch()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Looks at the settings."""
        for look in (rounded_away, unusual_lr, cut_rows, other_template, no_pad_token, no_validation):
            if message := look(trainer, pl_module):
                tell(trainer, message)
        self.loss.is_watching = trainer.global_step == 0
        self.loss.in_float16 = str(trainer.precision).startswith("16")
        self.wait.follow(trainer.fit_loop.epoch_loop)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """A micro-batch is there."""
        self.wait.batch_begins()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Looks at the update that has just ended."""
        self.wait.batch_ends()
        if trainer.fit_loop._should_accumulate():
            return
        if found := self.wait.update_ends():
            tell(trainer, _starved(*found, trainer.datamodule))
        counts, group = pl_module.last_update, trainer.optimizers[0].param_groups[0]
        loss = counts["loss"] / max(1.0, counts[pl_module.normalised_by])
        if message := self.loss.update(loss, group["lr"], group.get("initial_lr", group["lr"])):
            tell(trainer, message)


# ---- settings: each returns what is to be said, or None


def rounded_away(trainer: Any, module: Any) -> str | None:
    """Weights in half precision that Adam steps on directly."""
    optimizer = trainer.optimizers[0]
    trained = [p for p in module.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not trained or not isinstance(optimizer, Adam | AdamW):
        return None
    dtype = trained[0].dtype
    lr = max(group["initial_lr"] for group in optimizer.param_groups)
    # a number keeps its value where less than half of its distance to the next is added
    own = [p.to_local() if hasattr(p, "to_local") else p for p in trained]  # sharded: this rank's part
    seen = [p.detach().flatten()[:SEEN_VALUES].abs().float() for p in own]
    lost = sum(int((values * (torch.finfo(dtype).eps / 4) > lr).sum()) for values in seen)
    share = lost / max(1, sum(len(values) for values in seen))
    name = str(dtype).removeprefix("torch.")
    mixed = "bf16-mixed" if dtype == torch.bfloat16 else "16-mixed"
    return (
        f"the weights that are trained are {name}, and {type(optimizer).__name__} adds to them in {name}, which keeps "
        f"{8 if dtype == torch.bfloat16 else 11} bits: smaller steps are rounded away. At a learning rate of {lr:.2g}, "
        f"{share:.0%} of the weights are too large to be changed by a step. trainer.precision: {mixed} with "
        "model.dtype: float32 computes in half precision and keeps the weights in full; or train adapters (model.lora)"
    )


def unusual_lr(trainer: Any, module: Any) -> str | None:
    """A learning rate that is more likely a slip than a choice."""
    optimizer = trainer.optimizers[0]
    if "adam" not in type(optimizer).__name__.lower():
        return None  # others count in other units
    kind = "lora" if module.lora is not None else "full" if module.model_name else "scratch"
    lr = max(group["initial_lr"] for group in optimizer.param_groups)
    usual = usual_lr(module.reads, kind, sum(p.numel() for p in module.parameters()))
    if usual is None or usual[0] <= lr <= usual[1]:
        return None
    low, high = usual
    what = f"{KINDS[kind]}{' on preferences' if module.reads == 'pairs' else ''}, {low:.0e} to {high:.0e}"
    if lr > high:
        return (
            f"the learning rate {lr:.2g} is above what is usual for {what}: such steps tend to destroy more than they "
            f"teach; unless you know it works, set model.optimizer.lr to {high:.0e} or less"
        )
    return (
        f"the learning rate {lr:.2g} is below what is usual for {what}: hardly anything will be learned; unless you "
        f"know it works, set model.optimizer.lr to {low:.0e} or more"
    )


def usual_lr(reads: str, kind: str, parameters: int) -> tuple[float, float] | None:
    """The least and the largest usual learning rate of Adam for so many parameters; None if nobody knows."""
    usual = USUAL_LR.get((reads, kind))
    factor = SMALL_FACTOR if kind == "full" and parameters < SMALL else 1.0
    return (usual[0], usual[1] * factor) if usual else None


def cut_rows(trainer: Any, module: Any) -> str | None:
    """Many rows that are longer than the model reads."""
    for split, report in trainer.datamodule.report().items():
        if report["kept"] and report["cut"] / report["kept"] > CUT_SHARE:
            return (
                f"{report['cut'] / report['kept']:.1%} of the {split} rows are cut to data.max_length "
                f"{trainer.datamodule.max_length} ({report['cut']:,} of {report['kept']:,}): what was cut is never "
                "learned (preview --cut shows where); raise data.max_length, or drop such rows with data.overflow: drop"
            )
    return None


def other_template(trainer: Any, module: Any) -> str | None:
    """Another chat template than the one that a pretrained model knows."""
    data = trainer.datamodule
    own, used = getattr(data, "own_template", None), getattr(data, "template", None)
    if not own or used is None or module.model_name is None or used.text.strip() == str(own).strip():
        return None
    return (
        f"the chat template is {used.source}, and the tokenizer brings one of its own: what {module.model_name} has "
        "learned about turns is written otherwise, and has to be learned anew. It is exported with the model; to train "
        "on the model's own, leave data.template out"
    )


def no_pad_token(trainer: Any, module: Any) -> str | None:
    """A tokenizer without a pad token."""
    data = trainer.datamodule
    if getattr(data, "own_pad", "none was looked for") is not None:
        return None
    return (
        f"the tokenizer has no pad token, and {data.tokenizer.pad_token} stands in. Training does not mind: what is "
        "padding is known by its place, so the end of an answer still carries loss. But the exported tokenizer names "
        "it as pad token, and a program that finds padding by its id will take the ends of texts for padding"
    )


def no_validation(trainer: Any, module: Any) -> str | None:
    """No rows are held out."""
    if getattr(trainer.datamodule, "sources", {}).get("validation") is not None:
        return None
    return (
        "no rows are held out: the training loss falls whether the model learns or learns by heart, and only rows that "
        "it is not trained on tell which; set data.validation, to a source or to a share such as 0.05"
    )


def _starved(share: float, wait: float, step: float, data: Any) -> str:
    workers = getattr(data, "workers", 0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    more = max(workers + 1, min(2 * max(1, workers), cores))
    prepare = ", or tokenize once beforehand (data.streaming: false)" if getattr(data, "streaming", False) else ""
    return (
        f"in {WAIT_WINDOW} updates, {share:.0%} of the time went by waiting for data ({1000 * wait:.0f} ms of "
        f"{1000 * step:.0f} ms per update): the device is idle meanwhile. Set data.workers to {more} or more (it is "
        f"{workers}, and {cores} cores are there){prepare}"
    )


# ---- the course of a run


class Wait:
    """Measures how long updates wait for their micro-batches; validation, saving and callbacks don't count."""

    def __init__(self) -> None:
        self._since = self._waited = self._worked = 0.0
        self._updates = -WAIT_FIRST
        self._told = False

    def follow(self, loop: Any) -> None:
        """Takes part in what Lightning's loop calls around each fetch, for its profiler."""

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
        """It is there."""
        self._waited += time.perf_counter() - self._since

    def batch_begins(self) -> None:
        """The model begins with it."""
        self._since = time.perf_counter()

    def batch_ends(self) -> None:
        """The model is done with it."""
        self._worked += time.perf_counter() - self._since

    def update_ends(self) -> tuple[float, float, float] | None:
        """The share of the time that went by waiting, seconds of it per update, and seconds per update; if too much."""
        self._updates += 1
        if self._updates < WAIT_WINDOW and self._updates != 0:
            return None
        waited, whole, updates = self._waited, self._waited + self._worked, self._updates
        self._waited, self._worked, self._updates = 0.0, 0.0, 0
        if self._told or not updates or waited <= max(WAIT_SHARE * whole, WAIT_SECONDS * updates):
            return None
        self._told = True
        return waited / whole, waited / updates, whole / updates


class LossWatch:
    """Looks whether the loss moves at the start of a run, and whether it stays a number."""

    def __init__(self) -> None:
        self.is_watching = True
        self.in_float16 = False
        self._losses: list[float] = []
        self._not_finite = 0

    def update(self, loss: float, lr: float, peak: float) -> str | None:
        """Takes the loss of an update, its learning rate and that of the whole run; says what is wrong."""
        if not math.isfinite(loss):
            self._not_finite += 1
            return _no_number(loss, self.in_float16) if self._not_finite == NOT_FINITE else None
        if self._not_finite < NOT_FINITE:  # else it has been told
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
    seen = f"{before:.4g} in the first {STUCK_PART} updates, {after:.4g} in the last {STUCK_PART} of {len(losses)}"
    if after - before > max(NOISE * error, RISEN_SHARE * abs(before)):
        return (
            f"the loss rises: {seen}. The steps are too large: lower model.optimizer.lr ({lr:.2g} now), warm up longer "
            "(model.schedule.warmup), and clip the gradient (trainer.gradient_clip_val: 1.0)"
        )
    if abs(after - before) <= min(NOISE * error, STUCK_SHARE * abs(before)) or after == before:
        return (
            f"the loss does not move: {seen}. Either there is nothing left to learn from these rows, or the learning "
            f"rate ({lr:.2g}) is too small, what should learn is frozen, or the targets are not what you think: "
            "oumi_pl preview shows which tokens carry loss"
        )
    return None
